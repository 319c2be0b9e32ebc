"""A headless Chromium, spoken to over its DevTools protocol; no driver to install."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


class Browser:
    """One page. Use it in a `with` block; leaving ends the browser."""

    def __init__(self, url: str, *, width: int = 1100, height: int = 800) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        size = f"--window-size={width},{height}"
        command = [CHROMIUM, *_FLAGS, size, "--remote-debugging-port=0", f"--user-data-dir={self._profile.name}", url]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._socket = connect(self._page_address(), max_size=None)
        self._serial = 0
        self.wait_for("location.href != 'about:blank' && document.readyState == 'complete'")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(timeout=20)
        self._profile.cleanup()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        arguments = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", **arguments)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self._is_true(script):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.05)

    def _is_true(self, script: str) -> bool:
        """Of a page that may just be loading itself again, which is not yet."""
        try:
            return bool(self.run(script))
        except AssertionError as error:
            if "navigated" in str(error) or "context was destroyed" in str(error):
                return False
            raise

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _page_address(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"DevTools listening on ws://([^/]+)/", line)
            if found:
                break
        else:
            raise AssertionError("the browser did not start")
        pages = [p for p in httpx.get(f"http://{found[1]}/json").json() if p["type"] == "page"]
        return str(pages[0]["webSocketDebuggerUrl"])

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._serial += 1
        self._socket.send(json.dumps({"id": self._serial, "method": method, "params": arguments}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._serial:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
