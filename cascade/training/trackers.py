"""Where the figures of a training go beside the run's own tables: TensorBoard always, MLflow and W&B when set."""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cascade.artifacts import Run
from cascade.config import Config
from cascade.errors import ConfigError
from cascade.training.looks import Look
from cascade.training.loop import StepReport

TENSORBOARD = "tensorboard"
"""Folder of the event files, in the run: `tensorboard --logdir` on it shows the curves."""


class Tracker(Protocol):
    """Takes figures of a step."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a training."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    @classmethod
    def open(cls, config: Config, run: Run) -> Trackers:
        """TensorBoard in the run, and what `training.trackers` names.

        Raises:
            ConfigError: a named tracker's package is not installed.
        """
        return cls([TensorBoard(run), *(OPEN[name](config, run) for name in config.training.trackers)])

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
            tracker.log(step, finite)

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class TensorBoard:
    """Event files, written in the run's folder or, where that is no local one, copied there at each flush."""

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.run, self.event, self.summary = run, Event, Summary
        self.remote = not run.store.is_local
        local = tempfile.mkdtemp() if self.remote else run.store.path(f"{run.folder}/{TENSORBOARD}")
        self.folder = Path(local)
        self.writer = EventFileWriter(local)

    def log(self, step: int, figures: dict[str, float]) -> None:
        import time

        values = [self.summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        event = self.event(wall_time=time.time(), step=step, summary=self.summary(value=values))
        self.writer.add_event(event)

    def flush(self) -> None:
        self.writer.flush()
        if self.remote:
            self.run.store.upload_folder(self.folder, f"{self.run.folder}/{TENSORBOARD}")

    def close(self) -> None:
        self.flush()
        self.writer.close()


class _Mlflow:
    """A run on the server of MLFLOW_TRACKING_URI, named after ours; a resumed training goes on in it."""

    def __init__(self, config: Config, run: Run) -> None:
        self.mlflow = _package("mlflow")
        self.mlflow.set_experiment(f"cascade-{config.domain}")
        self.mlflow.start_run(run_name=run.name)
        self.mlflow.log_params(config.training.lora.model_dump())

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.mlflow.log_metrics(figures, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.mlflow.end_run()


class _Wandb:
    """A run in the project of WANDB_PROJECT; a resumed training goes on in it."""

    def __init__(self, config: Config, run: Run) -> None:
        settings = config.training.model_dump(mode="json")
        self.run = _package("wandb").init(name=run.name, id=run.fingerprint, resume="allow", config=settings)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


OPEN: dict[str, Callable[[Config, Run], Tracker]] = {"mlflow": _Mlflow, "wandb": _Wandb}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"training.trackers names {name}, which is not installed: pip install {name}, or leave it out"
        ) from error
