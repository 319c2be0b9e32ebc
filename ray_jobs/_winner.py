"""What is done with the recipe that was chosen: an account of its stages, and a short training of what is left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import ray

from cascade.compression.account import LayerShare, StageCost, layer_shares, stages_of
from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import decode_modifier, encode_modifier, publishing_bytes
from cascade.compression.packed import compress
from cascade.compression.recipe import limits
from cascade.compression.recover import recover
from cascade.config import Config, PromptStyle
from cascade.errors import DataError
from cascade.models.base import end_token_ids
from cascade.tasks import Example
from cascade.training.examples import encode_examples
from cascade.training.layout import layout_for, most_tokens
from cascade.training.measures import mean
from cascade.training.packing import Step, plan_steps
from ray_jobs._context import Job
from ray_jobs._held_out import Conversation
from ray_jobs._search import held_out_answers
from ray_jobs._trial import Bench, Groundwork, Trial, load_bench

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
    config = assigned.config
    bench = load_bench(config.model_dump_json(), assigned.style, assigned.held_out, config.execution.cpus_alone)
    compressed = decode_modifier(assigned.data)[1]
    stages, data, recovery = _stages(assigned, bench, compressed), assigned.data, None
    if config.compression.recovery_steps:
        trained, recovery = _recover(assigned, bench, compressed)
        if recovery.taken:
            compressed, data = trained, encode_modifier(trained)
            size, loss = bench.slot.bytes_for(trained), recovery.loss
            stages.append(StageCost("recovered", len(data), size, loss))
    return Finished(data, tuple(stages), tuple(layer_shares(assigned.adapter, compressed)), recovery)


def _stages(assigned: Assigned, bench: Bench, compressed: CompressedAdapter) -> list[StageCost]:
    """From the adapter as trained to the file; the losses of both ends are known."""
    adapter, winner, ground = assigned.adapter, assigned.winner, assigned.ground
    stages = [StageCost("trained", fp16_bytes(adapter), bench.slot.bytes_for(adapter), ground.trained_loss)]
    for name, recipe in stages_of(compressed.recipe)[:-1]:
        cut = compress(adapter, recipe, ground.calibration)
        stages.append(StageCost(name, len(encode_modifier(cut)), bench.slot.bytes_for(cut), bench.loss(cut)))
    last = stages_of(compressed.recipe)[-1][0]
    return [*stages, StageCost(last, winner.disk_bytes, winner.resident_bytes, winner.loss)]


def _recover(assigned: Assigned, bench: Bench, compressed: CompressedAdapter) -> tuple[CompressedAdapter, Recovery]:
    """Train on the training examples; taken if it is nearer to the adapter as trained and keeps the size limit."""
    began, config = time.perf_counter(), assigned.config
    wanted, lora = config.compression, config.training.lora
    settings = lora.model_copy(update={"learning_rate": wanted.recovery_rate * lora.learning_rate})
    plan = _plan(assigned, bench)
    bench.slot.clear()
    try:
        trained, _ = recover(bench.loaded.model, compressed, assigned.adapter, plan, settings)
    except DataError as error:  # it has diverged; what was chosen is as good as it was
        logging.getLogger(__name__).warning("recovery: %s", error)
        return compressed, Recovery(len(plan), time.perf_counter() - began, math.nan, math.nan, False)
    losses = bench.losses_of(trained)
    loss, drift = mean(losses), assigned.ground.drift(losses)
    published = len(encode_modifier(trained)) + publishing_bytes(tuple(t.name for t in config.tiers))
    fits = published <= limits(assigned.adapter, wanted).disk
    taken = fits and drift < assigned.winner.drift
    return trained, Recovery(len(plan), time.perf_counter() - began, loss, drift, taken)


def _plan(assigned: Assigned, bench: Bench) -> list[Step]:
    """As many steps as are wanted, as the training made them; from the beginning again where it had fewer."""
    config, loaded = assigned.config, bench.loaded
    encoded = encode_examples(
        assigned.examples,
        loaded.tokenizer,
        max_length=config.training.lora.max_length,
        system=assigned.style.system,
        end_ids=end_token_ids(loaded),
    )
    row_tokens = config.execution.row_tokens or most_tokens(layout_for(loaded.model))
    plan = plan_steps(encoded.examples, config.training.lora, config.seed, row_tokens=row_tokens)
    return list(islice(cycle(plan), config.compression.recovery_steps))


def in_words(recovery: Recovery, winner: Trial) -> str:
    """What a recovery brought, for the reason of the choice."""
    if math.isnan(recovery.drift):
        return f"recovery training diverged within {recovery.steps} steps; the file stayed as it was"
    change = f"{recovery.steps} steps of recovery training took {recovery.seconds:.0f} s and brought the drift"
    outcome = "" if recovery.taken else "; the file stayed as it was"
    return f"{change} from {winner.drift:.4f} to {recovery.drift:.4f}{outcome}"
