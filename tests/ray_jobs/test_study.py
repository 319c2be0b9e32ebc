"""What Optuna is told of the search, what it proposes, the study that people look at, and what it needs to begin."""

from __future__ import annotations

import json
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from cascade.artifacts import Run
from cascade.compression.recipe import Limits, matters, recipe_from, search_space
from cascade.config import Compression
from cascade.errors import DataError
from cascade.store import Store
from cascade.training.examples import EncodedSet
from ray_jobs import _bench, _trial
from ray_jobs._study import STUDY, FrontSampler, StudyFile, TrialSearch, distributions
from ray_jobs._trial import STAGES, TRIALS, Stage, Trial, params_key

SPACE = distributions(search_space(Compression()))
LIMITS = Limits(disk=100, resident=200)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(Store(str(tmp_path)), "sums", "search", "x")


def a_search(run: Run, seeds: list[dict[str, Any]] | None = None) -> TrialSearch:
    return TrialSearch(SPACE, seeds or [], FrontSampler(SPACE, matters, seed=0, near_from=99), run, LIMITS)


def ended(params: dict[str, Any], loss: float, size: int, *, share: float = 1.0, resident: int = 50) -> Trial:
    fits = size <= LIMITS.disk and resident <= LIMITS.resident
    return Trial("{}", params_key(params), size, resident, loss, fits, 2.0, share)


def finish(search: TrialSearch, name: str, loss: float, size: int, **more: Any) -> Trial:
    params = search.suggest(name)
    assert params is not None
    trial = ended(params, loss, size, **more)
    search.on_trial_complete(name, {**vars(trial), "config": params})
    return trial


def front(study: Any) -> list[tuple[float, float]]:
    return sorted(tuple(t.values) for t in study.best_trials)


def test_only_whole_trials_that_fit_are_on_the_front(run):
    search = a_search(run)
    trials = [
        finish(search, "whole", 0.5, 90),
        finish(search, "better", 0.4, 95),
        finish(search, "ended", 0.1, 10, share=0.25),
        finish(search, "too large", 0.1, 101),
        finish(search, "too much memory", 0.1, 9, resident=201),
        finish(search, "diverged", math.nan, 8),
    ]
    assert search._ot_study is not None
    mine = search._ot_study
    states = [t.state for t in mine.trials]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.PRUNED] + [TrialState.COMPLETE] * 2 + [TrialState.PRUNED]
    assert mine.trials[3].constraints == pytest.approx({"disk": 0.01, "memory": -0.75})
    assert front(mine) == [(0.4, 95.0), (0.5, 90.0)]

    file = StudyFile(run, SPACE, LIMITS)
    file.add(trials[:3])
    assert front(shown(run)) == [(0.4, 95.0), (0.5, 90.0)], "it is there while the search is at work"
    file.add(trials[3:])
    assert front(shown(run)) == front(mine)
    assert [t.state for t in shown(run).trials] == states
    assert [t.params for t in shown(run).trials] == [json.loads(t.params) for t in trials]
    assert shown(run).trials[2].user_attrs["loss"] == 0.1
    assert shown(run).trials[0].duration.total_seconds() == 2.0


def shown(run: Run) -> Any:
    """The study as `optuna-dashboard` opens it."""
    storage = JournalStorage(JournalFileBackend(run.store.path(f"{run.folder}/{STUDY}")))
    return optuna.load_study(study_name=None, storage=storage)


def test_a_study_that_a_kill_cut_off_is_written_anew(run):
    trial = ended({n: d.low if hasattr(d, "low") else d.choices[0] for n, d in SPACE.items()}, 0.5, 90)
    StudyFile(run, SPACE, LIMITS).add([trial])
    path = run.store.path(f"{run.folder}/{STUDY}")
    with open(path, "ab") as file:
        file.write(b'{"op_code": 4, "worker')
    StudyFile(run, SPACE, LIMITS).add([trial])
    assert len(shown(run).trials) == 1


def test_what_was_measured_after_tunes_last_note_is_claimed_first(run, tmp_path):
    search = a_search(run)
    first = finish(search, "a", 0.5, 90)
    search.save(str(tmp_path / "note"))
    later = [finish(search, name, 0.5, 90) for name in "bc"]
    run.write_part(TRIALS, [first, *later])
    restored = pickle.loads(pickle.dumps(a_search(run)))
    restored.restore(str(tmp_path / "note"))
    assert [params_key(restored.suggest(name)) for name in "de"] == [t.params for t in later]
    assert params_key(restored.suggest("f")) not in {t.params for t in [first, *later]}


def test_later_trials_are_neighbours_of_the_front():
    sampler = FrontSampler(SPACE, matters, seed=0, near_from=12)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(12):
        trial = study.ask(SPACE)
        study.tell(trial, [trial.params["balance"], trial.params["mlp"]])
    parents = [t.params for t in study.best_trials]
    recipes = {recipe_from(p).model_dump_json() for p in parents}
    near = []
    for _ in range(30):
        params = study.ask(SPACE).params
        near.append(min(sum(params[n] != parent[n] for n in SPACE) for parent in parents))
        recipe = recipe_from(params).model_dump_json()
        assert recipe not in recipes, "none is tried twice"
        recipes.add(recipe)
    assert sum(n <= 8 for n in near) >= 18, "two thirds share parameters with a point of the front"


def test_without_a_front_there_is_nothing_to_be_near():
    study = optuna.create_study(directions=["minimize"] * 2, sampler=FrontSampler(SPACE, matters, seed=0, near_from=0))
    assert study.ask(SPACE).params.keys() == SPACE.keys()


def test_what_does_not_fit_holds_back_nothing_that_does(run):
    ground = _trial.Groundwork({}, 4.0, np.full(8, 0.05, np.float32))
    setting: Any = SimpleNamespace(run=run, config=SimpleNamespace(compression=Compression()), ground=ground)

    def measure(key: str, loss: float, size: int, *, fits: bool) -> float:
        bench: Any = SimpleNamespace(
            growing=lambda shares: ((s, np.full(round(8 * s), loss, np.float32)) for s in shares)
        )
        return _bench._loss(setting, key, bench, size, lambda: run.read(STAGES, Stage), hopeless=not fits)[0]

    assert [measure(key, 0.06, 10, fits=False) for key in "abc"] == [0.25] * 3
    assert measure("d", 0.2, 20, fits=True) == 1.0


def test_a_search_with_nothing_to_measure_on_says_why(monkeypatch):
    config: Any = SimpleNamespace(training=SimpleNamespace(lora=SimpleNamespace(max_length=64)))
    monkeypatch.setattr(_bench, "encode_conversations", lambda *_, **__: EncodedSet((), (), ("a", "b")))
    monkeypatch.setattr(_bench, "end_token_ids", lambda _: frozenset())
    bench: Any = SimpleNamespace(tokenizer=None)
    with pytest.raises(DataError, match=r"2 are longer than training\.lora\.max_length = 64 tokens"):
        _bench.packed_rows(bench, config, SimpleNamespace(system=None), [])  # type: ignore[arg-type]
