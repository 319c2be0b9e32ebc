"""The trials of the pruning search: what each is given, what it leaves, and which of them count."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import tune
from ray.tune.result import DONE

from cascade.artifacts import Run
from cascade.compression.adapter import AdapterWeights
from cascade.compression.pareto import front
from cascade.compression.recipe import Limits
from cascade.compression.truncate import Calibration
from cascade.config import Compression, Config, PromptStyle
from cascade.training.measures import mean
from ray_jobs._follow import Follower
from ray_jobs._held_out import Conversation

TRIALS = "trials"
"""Table of the recipes that were tried; each trial adds its own row."""
STAGES = "stages"
"""Table of how each trial that fits stood after a part of the held-out rows."""
FRONT = "front"
"""Folder of the modifier files of the Pareto front."""


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
        from ray_jobs._bench import run_trial  # with torch and all, which the driver has no use for

        return dataclasses.asdict(run_trial(self.params, self.setting, self._stages_so_far)) | {DONE: True}

    def _stages_so_far(self) -> list[Stage]:
        self.seen += self.stages.news()
        return self.seen


def params_key(params: Mapping[str, Any]) -> str:
    """A point of the search space as text, as `Trial.params` has it."""
    return json.dumps(params, sort_keys=True)
