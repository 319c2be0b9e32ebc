"""What the parts of `teachers.py` share: a mock OpenAI server in a process of its own, tasks, and a job to ask them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.artifacts import Store
from cascade.config import Config
from cascade.tasks import Task
from ray_jobs._context import Job
from ray_jobs._runs import Runs
from ray_jobs._test import UNSOLVED

Figures = dict[str, tuple[Any, Any, bool]]
"""figure -> value, target, met"""
ROOT = Path(__file__).parents[1]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """The mock server (tests/helpers/mock_openai.py), with its settings and its counts."""

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
def mock_server() -> Iterator[Server]:
    """Run the mock server for the time of the block."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "helpers" / "mock_openai.py")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        server = Server(int(process.stdout.readline()))
        while True:
            try:
                server.stats()
                break
            except OSError:
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


@dataclass
class Lab:
    """One job of tier 1 over given tasks: what the base fails is taken as known."""

    config: Config
    job: Job
    store: Store

    @classmethod
    def of(cls, config: Config, tasks: Sequence[Task]) -> Lab:
        """Write what `test_domain` would have left, so that `generate_tier1` can begin."""
        lab = cls.opened(config)
        tested = lab.job.runs.test_domain
        tested.start(config)
        tested.write_table(UNSOLVED, Task, tasks)
        tested.finish({})
        lab.job.run.start(config)
        return lab

    @classmethod
    def opened(cls, config: Config) -> Lab:
        """A lab that is there already."""
        runs = Runs(config)
        runs.__dict__["base_sha256"] = "none"  # in place of what would be loaded from a base and from benchmarks
        for split in ("train", "validation", "test"):
            runs.__dict__[f"{split}_tasks"] = []
        return cls(config, Job(config, runs, runs.generate_tier1), runs.store)


@contextmanager
def storage() -> Iterator[str]:
    """A folder for one measurement."""
    with tempfile.TemporaryDirectory(prefix="teachers-", ignore_cleanup_errors=True) as folder:
        yield folder


def rate(spans: Sequence[Sequence[float]]) -> float:
    """Requests per second over the time from the first arrival to the last response."""
    return len(spans) / (max(end for _, end in spans) - min(start for start, _ in spans)) if spans else 0.0


def mean_in_flight(spans: Sequence[Sequence[float]], skip: float = 0.1) -> float:
    """Time-weighted mean of the requests that the server held, from the first tenth of the run to the last arrival."""
    first, last = min(s for s, _ in spans), max(s for s, _ in spans)
    first += skip * (last - first)
    held = sum(max(0.0, min(end, last) - max(start, first)) for start, end in spans)
    return held / (last - first)
