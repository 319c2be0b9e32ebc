"""How far a trial of the pruning search goes, what its loss then means, and what it reads on the way."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forged import tiny

from cascade.artifacts import Run
from cascade.compression.format import disk_bytes
from cascade.compression.methods import Recipe, Truncate
from cascade.compression.packed import compress, resident_bytes
from cascade.compression.recipe import Limits
from cascade.config import Compression
from cascade.store import Store
from cascade.training.measures import mean
from ray_jobs import _bench
from ray_jobs._bench import Bench, _loss, run_trial
from ray_jobs._follow import Follower
from ray_jobs._progress import polling
from ray_jobs._trial import STAGES, TRIALS, Groundwork, Stage, Trial

LEVEL = Groundwork({}, 4.0, np.full(80, 0.05, np.float32))
"""Of rows that are all as hard."""


class Rows(Bench):
    """Rows of given losses."""

    def __init__(self, losses: list[float]) -> None:
        rows: Any = [SimpleNamespace(targets=10, loss=loss) for loss in losses]
        super().__init__(loaded=None, slot=None, rows=rows)  # type: ignore[arg-type]

    def losses(self, rows: Any) -> Any:
        self.__dict__["measured"] = self.__dict__.get("measured", 0) + len(rows)
        return np.repeat(np.float32([row.loss for row in rows]), 10)


@pytest.fixture
def setting(tmp_path):
    def make(*, halving: bool, ground: Groundwork = LEVEL) -> Any:
        run = Run(Store(str(tmp_path)), "sums", "search", f"halving-{halving}")
        config = SimpleNamespace(compression=Compression(halving=halving))
        return SimpleNamespace(run=run, config=config, ground=ground, known={})

    return make


def measure(setting: Any, key: str, loss: float, size: int, *, hopeless: bool = False) -> tuple[float, float, int]:
    bench = Rows([loss] * 8)
    share, found, drift = _loss(setting, key, bench, size, lambda: setting.run.read(STAGES, Stage), hopeless=hopeless)
    assert drift == pytest.approx(abs(loss - 0.05), abs=1e-6)
    return share, pytest.approx(found), bench.__dict__["measured"]


def test_a_trial_that_is_behind_ends_after_a_quarter(setting):
    halved = setting(halving=True)
    assert measure(halved, "good", 0.2, 100) == (1.0, 0.2, 8)
    assert measure(halved, "better", 0.1, 90) == (1.0, pytest.approx(0.1), 8)
    assert measure(halved, "worst", 3.0, 200) == (0.25, 3.0, 2)
    assert measure(halved, "smallest", 2.0, 10)[0] == 1.0, "nothing beats it in both"


def test_a_trial_that_could_be_chosen_is_measured_whole(setting):
    """A quarter of the rows is too few to tell which of those that keep the gain is better."""
    halved = setting(halving=True)
    assert [measure(halved, f"loss {loss}", loss, 10)[0] for loss in (0.05, 0.06, 0.07, 0.08)] == [1.0] * 4
    assert measure(halved, "keeps too little", 0.12, 10)[0] == 0.25
    assert measure(halved, "does not fit", 0.01, 5, hopeless=True)[0] == 0.25


def test_without_halving_every_trial_is_measured_whole(setting):
    whole = setting(halving=False)
    for key, loss, size in (("good", 0.2, 100), ("better", 0.1, 90), ("worst", 3.0, 200)):
        assert measure(whole, key, loss, size) == (1.0, pytest.approx(loss), 8)
    assert measure(whole, "too large", 3.0, 300, hopeless=True)[0] == 1.0
    assert whole.run.read(STAGES, Stage) == []


def test_what_does_not_fit_ends_at_the_first_look(setting):
    assert measure(setting(halving=True), "too large", 0.1, 10, hopeless=True) == (0.25, pytest.approx(0.1), 2)


def test_a_trial_that_ended_is_compared_with_whole_ones_by_what_it_lost_against_the_adapter(setting):
    hard_first = [2.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    trained = Rows(hard_first)
    ground = Groundwork({}, 4.0, trained.losses(trained.rows))
    assert ground.trained_loss == pytest.approx(0.575)
    halved = setting(halving=True, ground=ground)
    bench = Rows([loss + 0.3 for loss in hard_first])
    share, loss, drift = _loss(halved, "x", bench, 9, lambda: halved.run.read(STAGES, Stage), hopeless=True)
    assert (share, drift) == (0.25, pytest.approx(0.3))
    assert loss == pytest.approx(0.875), "2.3 on the hard rows is 0.3 more than the adapter has, not 1.7 more"
    assert bench.losses(bench.rows).mean() == pytest.approx(loss)


def test_parts_without_rows_are_no_stages():
    found = [(share, mean(losses)) for share, losses in Rows([1.0, 3.0]).growing((0.25, 0.5, 1.0))]
    assert found == [(0.5, 1.0), (1.0, 2.0)]


def test_drift_counts_changes_of_either_sign():
    """Which cancel out in the loss, and are changes of the answers all the same."""
    ground = Groundwork({}, 4.0, np.float32([0.5, 0.5, 1.0, 1.0]))
    assert ground.drift(np.float32([0.9, 0.1])) == pytest.approx(0.4)
    assert ground.drift(ground.trained) == 0.0


def test_what_was_measured_before_is_neither_measured_nor_noted_again(setting):
    whole = setting(halving=False)
    trial = Trial("{}", '{"size": 0.1}', 10, 10, 0.5, True, 1.0)
    whole.known = {trial.params: trial}
    assert run_trial({"size": 0.1}, whole, list) is trial
    assert whole.run.read(TRIALS, Trial) == []


@pytest.mark.parametrize(("weights", "room"), [("full", 0), ("int8", 0), ("full", 300)])
def test_what_is_counted_and_measured_is_the_form_that_is_served(setting, monkeypatch, weights, room):
    """8 bits where the base is served so, and the file with the scores and teachers that it is published with."""
    adapter = tiny()
    model = torch.nn.Module()
    for name, pair in adapter.layers.items():
        *parents, last = name.split(".")
        node = model
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        node.add_module(last, torch.nn.Linear(pair.a.shape[1], pair.b.shape[0], dtype=torch.bfloat16))
    monkeypatch.setattr(_bench, "load_base", lambda base: SimpleNamespace(model=model))
    monkeypatch.setattr(_bench, "limit_process", lambda *_: None)
    monkeypatch.setattr(_bench, "packed_rows", lambda *_: [])
    monkeypatch.setattr(_bench, "_loss", lambda *_, **__: (1.0, 0.1, 0.2))
    config = SimpleNamespace(
        serving=SimpleNamespace(weights=weights),
        base=None,
        tiers=[SimpleNamespace(name="answer-key")] * 3,
        execution=SimpleNamespace(cpus_per_actor=1),
        model_dump_json=lambda: f'{{"weights": "{weights}"}}',
    )
    monkeypatch.setattr(_bench.Config, "model_validate", lambda _: config)
    task = setting(halving=False)
    task.config, task.adapter, task.style, task.held_out = config, adapter, None, ()
    recipe = Recipe(truncate=Truncate(keep=1.0), values="int8")
    monkeypatch.setattr(_bench, "recipe_from", lambda *_: recipe)
    compressed = compress(adapter, recipe)
    size, held = disk_bytes(compressed), resident_bytes(compressed, int8=weights == "int8")
    task.limits = Limits(size + 700 - room, held)
    found = _bench._measure({}, task, "key", list)
    assert (found.disk_bytes, found.resident_bytes, found.fits) == (size, held, room == 0)


def test_a_follower_reads_each_part_once(tmp_path, monkeypatch):
    run = Run(Store(str(tmp_path)), "sums", "search", "x")
    stages = [Stage(key, 0.25, 10, 0.5) for key in "abc"]
    follower = Follower(run, STAGES, Stage)
    assert follower.news() == []
    run.write_part(STAGES, stages[:1])
    run.write_part(TRIALS, [Trial("{}", "{}", 10, 10, 0.5, True, 1.0)])
    assert follower.news() == stages[:1]
    run.write_part(STAGES, stages[1:2])
    run.write_part(STAGES, stages[2:])
    read = []
    whole = Store.read_bytes
    monkeypatch.setattr(Store, "read_bytes", lambda store, path: read.append(path) or whole(store, path))
    assert follower.news() == stages[1:]
    assert len(read) == 2
    assert follower.news() == []


def test_what_a_follower_could_not_read_comes_with_the_next_look(tmp_path, monkeypatch, caplog):
    """And a store that does not answer for a while ends no looking on."""
    run = Run(Store(str(tmp_path)), "sums", "search", "x")
    stages = [Stage(key, 0.25, 10, 0.5) for key in "abc"]
    for stage in stages:
        run.write_part(STAGES, [stage])
    failing, whole = itertools.count(), Store.read_bytes

    def read(store, path):
        if next(failing) in {1, 2}:
            raise OSError("503 SlowDown")
        return whole(store, path)

    monkeypatch.setattr(Store, "read_bytes", read)
    follower, found, ended = Follower(run, STAGES, Stage), [], threading.Event()

    def look():
        found.extend(follower.news())
        if found:
            ended.set()

    with polling(look, every_s=0.01):
        assert ended.wait(30)
    assert found == stages
    assert [r.message for r in caplog.records] == ["progress cannot be read (503 SlowDown); it is tried again"], (
        "once, though it failed twice"
    )
