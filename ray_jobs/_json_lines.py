"""Structured logs: what the jobs do as JSON lines on standard output, for a log store rather than for people.

Each line has `time` (UTC), `level`, `event`, `domain` and `run` (this start of the pipeline or job); those of a step
have `step`, the name of its folder, too. With `execution.logs: json` Ray writes its own logs as JSON as well; the line
`connected` names the `ray_job` that they are marked with.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

import ray
from ray import LoggingConfig

from cascade.config import Config
from ray_jobs._meter import TierState
from ray_jobs._progress import Progress, Tenths
from ray_jobs._runs import Runs


def ray_logs(config: Config, *, quiet: bool) -> dict[str, Any]:
    """How Ray logs, as arguments of `ray.init`."""
    if config.execution.logs == "text":
        return {}
    return {"logging_config": LoggingConfig(encoding="JSON", log_level="WARNING" if quiet else "INFO")}


class JsonLines(Progress):
    """One JSON object per line: when a step begins, each tenth of a stage, and when it ends."""

    def __init__(self, runs: Runs, stream: TextIO | None = None) -> None:
        self.runs, self.stream = runs, stream or sys.stdout
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self.began: dict[str, float] = {}
        self.news = Tenths()

    @contextmanager
    def told(self) -> Iterator[Progress]:
        """Tell of the beginning and the end of the block, also of an end that was not planned."""
        began = time.perf_counter()
        self.say("began")
        try:
            yield self
        except BaseException as error:
            what = {"error": type(error).__name__, "message": str(error)}
            self.say("failed", level="ERROR", seconds=time.perf_counter() - began, **what)
            raise
        self.say("ended", seconds=time.perf_counter() - began)

    def say(self, event: str, job: str = "", *, level: str = "INFO", **more: Any) -> None:
        """Write one line."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event}
        line |= {"domain": self.runs.config.domain, "run": self.run}
        line |= {"step": self.runs.run(job).name} if job else {}
        plain = json.loads(json.dumps(line | more, default=str), parse_constant=lambda _: None)  # JSON has no NaN
        print(json.dumps(plain, ensure_ascii=False), file=self.stream, flush=True)

    def connected(self, dashboard: str) -> None:
        self.say("connected", ray_job=ray.get_runtime_context().get_job_id(), dashboard=dashboard)

    def started(self, job: str) -> None:
        self.began[job] = time.perf_counter()
        self.say("step began", job)

    def reused(self, job: str) -> None:
        self.say("step reused", job)

    def update(self, job: str, done: int, total: int, note: str = "") -> None:
        if self.news.are(job, done, total, note):
            self.say("progress", job, done=done, total=total, note=note)

    def tier(self, job: str, state: TierState) -> None:
        if self.news.are(job, state.done, state.total, ""):
            figures: dict[str, Any] = {"tier": state.tier, "teacher": state.teacher, "verified": state.verified}
            figures |= {"spent_usd": state.spent_usd, "budget_left_usd": state.remaining_usd}
            self.say("progress", job, done=state.done, total=state.total, **figures)

    def finished(self, job: str, metrics: dict[str, Any]) -> None:
        self.say("step ended", job, seconds=time.perf_counter() - self.began[job], metrics=metrics)

    def in_use(self, current: str, made: str) -> None:
        level = "INFO" if current == made else "WARNING"
        self.say("modifier in use", level=level, current=current or None, made=made)
