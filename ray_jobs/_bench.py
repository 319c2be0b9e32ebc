"""What the pruning search computes with a base: its groundwork, and trials.

A trial compresses the adapter by a recipe and measures that on ever more of the held-out rows. One that is behind after
a quarter or half of the rows ends there: it goes on only if it is among the better half of all that were measured as
far, in the order of non-dominated sorting by bytes and loss. That is asynchronous successive halving for two objectives
(MO-ASHA, Schmucker et al., arXiv:2106.12639). One that keeps the wanted share of the gain is measured whole in any
case: between such, a quarter of the rows is too few to tell. One that is too large ends after the first part, and
nothing is compared with it.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade.compression.adapter import AdapterWeights
from cascade.compression.apply import LoraSlot
from cascade.compression.calibrate import calibrate
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import encode_modifier, publishing_bytes
from cascade.compression.pareto import leaders
from cascade.compression.recipe import Room, compress, recipe_from
from cascade.config import Config, PromptStyle
from cascade.models.base import LoadedBase, end_token_ids, load_base
from cascade.training.examples import encode_conversations
from cascade.training.loop import TargetLoss, target_losses
from cascade.training.measures import mean
from cascade.training.packing import Row, pack
from ray_jobs._held_out import Conversation
from ray_jobs._share import limit_process
from ray_jobs._trial import STAGES, TRIALS, Groundwork, Setting, Stage, Trial, params_key

SHARES = (0.25, 0.5)
"""Of the held-out rows, after which a trial may end."""
_KEEP = 0.5

StagesSoFar = Callable[[], Sequence[Stage]]


def run_trial(params: dict[str, Any], setting: Setting, stages: StagesSoFar) -> Trial:
    """Measure a recipe, and note it in the run, unless it was measured before the search was last interrupted.

    Args:
        stages: how all trials that fit stood so far.
    """
    key = params_key(params)
    trial = setting.known.get(key)
    if trial is None:
        trial = _measure(params, setting, key, stages)
        setting.run.write_part(TRIALS, [trial])
    return trial


def groundwork(
    config: Config,
    style: PromptStyle,
    adapter: AdapterWeights,
    examples: tuple[Conversation, ...],
    held_out: tuple[Conversation, ...],
) -> Groundwork:
    """Calibrate an adapter on some of its examples, and measure the held-out rows with and without it."""
    bench = load_bench(config.model_dump_json(), style, held_out, config.execution.cpus_alone)
    rows = packed_rows(bench.loaded, config, style, examples)
    step = max(1, len(rows) // config.compression.calibration_rows)
    calibration = calibrate(bench.loaded.model, adapter, rows[::step][: config.compression.calibration_rows])
    base_loss = bench.loss(None)
    return Groundwork(calibration, base_loss, bench.losses_of(adapter))


def _measure(params: dict[str, Any], setting: Setting, key: str, stages: StagesSoFar) -> Trial:
    config = setting.config
    bench = load_bench(config.model_dump_json(), setting.style, setting.held_out, config.execution.cpus_per_actor)
    began = time.perf_counter()
    room = Room.of(setting.adapter, setting.limits, bench.slot.dtype.itemsize, int8=bench.slot.int8)
    recipe = recipe_from(params, room)
    compressed = compress(setting.adapter, recipe, setting.ground.calibration)
    data, resident = encode_modifier(compressed), bench.slot.bytes_for(compressed)
    published = len(data) + publishing_bytes(tuple(t.name for t in setting.config.tiers))
    fits = published <= setting.limits.disk and resident <= setting.limits.resident
    bench.slot.fill(compressed)
    share, loss, drift = _loss(setting, key, bench, len(data), stages, hopeless=not fits)
    seconds = time.perf_counter() - began
    trial = Trial(recipe.model_dump_json(), key, len(data), resident, loss, fits, seconds, share, drift)
    if fits and share == 1:
        setting.run.store.write_bytes(f"{setting.run.folder}/{trial.file}", data)
    return trial


def _loss(
    setting: Setting, key: str, bench: Bench, size: int, stages: StagesSoFar, *, hopeless: bool
) -> tuple[float, float, float]:
    """Share of the held-out rows that the trial got to, its loss over all of them, if need be as estimated, and its
    drift over those."""
    shares, ground = SHARES if setting.config.compression.halving else (), setting.ground
    for share, losses in bench.growing((*shares, 1.0)):
        if share == 1:
            return share, mean(losses), ground.drift(losses)
        estimate = ground.estimate(losses)
        if not hopeless:  # no stage: nothing that fits is behind it
            setting.run.write_part(STAGES, [Stage(key, share, size, mean(losses))])
            so_far = [s for s in stages() if s.share == share]
            wanted = ground.gain(estimate) >= setting.config.compression.keep_gain
            if wanted or _is_promoted(key, so_far):
                continue
        return share, estimate, ground.drift(losses)
    return 1.0, math.nan, math.nan


def _is_promoted(key: str, stages: Sequence[Stage]) -> bool:
    """Whether a trial is among the better ones of those that were measured as far."""
    return any(s.params == key for s in leaders(stages, lambda s: (s.disk_bytes, s.loss), _KEEP))


@dataclass(frozen=True)
class Bench:
    """A base with a slot, and the rows on which loss is measured: any first part of them is a fair sample."""

    loaded: LoadedBase
    slot: LoraSlot
    rows: list[Row]

    def loss(self, adapter: AdapterWeights | CompressedAdapter | None) -> float:
        """Held-out loss with an adapter, or of the bare base; nats per target token."""
        return mean(self.losses_of(adapter))

    def losses_of(self, adapter: AdapterWeights | CompressedAdapter | None) -> NDArray[np.float32]:
        """Of every held-out target, with an adapter or of the bare base; nats, shape (targets,)."""
        if adapter is None:
            self.slot.clear()
        else:
            self.slot.fill(adapter)
        return self.losses(self.rows)

    def growing(self, shares: Sequence[float]) -> Iterator[tuple[float, NDArray[np.float32]]]:
        """With what is in the slot, the losses in ever more of the rows: each share that adds some, and all so far."""
        found, begun = np.empty(0, np.float32), 0
        for share in shares:
            if rows := self.rows[begun : round(share * len(self.rows))]:
                begun += len(rows)
                found = np.concatenate([found, self.losses(rows)])
                yield share, found

    def losses(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Of every target of some rows, with what is in the slot; nats, shape (targets,)."""
        return target_losses(TargetLoss(self.loaded.model), rows, self.loaded.device)


@functools.lru_cache(maxsize=1)
def load_bench(config_json: str, style: PromptStyle, held_out: tuple[Conversation, ...], cpus: float) -> Bench:
    config = Config.model_validate(json.loads(config_json))
    limit_process(config.execution, cpus)
    loaded = load_base(config.base)
    rows = packed_rows(loaded, config, style, held_out)
    slot = LoraSlot(loaded.model, int8=config.serving.weights == "int8")
    return Bench(loaded, slot, [*rows[::4], *rows[2::4], *rows[1::2]])


def packed_rows(
    loaded: LoadedBase, config: Config, style: PromptStyle, conversations: Sequence[Conversation]
) -> list[Row]:
    """Packed rows of the conversations that have something to learn and are not too long.

    Raises:
        DataError: there are none.
    """
    longest = config.training.lora.max_length
    encoded = encode_conversations(
        conversations,
        loaded.tokenizer,
        max_length=longest,
        system=style.system,
        end_ids=end_token_ids(loaded),
    )
    encoded.check(f"training.lora.max_length = {longest}")
    return pack(encoded.examples, longest)
