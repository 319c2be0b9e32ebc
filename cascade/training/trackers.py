"""Where the figures of a training go beside the run's own tables: TensorBoard always, MLflow and W&B when set.

They are for people to look at: a tracker that fails is warned of and tried again later, and training goes on. What it
does not take waits in memory until then.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from cascade.artifacts import Run
from cascade.config import Config
from cascade.errors import ConfigError
from cascade.training.looks import Look
from cascade.training.measures import StepReport

TENSORBOARD = "tensorboard"
"""Folder of the event files, in the run: `tensorboard --logdir` on it shows the curves."""
WRITE_S = 1.0
"""Seconds between two writes to their file, apart from those that a flush asks for."""
SEND_S = 5.0
"""Seconds between two requests to MLflow, apart from those that a flush asks for."""
MLFLOW_BATCH = 1000
"""Figures that it takes at once."""
QUIET_S = 300.0
"""Seconds for which a server that failed is left alone: one that cannot be reached may take long to say so."""
MOST_WAITING = 100_000
"""Steps or figures that wait for a tracker, some ten megabytes; what comes to more is not shown."""
_TAG = "cascade.fingerprint"
"""MLflow's tag by which a resumed training finds its run."""


class Tracker(Protocol):
    """Takes figures of a step, and the seconds since 1970 at which they were measured."""

    def log(self, step: int, figures: dict[str, float], at: float) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a training."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    @classmethod
    def open(cls, config: Config, run: Run, start: int = 0) -> Trackers:
        """TensorBoard in the run, and what `training.trackers` names.

        Args:
            start: steps that were done before; what an earlier start of the training showed of later ones is void.

        Raises:
            ConfigError: a named tracker's package is not installed.
        """
        check_installed(config)
        openers = {TENSORBOARD: lambda config, run: TensorBoard(run, start)} | OPEN
        return cls([_Guarded(name, config, run, openers[name]) for name in (TENSORBOARD, *config.training.trackers)])

    def step(self, report: StepReport) -> None:
        """Figures of an optimiser step."""
        figures = {
            "train/loss": report.loss,
            "train/learning_rate": report.learning_rate,
            "train/gradient_norm": report.gradient_norm,
            "train/tokens_per_second": report.tokens / report.seconds,
            "train/memory_bytes": float(report.memory_bytes),
        }
        self._log(report.step + 1, figures)

    def look(self, look: Look) -> None:
        """Figures of a look at the validation tasks."""
        figures = {"validation/loss": look.loss}
        if look.answered:
            figures["validation/accuracy"] = look.passed / look.answered
        self._log(look.step, figures)

    def _log(self, step: int, figures: dict[str, float]) -> None:
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(step, finite, time.time())

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class _Guarded:
    """A tracker that may fail. What comes while it is left alone, or is not open yet, waits for it."""

    def __init__(self, name: str, config: Config, run: Run, opener: Callable[[Config, Run], Tracker]) -> None:
        self.name, self.warned, self.quiet_until = name, False, -math.inf
        self.open = lambda: opener(config, run)
        self.tracker: Tracker | None = None
        self.waiting: deque[tuple[int, dict[str, float], float]] = deque()
        self._try(self._hand_over)

    def log(self, step: int, figures: dict[str, float], at: float) -> None:
        if len(self.waiting) < MOST_WAITING:
            self.waiting.append((step, figures, at))
        self._try(self._hand_over)

    def flush(self) -> None:
        if self.tracker is not None:  # another thread may ask for it: one alone opens a tracker
            self._try(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Whatever the time: there is no later."""
        if self.tracker is not None or self.waiting:
            self.quiet_until = -math.inf
            self._try(self._close)

    def _hand_over(self, tracker: Tracker) -> None:
        while self.waiting:
            tracker.log(*self.waiting.popleft())

    def _close(self, tracker: Tracker) -> None:
        try:
            self._hand_over(tracker)
        finally:
            tracker.close()

    def _try(self, action: Callable[[Tracker], None]) -> None:
        """Do something with the tracker, opened if it is not yet."""
        if time.monotonic() < self.quiet_until:
            return
        try:
            self.tracker = self.tracker or self.open()
            action(self.tracker)
        except Exception as error:
            if self.name != TENSORBOARD:  # whose file is at hand, and says at once that it cannot be written
                self.quiet_until = time.monotonic() + QUIET_S
            if not self.warned:
                self.warned = True
                logging.getLogger(__name__).warning(
                    "%s takes no figures (%s: %s); training goes on, and tries it again from time to time",
                    self.name,
                    type(error).__name__,
                    error,
                )


class TensorBoard:
    """An event file, written in the run's folder or, where that is no local one, copied there at each flush.

    It is written to once a second at most, and at each flush, for which another thread may ask. What cannot be written,
    as on a full disk, is kept and written with what comes later. (TensorBoard's own writer has a thread, which the
    first error ends for good.)
    """

    def __init__(self, run: Run, start: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.run, self.event, self.summary = run, Event, Summary
        self.remote = not run.store.is_local
        local = tempfile.mkdtemp() if self.remote else run.store.path(f"{run.folder}/{TENSORBOARD}")
        self.folder = Path(local)
        # TensorBoard reads a folder's files in the order of their names.
        self.file = self.folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.good_bytes, self.written = 0, 0.0
        self.lock = threading.Lock()
        # TensorBoard drops what it has of later steps when it reads that a session starts.
        begin = Event(step=start + 1, session_log=SessionLog(status=SessionLog.START))
        self.waiting = [Event(wall_time=time.time(), file_version="brain.Event:2"), begin]

    def log(self, step: int, figures: dict[str, float], at: float) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        event = self.event(wall_time=at, step=step, summary=self.summary(value=values))
        with self.lock:
            if len(self.waiting) < MOST_WAITING:
                self.waiting.append(event)
            if time.monotonic() - self.written >= WRITE_S:
                self._write()

    def flush(self) -> None:
        with self.lock:
            self._write()
        if self.remote:  # of what is added meanwhile, the next flush sends the rest
            self.run.store.upload_folder(self.folder, f"{self.run.folder}/{TENSORBOARD}")

    def close(self) -> None:
        self.flush()

    def _write(self) -> None:
        """Append what waits, in place of what an earlier error left half-written."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.written = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as file:
            file.truncate(min(self.good_bytes, file.tell()))
            records = RecordWriter(file)
            for event in self.waiting:
                records.write(event.SerializeToString())
            file.flush()
            self.good_bytes = file.tell()
        self.waiting = []


class _Mlflow:
    """A run on the server of MLFLOW_TRACKING_URI, named after ours; a resumed training goes on in it.

    A thread sends the figures, those of some seconds at once: no step waits for the server, which may be far away, nor
    fails with it. What it did not take is sent with what comes later, after some minutes or at the next flush, which
    says what is wrong.
    """

    def __init__(self, config: Config, run: Run) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a checkpoint waits for it, minutes by default
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.mlflow = importlib.import_module("mlflow")
        experiment = self.mlflow.set_experiment(f"cascade-{config.domain}")
        found = self.mlflow.search_runs(
            experiment_ids=[experiment.experiment_id],
            filter_string=f"tags.`{_TAG}` = '{run.fingerprint}'",
            max_results=1,
            output_format="list",
        )
        if found:
            theirs = self.mlflow.start_run(run_id=found[0].info.run_id)
        else:
            theirs = self.mlflow.start_run(run_name=run.name, tags={_TAG: run.fingerprint})
            self.mlflow.log_params(config.training.lora.model_dump())
        self.run_id, self.client = theirs.info.run_id, self.mlflow.MlflowClient()
        self.waiting: list[Any] = []
        self.sender, self.sending, self.sent = ThreadPoolExecutor(1, "mlflow"), Future[None](), -math.inf
        self.sending.set_result(None)

    def log(self, step: int, figures: dict[str, float], at: float) -> None:
        if len(self.waiting) < MOST_WAITING:
            metric, milliseconds = self.mlflow.entities.Metric, int(at * 1000)
            self.waiting += [metric(name, value, milliseconds, step) for name, value in figures.items()]
        if self.sending.done():
            pause = QUIET_S if self.sending.exception() else SEND_S
            if time.monotonic() - self.sent >= pause:
                self.sending, self.sent = self.sender.submit(self._send), time.monotonic()

    def flush(self) -> None:
        self.sender.submit(self._send).result()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.sender.shutdown()
            self.mlflow.end_run()

    def _send(self) -> None:
        while batch := self.waiting[:MLFLOW_BATCH]:
            self.client.log_batch(self.run_id, metrics=batch)
            del self.waiting[: len(batch)]


class _Wandb:
    """A run in the project of WANDB_PROJECT; a resumed training goes on in it."""

    def __init__(self, config: Config, run: Run) -> None:
        settings = config.training.model_dump(mode="json")
        self.run = importlib.import_module("wandb").init(
            name=run.name, id=run.fingerprint, resume="allow", config=settings
        )

    def log(self, step: int, figures: dict[str, float], at: float) -> None:
        self.run.log(figures, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


OPEN: dict[str, Callable[[Config, Run], Tracker]] = {"mlflow": _Mlflow, "wandb": _Wandb}


def check_installed(config: Config) -> None:
    """
    Raises:
        ConfigError: the package of a tracker that the config names is not there.
    """
    for name in config.training.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.trackers names {name}, which is not installed: pip install {name}, or leave it out"
            )
