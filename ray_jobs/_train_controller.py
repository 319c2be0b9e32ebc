"""What Ray Train's controller is given: it only watches, so nothing here brings torch along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.v2.api.callback import UserCallback

from cascade.artifacts import Run
from cascade.config import Config, PromptStyle
from cascade.errors import CascadeError
from cascade.store import StorageError
from cascade.tasks import Message, Task

RAY_FOLDER = "train"
"""Where Ray Train keeps its state and the checkpoints, in the run, until the job is done."""


@dataclass(frozen=True)
class Assigned:
    """What a worker is given.

    Attributes:
        held_out: validation tasks with their reference answers; answered: those that the student answers too.
    """

    config: Config
    run: Run
    style: PromptStyle
    held_out: tuple[tuple[str, tuple[Message, ...]], ...]
    answered: tuple[Task, ...]


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker runs; its module, with torch and all, is imported there."""
    from ray_jobs import _train_worker

    _train_worker.train_worker(settings)


class GiveUpOnUserErrors(UserCallback):
    """Ends training at an error that the user must mend, which the next three attempts would meet again.

    A storage that takes nothing may only be away for a while: that is tried again, as Ray does where it stores itself.
    Ray takes an error of a callback for one that is not to be tried again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise what a worker raised, if that is for the user."""
        for error in worker_exceptions.values():
            own = user_error(error)
            if own is not None and not isinstance(own, StorageError):
                raise own


def user_error(error: BaseException | None) -> CascadeError | None:
    """The error for the user within what Ray wrapped around it."""
    if error is None or isinstance(error, CascadeError):
        return error
    inner = [getattr(error, name, None) for name in ("_base_exc", "controller_failure", "cause", "__cause__")]
    inner += getattr(error, "worker_failures", {}).values()
    return next((own for e in inner if isinstance(e, BaseException) and (own := user_error(e))), None)


def begun_in(run: Run) -> str:
    """Where Ray keeps a training that has begun, for people."""
    return run.store.uri_of(f"{run.folder}/{RAY_FOLDER}")
