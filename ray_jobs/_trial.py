"""One trial of the pruning search: compress by a recipe, then measure on ever more of the held-out rows.

A trial that is behind after a quarter or half of the rows ends there: it goes on only if it is among the better half of
all that were measured as far, in the order of non-dominated sorting by bytes and loss. That is asynchronous successive
halving for two objectives (MO-ASHA, Schmucker et al., arXiv:2106.12639). One that keeps the wanted share of the gain is
measured whole in any case: between such, a quarter of the rows is too few to tell. One that is too large ends after the
first part, and nothing is compared with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import tune
from ray.tune.result import DONE

from cascade.artifacts import Run
from cascade.compression.adapter import AdapterWeights
from cascade.compression.apply import LoraSlot
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import encode_modifier, publishing_bytes
from cascade.compression.pareto import front, leaders
from cascade.compression.recipe import Limits, Room, compress, recipe_from
from cascade.compression.truncate import Calibration
from cascade.config import Compression, Config, PromptStyle
from cascade.models.base import LoadedBase, end_token_ids, load_base
from cascade.training.examples import encode_conversations
from cascade.training.loop import TargetLoss, target_losses
from cascade.training.measures import mean
from cascade.training.packing import Row, pack
from ray_jobs._evaluate import limit_process
from ray_jobs._follow import Follower
from ray_jobs._held_out import Conversation

TRIALS = "trials"
"""Table of the recipes that were tried; each trial adds its own row."""
STAGES = "stages"
"""Table of how each trial that fits stood after a part of the held-out rows."""
FRONT = "front"
"""Folder of the modifier files of the Pareto front."""
SHARES = (0.25, 0.5)
"""Of the held-out rows, after which a trial may end."""
_KEEP = 0.5


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried; also what Tune shows of it.

    Attributes:
        recipe: the recipe as JSON text; params: the point of the search space that it came from, the same.
        disk_bytes: exact size of its modifier file; resident_bytes: what serving holds of it.
        fits: whether both keep their limit, also once the file is published with its scores and teachers.
        loss: mean held-out loss per target token, nats; of a trial that ended early what it would come to over all
            rows (`Groundwork.estimate`).
        drift: how far it is from the adapter as trained, over the rows that were measured (`Groundwork.drift`);
            infinite where nobody measured it.
        seconds: of compressing and measuring, without what Tune needs around it.
        share: of the held-out rows that were measured; below 1 the trial ended early.
    """

    recipe: str
    params: str
    disk_bytes: int
    resident_bytes: int
    loss: float
    fits: bool
    seconds: float
    share: float = 1.0
    drift: float = math.inf

    @property
    def file(self) -> str:
        """Of the modifier file, inside the run; kept for the Pareto front."""
        return f"{FRONT}/{hashlib.sha256(self.params.encode()).hexdigest()[:12]}.safetensors"


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Of the whole trials that fit, those that no other one beats in both bytes and loss; smallest first."""
    return front(_eligible(trials), lambda t: (t.disk_bytes, t.loss))


def nearest_front(trials: Sequence[Trial]) -> list[Trial]:
    """The same of bytes and drift: the last one is the nearest to the adapter as trained."""
    return front(_eligible(trials), lambda t: (t.disk_bytes, t.drift))


def _eligible(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.fits and t.share == 1]


def kept_files(trials: Sequence[Trial], wanted: Compression) -> set[str]:
    """Of the modifier files that a search wrote, those of the Pareto front and of what may be chosen beside it."""
    nearest = nearest_front(trials) if wanted.choose == "best" else []
    return {t.file for t in (*pareto_front(trials), *nearest)}


@dataclass(frozen=True)
class Groundwork:
    """What is measured once before the search.

    Attributes:
        calibration: how much each component of the adapter matters on examples that it was trained on.
        base_loss: held-out loss of the bare base, nats per target token.
        trained: loss of every held-out target with the adapter as trained, nats, in the order of `Bench.rows`.
    """

    calibration: Calibration
    base_loss: float
    trained: NDArray[np.float32]

    @property
    def trained_loss(self) -> float:
        """Held-out loss with the adapter as trained, nats per target token."""
        return mean(self.trained)

    def gain(self, loss: float) -> float:
        """The share of the improvement in held-out loss that is left at a loss; NaN where there was none."""
        gained = self.base_loss - self.trained_loss
        return (self.base_loss - loss) / gained if gained > 0 else float("nan")

    def estimate(self, losses: NDArray[np.float32]) -> float:
        """The loss over all held-out rows of what has these losses in the first part of them.

        Some rows are harder than others, for the adapter as trained too: what a candidate has lost against it on these
        rows is what it is taken to lose on all.
        """
        return mean(losses) + self.trained_loss - mean(self.trained[: len(losses)])

    def drift(self, losses: NDArray[np.float32]) -> float:
        """Mean change of a target's log-probability (nats, either way) against the adapter as trained.

        Loss and verdicts tell little between candidates that keep nearly all: a compressed adapter is less sure of
        itself, which can lower the loss while answers change, and of a few hundred verdicts few differ. How far every
        single probability has moved tells more (Dutta et al., arXiv:2407.09141).
        """
        return mean(np.abs(losses - self.trained[: len(losses)]))


@dataclass(frozen=True)
class Setting:
    """What all trials of a search share: one copy in Ray's object store.

    Attributes:
        held_out: validation tasks with their reference answers.
        known: by `Trial.params`, what was measured before the search was last interrupted. Tune notes its state every
            few seconds only: what ended after the last note is proposed again.
    """

    config: Config
    run: Run
    style: PromptStyle
    adapter: AdapterWeights
    held_out: tuple[Conversation, ...]
    ground: Groundwork
    limits: Limits
    known: Mapping[str, Trial]


@dataclass(frozen=True)
class Stage:
    """How a trial stood after a part of the held-out rows.

    Attributes:
        params: of the `Trial`.
        share: of the rows, above 0 and below 1.
        loss: over these rows, nats per target token.
    """

    params: str
    share: float
    disk_bytes: int
    loss: float


class TrialRunner(tune.Trainable):
    """Tune's view of a trial: one step and done. Its actor goes on to the next trial with the same base.

    A class rather than a function: a function's trial costs a thread, and a second call that says it has returned.
    """

    def setup(self, config: dict[str, Any], setting: Setting | None = None) -> None:
        assert setting is not None
        self.params, self.setting = config, setting
        self.stages = Follower(setting.run, STAGES, Stage)
        self.seen: list[Stage] = []

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.params = new_config
        return True

    def step(self) -> dict[str, Any]:
        return dataclasses.asdict(run_trial(self.params, self.setting, self._stages_so_far)) | {DONE: True}

    def _stages_so_far(self) -> list[Stage]:
        self.seen += self.stages.news()
        return self.seen


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


def params_key(params: Mapping[str, Any]) -> str:
    """A point of the search space as text, as `Trial.params` has it."""
    return json.dumps(params, sort_keys=True)


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
