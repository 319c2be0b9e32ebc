"""Training a modifier: Ray Train (V2) starts and restarts the workers, DeepSpeed runs the steps, PEFT holds the LoRA.

The plan of steps depends on examples, settings and seed alone, so a checkpoint's data position is a step number.
A killed worker restarts from the last checkpoint; so does a killed driver, since Ray Train finds its state again
under the same name in the same storage.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cascade.artifacts import Run
from cascade.config import Config, PromptStyle
from cascade.errors import DataError
from cascade.models.base import LoadedBase, end_token_ids, load_base
from cascade.tasks import Example
from cascade.training.deepspeed_engine import DeepSpeedEngine
from cascade.training.examples import EncodedSet, encode_examples
from cascade.training.layout import most_tokens
from cascade.training.loop import StepReport, TargetLoss, run_steps
from cascade.training.lora import add_lora, save_adapter, trainable
from cascade.training.packing import Step, plan_steps
from ray_jobs._context import Job, Metrics
from ray_jobs._evaluate import limit_threads
from ray_jobs._progress import polling

ADAPTER = "adapter"
"""Folder of the trained PEFT adapter, inside the run."""


PROGRESS = "progress.json"
"""What the workers note for people while they train."""


def train_modifier(job: Job, examples: list[Example], style: PromptStyle) -> Metrics:
    """Train the modifier on the run's examples; leaves a PEFT folder and the curve in the run.

    Raises:
        DataError: there is nothing to learn from.
    """
    if not examples:
        raise DataError("there is no verified example to train on: no teacher answered a failed task rightly")
    job.run.write_table("examples", Example, examples)
    execution = job.config.execution
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": job.config, "run": job.run, "style": style},
        scaling_config=ScalingConfig(
            num_workers=execution.train_workers,
            use_gpu=execution.use_gpu,
            resources_per_worker={"CPU": execution.cpus_per_worker, **({"GPU": 1} if execution.use_gpu else {})},
        ),
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
    points = {p.step: p for p in job.run.read("curve", StepReport)}
    job.run.write_table("curve", StepReport, [points[step] for step in sorted(points)])
    for leftover in ("train", PROGRESS):
        job.run.store.delete(f"{job.run.folder}/{leftover}")
    return dict(result.metrics or {})


def _show_progress(job: Job) -> None:
    """Show how far the workers are, as the first of them notes it in the run."""
    path = f"{job.run.folder}/{PROGRESS}"
    if job.run.store.exists(path):
        state = job.run.store.read_json(path)
        job.progress.update(job.run.job, state["step"], state["steps"], f"steps, loss {state['loss']:.3f}")


def _worker(settings: dict[str, Any]) -> None:
    """What each training worker runs."""
    config: Config = settings["config"]
    run: Run = settings["run"]
    limit_threads(config.execution, config.execution.cpus_per_worker)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    loaded = load_base(config.base, ray.train.torch.get_device())
    encoded = _encode(run, config, settings["style"], loaded)
    model = add_lora(loaded, config.training.lora, config.seed)
    # ZeRO 3 gathers weights in the hooks of the modules that fused layers go past.
    module = TargetLoss(model, fused=config.training.zero_stage < 3)
    row_tokens = config.execution.row_tokens or most_tokens(module.inputs)
    plan = plan_steps(encoded.examples, config.training.lora, config.seed, row_tokens=row_tokens, workers=world)
    engine = DeepSpeedEngine(module, config.training, loaded.device, loaded.model.dtype)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None and _had_ended(checkpoint):  # only the hand-over to the driver was missing
        with checkpoint.as_directory() as folder:
            kept = Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report(_what_was_learned(plan, encoded), checkpoint=kept)
        return
    start = _restore(engine, checkpoint)
    steps = run_steps(
        engine, plan, config.training.lora, start=start, rank=rank, world=world, reduce_sum=_sum_over_workers
    )
    recorder = _Recorder(run, len(plan), rank)
    for report in steps:
        recorder.add(report)
        number = report.step + 1
        if number % config.training.checkpoint_steps == 0 and number < len(plan):
            with tempfile.TemporaryDirectory() as folder:
                engine.save(folder, number)
                recorder.flush()
                ray.train.report({"step": number}, checkpoint=Checkpoint.from_directory(folder))
    with tempfile.TemporaryDirectory() as folder:
        engine.gather_master_weights(trainable(model))
        if rank == 0:
            save_adapter(model, loaded, config.seed, Path(folder) / ADAPTER)
        recorder.flush()
        metrics = _what_was_learned(plan, encoded)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


def _encode(run: Run, config: Config, style: PromptStyle, loaded: LoadedBase) -> EncodedSet:
    encoded = encode_examples(
        run.read("examples", Example),
        loaded.tokenizer,
        max_length=config.training.lora.max_length,
        system=style.system,
        end_ids=end_token_ids(loaded),
    )
    if not encoded.examples:
        raise DataError(
            f"none of the examples can be trained on: {len(encoded.too_long)} are longer than "
            f"training.lora.max_length = {config.training.lora.max_length} tokens, "
            f"{len(encoded.without_target)} have no assistant text"
        )
    return encoded


def _had_ended(checkpoint: Checkpoint) -> bool:
    with checkpoint.as_directory() as folder:
        return (Path(folder) / ADAPTER).exists()


def _restore(engine: DeepSpeedEngine, checkpoint: Checkpoint | None) -> int:
    """The step to go on with: 0, or where the last checkpoint was taken."""
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return engine.load(folder)


class _Recorder:
    """Keeps the curve: every step in memory, in the run at each checkpoint, and a note for people each second."""

    def __init__(self, run: Run, steps: int, rank: int) -> None:
        self.run, self.steps, self.first = run, steps, rank == 0
        self.pending: list[StepReport] = []
        self.noted = 0.0

    def add(self, report: StepReport) -> None:
        self.pending.append(report)
        if self.first and time.monotonic() - self.noted > 1:
            self.noted = time.monotonic()
            note = {"step": report.step + 1, "steps": self.steps, "loss": report.loss}
            self.run.store.write_json(f"{self.run.folder}/{PROGRESS}", note)

    def flush(self) -> None:
        if self.first:
            self.run.write_part("curve", self.pending)
        self.pending = []


def _what_was_learned(plan: list[Step], encoded: EncodedSet) -> Metrics:
    return {
        "steps": len(plan),
        "examples": len(encoded.examples),
        "tokens": sum(s.tokens for s in plan),
        "targets": sum(s.targets for s in plan),
        "refused_too_long": len(encoded.too_long),
        "refused_without_target": len(encoded.without_target),
    }


def _sum_over_workers(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64, device=ray.train.torch.get_device())
    torch.distributed.all_reduce(total)
    return float(total)
