"""What is computed of the recipe that was chosen, in a Ray task with a base."""

from __future__ import annotations

import logging
import math
import time
from itertools import cycle, islice

from cascade.compression.account import StageCost, layer_shares, stages_of
from cascade.compression.adapter import fp16_bytes
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import decode_modifier, encode_modifier, publishing_bytes
from cascade.compression.packed import compress
from cascade.compression.recipe import limits
from cascade.compression.recover import recover
from cascade.errors import DataError
from cascade.models.base import end_token_ids
from cascade.training.examples import encode_examples
from cascade.training.layout import layout_for, most_tokens
from cascade.training.measures import mean
from cascade.training.packing import Step, plan_steps
from ray_jobs._bench import Bench, load_bench
from ray_jobs._winner import Assigned, Finished, Recovery


def account_and_recover(assigned: Assigned) -> Finished:
    """What each stage of the chosen recipe saved and cost; and its file, trained further if the config says so."""
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
