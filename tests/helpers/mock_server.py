"""The mock OpenAI server (mock_openai.py beside this) in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_START_S = 30.0


class Server:
    """The server, with its settings and its counts.

    Attributes:
        url: what an OpenAI client takes as its base URL.
    """

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def set(self, **settings: Any) -> None:
        """Behave so from now on, and count anew."""
        self._call("settings", settings)

    def learn(self, book: dict[str, str]) -> None:
        """Give these answers to these prompts."""
        self._call("answers", book)

    def stats(self, *, answered: bool = False) -> dict[str, Any]:
        """What it has seen; `answered`: with how often it answered each prompt."""
        found: dict[str, Any] = self._call("stats" + ("?answered=1" if answered else ""))
        return found

    def _call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with _OPENER.open(urllib.request.Request(f"{self.root}/{path}", data), timeout=60) as response:
            return json.load(response)


@contextmanager
def mock_server(**settings: Any) -> Iterator[Server]:
    """Run the server for the time of the block.

    Args:
        settings: see `mock_openai.Settings`.

    Raises:
        OSError: it does not start.
    """
    command = [sys.executable, str(Path(__file__).with_name("mock_openai.py")), json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        server = Server(int(process.stdout.readline()))
        deadline = time.monotonic() + _START_S
        while True:
            try:
                server.stats()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()
