"""Training a modifier: Ray Train (V2) starts and restarts the workers, DeepSpeed runs the steps, PEFT holds the LoRA.

The plan of steps depends on examples, settings and seed alone, so a checkpoint's data position is a step number.
A killed worker restarts from the last checkpoint; so does a killed driver, since Ray Train finds its state again
under the same name in the same storage. With a least number of workers training is elastic: it goes on with fewer
while there are no more, and takes more when they come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig

from cascade import benchmarks
from cascade.config import Execution, PromptStyle
from cascade.errors import DataError
from cascade.scoring.statistics import Score
from cascade.tasks import Example, Message, Task
from cascade.training.card import adapter_card
from cascade.training.looks import Look
from cascade.training.loop import StepReport
from ray_jobs._context import Job, Metrics
from ray_jobs._progress import polling
from ray_jobs._runs import Runs
from ray_jobs._train_worker import ADAPTER, LOOKS, PROGRESS, Assigned, train_worker

RESIZE_S = 30.0
"""Seconds between two looks at how many workers there could be."""
ELASTIC_START_S = 15
"""Seconds that elastic training waits for its workers' places. A node that has just died is still counted among those
that there are; Ray would wait a minute for it before it looks again."""


def train_modifier(job: Job, examples: list[Example], style: PromptStyle) -> Metrics:
    """Train the modifier on the run's examples; leaves a PEFT folder and the curve in the run.

    Raises:
        DataError: there is nothing to learn from.
    """
    if not examples:
        raise DataError("there is no verified example to train on: no teacher answered a failed task rightly")
    job.run.write_table("examples", Example, examples)
    validation = job.config.training.validation
    tasks = job.runs.validation_tasks
    assigned = Assigned(
        job.config, job.run, style, tuple(held_out(tasks)[: validation.tasks]), tuple(tasks[: validation.answered])
    )
    if job.config.execution.train_workers_min is not None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_START_S))
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"assigned": assigned},
        scaling_config=scaling(job.config.execution),
        run_config=RunConfig(
            name="train",
            **job.ray_storage(),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with polling(lambda: _show_progress(job)):
        result = trainer.fit()
    if result.checkpoint is None:
        raise DataError(f"training in {job.run.folder} ended without a checkpoint; remove the folder and run again")
    with result.checkpoint.as_directory() as folder:
        job.run.store.upload_folder(Path(folder) / ADAPTER, f"{job.run.folder}/{ADAPTER}")
    metrics = dict(result.metrics or {})
    write_card(job.runs, metrics)
    points = {p.step: p for p in job.run.read("curve", StepReport)}
    job.run.write_table("curve", StepReport, [points[step] for step in sorted(points)])
    looks = {look.step: look for look in job.run.read(LOOKS, Look)}
    job.run.write_table(LOOKS, Look, [looks[step] for step in sorted(looks)])
    for leftover in ("train", PROGRESS):
        job.run.store.delete(f"{job.run.folder}/{leftover}")
    return metrics


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


def held_out(tasks: Sequence[Task]) -> list[tuple[str, tuple[Message, ...]]]:
    """Chat tasks with their reference answers: what loss is measured on."""
    return [
        (t.id, (*t.messages, Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))))
        for t in tasks
        if t.form == "chat"
    ]


def _show_progress(job: Job) -> None:
    """Show how far the workers are, as the first of them notes it in the run."""
    path = f"{job.run.folder}/{PROGRESS}"
    if job.run.store.exists(path):
        state = job.run.store.read_json(path)
        job.progress.update(job.run.job, state["step"], state["steps"], f"steps, loss {state['loss']:.3f}")
