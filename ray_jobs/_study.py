"""Optuna's side of the pruning search: what proposes the trials, what it is told of them, and a study to look at."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from cascade.artifacts import Run
from cascade.compression.recipe import Limits
from ray_jobs._trial import TRIALS, Trial

STUDY = "study.journal"
"""The search as an Optuna study, for `optuna-dashboard …/study.journal`."""
Space = Mapping[str, tuple[Any, ...]]
"""As `cascade.compression.recipe.search_space` gives it."""
Distributions = dict[str, BaseDistribution]
Matters = Callable[[Mapping[str, Any]], set[str]]
_OBJECTIVES = ["loss", "disk_bytes"]
_AT_RANDOM = 4
"""Trials before the sampler models anything; the points known to be good are usually more."""
_MOVED = {FloatDistribution: 0.4, CategoricalDistribution: 0.15}
"""Share of the parameters, by their kind, in which a neighbour differs from the point of the front beside it."""
_FAR = 0.15
"""Standard deviation of a moved number, as a share of its range."""


def distributions(space: Space) -> Distributions:
    """The library's plain description of the search space in Optuna's terms."""
    kinds: dict[str, Callable[..., BaseDistribution]] = {
        "uniform": FloatDistribution,
        "choice": CategoricalDistribution,
    }
    return {name: kinds[kind](*arguments) for name, (kind, *arguments) in space.items()}


class FrontSampler(TPESampler):
    """Proposes by TPE at first, and later on the neighbours of points of the front.

    With a dozen parameters and a few dozen trials, models of which values are good learn little more than which method
    and number format are; what is left to gain then lies beside what was found.

    Args:
        matters: the names of the parameters that make a difference beside the values of the others.
        near_from: the number of the first trial that may be a neighbour; of those from there on every third is TPE's.
    """

    def __init__(self, space: Distributions, matters: Matters, *, seed: int, near_from: int) -> None:
        super().__init__(seed=seed, n_startup_trials=_AT_RANDOM)
        self._space, self._matters, self._near_from = space, matters, near_from

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Distributions:
        late = trial.number - self._near_from
        return self._space if late >= 0 and late % 3 != 2 else {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Distributions) -> dict[str, Any]:
        front = study.best_trials if search_space else []
        if not front:
            return {}
        rng = self._rng.rng
        params = dict(front[rng.randint(len(front))].params)
        names = sorted(self._matters(params))
        moved = {n for n in names if rng.random_sample() < _MOVED[type(search_space[n])]} or {
            names[rng.randint(len(names))]
        }
        return params | {name: _beside(params[name], search_space[name], rng) for name in sorted(moved)}


def _beside(value: Any, distribution: BaseDistribution, rng: np.random.RandomState) -> Any:
    """Another choice, or a number not far away, mirrored at the ends of its range."""
    if isinstance(distribution, CategoricalDistribution):
        others = [choice for choice in distribution.choices if choice != value]
        return others[rng.randint(len(others))] if others else value
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    at = abs((value - low) / (high - low) + _FAR * rng.standard_normal()) % 2
    return min(high, max(low, low + (high - low) * min(at, 2 - at)))


def violations(trial: Trial, limits: Limits) -> dict[str, float]:
    """By how much, as a share, a trial is beyond each limit of size; what keeps it is at most 0."""
    return {"disk": trial.disk_bytes / limits.disk - 1, "memory": trial.resident_bytes / limits.resident - 1}


def is_whole(trial: Trial) -> bool:
    """Whether a trial's loss may be compared with others': it is a number, over all of the rows."""
    return trial.share == 1 and math.isfinite(trial.loss)


class TrialSearch(OptunaSearch):
    """What Tune asks for recipes. Beside `OptunaSearch` it knows constraints, trials that ended early, and the table.

    Trials that ended early are told as pruned, for their losses are estimates. Sizes beyond a limit are constraints.
    """

    def __init__(
        self, space: Distributions, seeds: list[dict[str, Any]], sampler: TPESampler, run: Run, limits: Limits
    ) -> None:
        super().__init__(
            space=space, metric=_OBJECTIVES, mode=["min", "min"], points_to_evaluate=seeds, sampler=sampler
        )
        self._run, self._limits = run, limits

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result and trial_id not in self._completed_trials:
            trial = Trial(**{name: result[name] for name in Trial.__dataclass_fields__})
            for name, value in violations(trial, self._limits).items():
                self._ot_trials[trial_id].set_constraint(name, value)
            result = result if is_whole(trial) else None  # without values it counts as pruned
        super().on_trial_complete(trial_id, result, error)

    def restore(self, checkpoint_path: str) -> None:
        """Go on where a killed search was last noted; what it measured since is proposed first, which costs nothing.

        The sampler would draw the same numbers again, and with them propose the same once more.
        """
        super().restore(checkpoint_path)
        assert self._ot_study is not None
        for trial in self._run.read(TRIALS, Trial):
            self._ot_study.enqueue_trial(json.loads(trial.params), skip_if_exists=True)
        self._ot_study.sampler.reseed_rng()


class StudyFile:
    """The finished trials of a search as an Optuna study in a journal file, which grows as they end.

    It is not the study that proposes: that one is kept and restored by Tune together with Tune's own state, so that a
    kill cannot leave the two at odds. Where the store is no file system the file is written whole by `put`.
    """

    def __init__(self, run: Run, space: Distributions, limits: Limits) -> None:
        self._run, self._space, self._limits = run, space, limits
        local = run.store.is_local
        folder = Path(run.store.path(run.folder)) if local else Path(tempfile.mkdtemp(prefix="cascade-study-"))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / STUDY
        for left in (self._file, self._file.with_name(f"{STUDY}.lock")):  # of a search that was killed
            left.unlink(missing_ok=True)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(self._file))),
                study_name=run.name,
                directions=["minimize", "minimize"],
            )
            self._study.set_metric_names(["held-out loss", "bytes on disk"])

    def add(self, trials: Sequence[Trial]) -> None:
        """Note trials that have ended."""
        for trial in trials:
            self._study.add_trial(self._frozen(trial))

    def _frozen(self, trial: Trial) -> FrozenTrial:
        whole = is_whole(trial)
        noted = ("recipe", "disk_bytes", "resident_bytes", "fits", "share", "loss")
        frozen = optuna.trial.create_trial(
            state=TrialState.COMPLETE if whole else TrialState.PRUNED,
            params=json.loads(trial.params),
            distributions=self._space,
            values=[trial.loss, float(trial.disk_bytes)] if whole else None,
            user_attrs={name: getattr(trial, name) for name in noted},
            constraints=violations(trial, self._limits),
        )
        assert frozen.datetime_complete is not None
        frozen.datetime_start = frozen.datetime_complete - timedelta(seconds=trial.seconds)
        return frozen

    def put(self) -> None:
        """Bring the file to a store that is no file system."""
        if not self._run.store.is_local:
            self._run.store.write_bytes(f"{self._run.folder}/{STUDY}", self._file.read_bytes())
