"""Training a modifier: Ray Train (V2) starts and restarts the workers, DeepSpeed runs the steps, PEFT holds the LoRA.

The plan of steps depends on examples, settings and seed alone, so a checkpoint's data position is a step number.
A killed worker restarts from the last checkpoint; so does a killed driver, since Ray Train finds its state again
under the same name in the same storage, where it stays until the job is done. With a least number of workers training
is elastic: it goes on with fewer while there are no more, and takes more when they come.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from cascade.artifacts import Run
from cascade.config import Execution, PromptStyle
from cascade.errors import DataError
from cascade.models import bits
from cascade.models.files import base_folder, check_lengths
from cascade.scoring.statistics import Score
from cascade.tasks import Example
from cascade.training import trackers
from cascade.training.card import adapter_card
from cascade.training.examples import encode_examples
from cascade.training.looks import needs_loss
from cascade.training.measures import StepReport
from ray_jobs._context import Job, Metrics
from ray_jobs._held_out import held_out
from ray_jobs._progress import polling
from ray_jobs._results import ADAPTER
from ray_jobs._runs import Runs
from ray_jobs._train_controller import RAY_FOLDER, Assigned, GiveUpOnUserErrors, begun_in, train_worker, user_error
from ray_jobs._train_ledger import CURVE, PROGRESS, check_ledger

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

RESIZE_S = 30.0
"""Seconds between two looks at how many workers there could be."""
ELASTIC_START_S = 15
"""Seconds that elastic training waits for its workers' places. A node that has just died is still counted among those
that there are; Ray would wait a minute for it before it looks again."""


def train_modifier(job: Job, examples: list[Example], style: PromptStyle) -> Metrics:
    """Train the modifier on the run's examples; leaves a PEFT folder, the curve and the ledger in the run.

    Raises:
        DataError: there is nothing to learn from, or nothing that decides is measurable; or the ledger does not hold
            what was planned.
    """
    if not examples:
        raise DataError(
            "there is no verified example to train on: the base failed none of the training tasks, no teacher answered "
            "one of these rightly, or all that were answered overlap a test task"
        )
    job.run.write_table("examples", Example, examples)
    assigned = _assign(job, style)
    check_before(assigned, examples)
    if job.config.execution.train_workers_min is not None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_START_S))
    from ray.train import torch as with_torch  # torch itself comes along

    trainer = with_torch.TorchTrainer(
        train_worker,
        train_loop_config={"assigned": assigned},
        scaling_config=scaling(job.config.execution),
        run_config=RunConfig(
            name=RAY_FOLDER,
            **job.ray_storage(),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[GiveUpOnUserErrors()],  # type: ignore[list-item]
        ),
    )
    with polling(lambda: _show_progress(job)):
        result = _fit(trainer, job.run)
    if result.checkpoint is None:
        raise DataError(f"training ended without a checkpoint; remove {begun_in(job.run)} and run again")
    with result.checkpoint.as_directory() as folder:
        job.run.store.upload_folder(Path(folder) / ADAPTER, f"{job.run.folder}/{ADAPTER}")
    metrics = dict(result.metrics or {})
    write_card(job.runs, metrics)
    job.run.write_table(CURVE, StepReport, sorted(job.run.read(CURVE, StepReport), key=lambda p: p.step))
    asked = job.runs.validation_tasks
    return (
        metrics
        | check_ledger(job.run, metrics["steps"], metrics["planned_steps"], job.config.training.lora.epochs)
        | {"validation_without_reference": sum(t.form == "chat" for t in asked) - len(held_out(asked))}
    )


def _assign(job: Job, style: PromptStyle) -> Assigned:
    validation, tasks = job.config.training.validation, job.runs.validation_tasks
    measured = held_out(tasks, validation.tasks)
    if not measured and needs_loss(job.config.training):
        raise DataError(
            f"none of the {len(tasks)} validation tasks has a reference answer, but training.validation.keep or "
            "patience goes by the loss on them: give the tasks solutions, or set keep: last and patience: null (or "
            "answered above 0 and keep: best_accuracy)"
        )
    return Assigned(job.config, job.run, style, tuple(measured), tuple(tasks[: validation.answered]))


def check_before(assigned: Assigned, examples: Sequence[Example]) -> None:
    """Find here what the workers would find, as far as that takes no time.

    Raises:
        ConfigError: a package is missing, or an example may be longer than the base's context.
        DataError: none of the examples can be trained on.
    """
    config = assigned.config
    trackers.check_installed(config)
    bits.check_installed(config.training.base_bits)
    check_lengths(config)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder(config.base))
    longest = config.training.lora.max_length
    encode = functools.partial(encode_examples, max_length=longest, system=assigned.style.system)
    if not any(encode([example], tokenizer).examples for example in examples):  # the first is found at once, if any
        encode(examples, tokenizer).check(f"training.lora.max_length = {longest}")


def _fit(trainer: TorchTrainer, run: Run) -> Any:
    """Train to the end.

    Raises:
        CascadeError: what a worker met that the user must mend.
        DataError: what Ray left of an earlier start cannot be read.
    """
    try:
        with _interrupted_by_sigint():
            return trainer.fit()
    except (TrainingFailedError, RayError) as error:
        if (own := user_error(error)) is not None:
            raise own from None
        if CheckpointManagerInitializationError.__name__ in f"{type(error).__name__} {error}":
            raise DataError(
                f"what an earlier start of the training left cannot be read: remove {begun_in(run)} and run again, "
                "which trains anew on the same examples"
            ) from error
        raise


@contextlib.contextmanager
def _interrupted_by_sigint() -> Iterator[None]:
    """Ctrl-C is an interruption in and after Ray Train, whose own handler leaves with success and stays for good."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():  # no other may set one
            signal.signal(signal.SIGINT, before)


def write_card(runs: Runs, metrics: Mapping[str, Any], scores: Mapping[str, Score] | None = None) -> None:
    """Put a README into the folder of the trained adapter, in place of the one that is there."""
    run = runs.train_modifier
    card = adapter_card(runs.config, runs.base_sha256, run.read("examples", Example), metrics, scores)
    run.store.write_bytes(f"{run.folder}/{ADAPTER}/README.md", card.encode())


def scaling(execution: Execution) -> ScalingConfig:
    """How many workers, with what; a range of them where a least number is given."""
    most, least = execution.train_workers, execution.train_workers_min
    resources = {"CPU": execution.cpus_per_worker, **({"GPU": execution.gpus} if execution.use_gpu else {})}
    return ScalingConfig(
        num_workers=most if least is None or least == most else (least, most),
        use_gpu=execution.use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_S,
    )


def _show_progress(job: Job) -> None:
    """Show how far the workers are, as the first of them notes it in the run."""
    path = f"{job.run.folder}/{PROGRESS}"
    with contextlib.suppress(OSError):  # of a store that does not answer just now: the next look will show it
        if job.run.store.exists(path):
            state = job.run.store.read_json(path)
            job.progress.update(job.run.job, state["step"], state["steps"], f"steps, loss {state['loss']:.3f}")
