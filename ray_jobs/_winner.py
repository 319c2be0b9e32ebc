"""What is done with the recipe that was chosen: an account of its stages, and a short training of what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from cascade.compression.account import LayerShare, StageCost
from cascade.compression.adapter import AdapterWeights
from cascade.config import Config, PromptStyle
from cascade.tasks import Example
from ray_jobs._context import Job
from ray_jobs._held_out import Conversation
from ray_jobs._search import held_out_answers
from ray_jobs._trial import Groundwork, Trial

ACCOUNT = "account"
"""Table of what each stage of the chosen recipe saved and cost."""
LAYERS = "layers"
"""Table of what is left of every layer."""


@dataclass(frozen=True)
class Recovery:
    """A training of what the chosen one has left.

    Attributes:
        loss, drift: held-out, after it (as of a `Trial`), NaN where it diverged.
        taken: whether the file is the one that it made.
    """

    steps: int
    seconds: float
    loss: float
    drift: float
    taken: bool


@dataclass(frozen=True)
class Finished:
    """The modifier file as it is delivered, and how it came about."""

    data: bytes
    stages: tuple[StageCost, ...]
    layers: tuple[LayerShare, ...]
    recovery: Recovery | None


@dataclass(frozen=True)
class Assigned:
    """What the Ray task is given."""

    config: Config
    style: PromptStyle
    adapter: AdapterWeights
    examples: tuple[Example, ...]
    held_out: tuple[Conversation, ...]
    ground: Groundwork
    winner: Trial
    data: bytes


def finish(
    job: Job,
    adapter: AdapterWeights,
    examples: Sequence[Example],
    style: PromptStyle,
    ground: Groundwork,
    winner: Trial,
) -> Finished:
    """Measure what each stage of the winner saved and cost, and train what it has left if the config says so.

    Both tables, `ACCOUNT` and `LAYERS`, are also written to the run.
    """
    data = job.run.store.read_bytes(f"{job.run.folder}/{winner.file}")
    assigned = Assigned(job.config, style, adapter, tuple(examples), held_out_answers(job), ground, winner, data)
    execution = job.config.execution
    task = ray.remote(_finish).options(num_cpus=execution.cpus_alone, num_gpus=execution.gpus)
    found: Finished = ray.get(task.remote(assigned))
    job.run.write_table(ACCOUNT, StageCost, found.stages)
    job.run.write_table(LAYERS, LayerShare, found.layers)
    return found


def _finish(assigned: Assigned) -> Finished:
    """`account_and_recover`, whose module, with torch and all, is imported where it works."""
    from ray_jobs._finish import account_and_recover

    return account_and_recover(assigned)


def in_words(recovery: Recovery, winner: Trial) -> str:
    """What a recovery brought, for the reason of the choice."""
    if math.isnan(recovery.drift):
        return f"recovery training diverged within {recovery.steps} steps; the file stayed as it was"
    change = f"{recovery.steps} steps of recovery training took {recovery.seconds:.0f} s and brought the drift"
    outcome = "" if recovery.taken else "; the file stayed as it was"
    return f"{change} from {winner.drift:.4f} to {recovery.drift:.4f}{outcome}"
