"""Cascade's loop as a contender of perf/training.py: with the plain torch engine, or with DeepSpeed.

Run by perf/training.py; needs DeepSpeed only for that way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from training_plain import Stopwatch, read_job, validation_loss
from training_profile import profile_steps

from cascade.config import Base, Lora, Training
from cascade.models.base import load_base
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora
from cascade.training.measures import StepReport
from cascade.training.memory import settle_objects
from cascade.training.packing import Step, plan_steps


def make_plan(job: dict[str, Any], train: list[dict[str, Any]], settings: Lora) -> list[Step]:
    encoded = [EncodedExample(e["id"], tuple(e["ids"]), tuple(e["mask"])) for e in train]
    return plan_steps(encoded, settings, seed=0, row_tokens=job["row_tokens"])


@dataclasses.dataclass(frozen=True)
class Loop:
    """What `cascade.training.loop.run_steps` takes, and the model in it."""

    model: Any
    module: TargetLoss
    engine: Any
    plan: list[Step]
    settings: Lora

    def steps(self) -> Iterator[StepReport]:
        return run_steps(self.engine, self.plan, self.settings)


def make_loop(job: dict[str, Any], train: list[dict[str, Any]]) -> Loop:
    """At a constant learning rate, as its opponents have it."""
    settings = Lora(
        rank=job["rank"],
        learning_rate=job["learning_rate"],
        epochs=job["epochs"],
        tokens_per_step=job["tokens_per_step"],
        max_length=max(len(e["ids"]) for e in train),
        warmup_share=0.0,
    )
    device = torch.device(job["device"])
    loaded = load_base(Base(model=job["model"], dtype=job["dtype"]), device, bits=job["base_bits"])
    model = add_lora(loaded, settings, seed=0)
    module = TargetLoss(model)
    if job["compile"]:
        module.compile_parts()
    return Loop(model, module, make_engine(job, module, settings, device), make_plan(job, train, settings), settings)


def run(job: dict[str, Any], train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Stopwatch:
    """Train for as many steps as the job asks."""
    loop = make_loop(job, train)
    watch = Stopwatch(job)
    by_id = {e["id"]: e for e in train}
    for report in loop.steps():
        if not report.step:
            settle_objects()  # as `train_modifier` does: what it takes longer shall be Ray's and DeepSpeed's alone
        step = loop.plan[report.step]
        examples = [by_id[e.sample_id] for row in step.rows for e in row.examples]
        computed = functools.partial(tokens_computed, loop.module, step)
        if not watch.step(examples, lambda: validation_loss(loop.model, validation, job["device"]), computed):
            break
    if job["profile"]:
        watch.profile = profile_steps(loop.steps(), job["device"])
    return watch


def tokens_computed(module: TargetLoss, step: Step) -> int:
    """How many tokens went through the model: a beginning that examples of a row share goes through it once."""
    return sum(module.inputs(row, torch.device("cpu"))["input_ids"].numel() for row in step.rows)


def make_engine(job: dict[str, Any], module: TargetLoss, settings: Lora, device: torch.device) -> Any:
    if job["way"] != "deepspeed":
        return TorchEngine(module, settings)
    from cascade.training.deepspeed_engine import DeepSpeedEngine

    training = Training(lora=settings, zero_stage=job["zero_stage"])
    return DeepSpeedEngine(module, training, device, getattr(torch, job["dtype"]))


def main() -> None:
    job, train, validation = read_job()
    run(job, train, validation).report()


if __name__ == "__main__":
    main()
