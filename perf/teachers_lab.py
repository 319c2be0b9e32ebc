"""What the parts of `teachers.py` share: the mock OpenAI server, a job to ask it, and what its counts say."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from mock_server import Server, mock_server

from cascade.config import Config
from cascade.store import Store
from cascade.tasks import Task
from ray_jobs._context import Job
from ray_jobs._results import UNSOLVED
from ray_jobs._runs import Runs

__all__ = ["ROOT", "Figures", "Lab", "Server", "mean_in_flight", "mock_server", "rate", "storage"]

Figures = dict[str, tuple[Any, Any, bool]]
"""figure -> value, target, met"""
ROOT = Path(__file__).parents[1]


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
