"""The figures of a training in TensorBoard's files, and on the trackers that a config names."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cascade.artifacts import Run
from cascade.errors import ConfigError, DataError
from cascade.store import StorageError, Store
from cascade.training import trackers as trackers_module
from cascade.training.looks import Look
from cascade.training.measures import StepReport
from cascade.training.trackers import TENSORBOARD, Trackers

REPORT = StepReport(
    4,
    loss=1.5,
    learning_rate=1e-3,
    gradient_norm=float("nan"),
    tokens=600,
    targets=60,
    seconds=2.0,
    memory_bytes=2_000_000_000,
)


def config(*trackers):
    lora = SimpleNamespace(model_dump=lambda: {"rank": 4})
    training = SimpleNamespace(trackers=trackers, lora=lora, model_dump=lambda mode: {"rank": 4})
    return SimpleNamespace(domain="sums", training=training)


@pytest.fixture
def run(tmp_path):
    return Run(Store(str(tmp_path)), "sums", "train_modifier", "0f0f")


def test_tensorboard_has_the_curves(run):
    trackers = Trackers.open(config(), run)
    trackers.step(REPORT)
    trackers.look(Look(step=5, loss=1.25, answered=8, passed=6))
    trackers.close()
    events = EventAccumulator(run.store.path(f"{run.folder}/{TENSORBOARD}"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/loss": [(5, 1.5)],
        "train/learning_rate": [(5, pytest.approx(1e-3))],
        "train/tokens_per_second": [(5, 300)],
        "train/memory_bytes": [(5, 2e9)],
        "validation/loss": [(5, 1.25)],
        "validation/accuracy": [(5, 0.75)],
    }


def test_the_event_file_is_opened_once_a_second_and_holds_all_after_a_flush(run, monkeypatch):
    now, opened = [100.0], []

    @contextmanager
    def counted(*given):
        opened.append(given)
        with open(*given) as file:
            yield file

    monkeypatch.setattr(trackers_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trackers_module, "open", counted, raising=False)
    trackers = Trackers.open(config(), run)
    for step in range(12):
        trackers.step(replace(REPORT, step=step))
        now[0] += 0.25
    assert len(opened) == 3
    trackers.flush()
    events = EventAccumulator(run.store.path(f"{run.folder}/{TENSORBOARD}"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))


def test_another_thread_may_ask_for_a_flush(run, monkeypatch):
    """As a checkpoint does that is stored while training goes on."""

    @contextmanager
    def slow(*given):
        with open(*given) as file:
            time.sleep(0.002)
            yield file

    monkeypatch.setattr(trackers_module, "open", slow, raising=False)
    monkeypatch.setattr(trackers_module, "WRITE_S", 0.0)
    trackers, done = Trackers.open(config(), run), threading.Event()

    def flush():
        while not done.is_set():
            trackers.flush()

    with ThreadPoolExecutor() as threads:
        flushes = [threads.submit(flush) for _ in range(2)]
        for step in range(100):
            trackers.step(replace(REPORT, step=step))
        done.set()
    assert [flush.result() for flush in flushes] == [None, None]
    trackers.close()
    events = EventAccumulator(run.store.path(f"{run.folder}/{TENSORBOARD}"), size_guidance={"scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 101))


class FakeTracker(SimpleNamespace):
    """Notes every call."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        def note(*args, **named):
            self.calls.append((name, args, named))
            return self

        return note


class FakeMlflow(FakeTracker):
    """The module, its client and a run in one."""

    def __init__(self):
        super().__init__()
        self.search_runs = lambda **named: []
        self.info = SimpleNamespace(run_id="abc")
        self.entities = SimpleNamespace(Metric=lambda name, value, milliseconds, step: (name, value, step))

    def metrics(self):
        """Of each batch its metrics."""
        assert all(args == ("abc",) for name, args, _ in self.calls if name == "log_batch")
        return [named["metrics"] for name, _, named in self.calls if name == "log_batch"]


def test_named_trackers_get_the_same_figures(run, monkeypatch):
    mlflow, wandb = FakeMlflow(), FakeTracker()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = Trackers.open(config("mlflow", "wandb"), run)
    trackers.step(REPORT)
    trackers.close()
    figures = {
        "train/loss": 1.5,
        "train/learning_rate": 1e-3,
        "train/tokens_per_second": 300.0,
        "train/memory_bytes": 2e9,
    }
    assert mlflow.metrics() == [[(name, value, 5) for name, value in figures.items()]]
    assert ("log", (figures,), {"step": 5}) in wandb.calls
    assert mlflow.calls[-1][0] == "end_run"
    assert wandb.calls[-1][0] == "finish"
    assert next(named for name, _, named in wandb.calls if name == "init")["resume"] == "allow"


def test_a_resumed_training_goes_on_in_its_mlflow_run(run, monkeypatch):
    known = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    mlflow = FakeMlflow()
    mlflow.search_runs = lambda **named: mlflow.calls.append(("search_runs", (), named)) or found
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for found, expected in (([], {"run_name": run.name, "tags": {"cascade.fingerprint": "0f0f"}}), ([known], "abc")):
        mlflow.calls.clear()
        Trackers.open(config("mlflow"), run, 7).close()
        started = next(named for name, _, named in mlflow.calls if name == "start_run")
        assert started == (expected if found == [] else {"run_id": expected})
        assert any(name == "log_params" for name, _, _ in mlflow.calls) == (found == [])
    assert mlflow.calls[1][2]["filter_string"] == "tags.`cascade.fingerprint` = '0f0f'"


def test_no_step_waits_for_mlflow_which_gets_the_figures_of_some_seconds_at_once(run, monkeypatch):
    now, answers, mlflow = [100.0], threading.Event(), FakeMlflow()

    def log_batch(run_id, metrics):
        assert answers.wait(60)
        mlflow.calls.append(("log_batch", (run_id,), {"metrics": list(metrics)}))

    mlflow.log_batch = log_batch
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(trackers_module.time, "monotonic", lambda: now[0])
    trackers = Trackers.open(config("mlflow"), run)
    for step in range(600):
        trackers.step(replace(REPORT, step=step))
        now[0] += 1.0
    assert mlflow.metrics() == []
    answers.set()
    trackers.flush()
    assert len(mlflow.metrics()) <= 5, "a batch for what was there first, then of a thousand figures each"
    assert [step for batch in mlflow.metrics() for name, _, step in batch if name == "train/loss"] == list(
        range(1, 601)
    )
    trackers.close()
    assert mlflow.calls[-1][0] == "end_run"


def test_what_mlflow_did_not_take_is_sent_with_what_comes_later(run, monkeypatch, caplog):
    mlflow, away = FakeMlflow(), [True]

    def log_batch(run_id, metrics):
        if away[0]:
            raise ConnectionError("nobody there")
        mlflow.calls.append(("log_batch", (run_id,), {"metrics": list(metrics)}))

    mlflow.log_batch = log_batch
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(trackers_module, "QUIET_S", 0.0)
    trackers = Trackers.open(config("mlflow"), run)
    for step in range(3):
        trackers.step(replace(REPORT, step=step))
        trackers.flush()
    away[0] = False
    trackers.close()
    assert [step for batch in mlflow.metrics() for name, _, step in batch if name == "train/loss"] == [1, 2, 3]
    assert len([r for r in caplog.records if "mlflow takes no figures (ConnectionError" in r.message]) == 1


class Outage:
    """A server of MLflow that is away from now and then, for steps of a second each."""

    def __init__(self, run, monkeypatch):
        self.now, self.away, self.mlflow, self.run = 100.0, False, FakeMlflow(), run
        self.mlflow.log_batch = self.log_batch
        self.mlflow.set_experiment = self.set_experiment
        monkeypatch.setitem(sys.modules, "mlflow", self.mlflow)
        monkeypatch.setattr(trackers_module.time, "monotonic", lambda: self.now)

    def set_experiment(self, name):
        if self.away:
            raise ConnectionError("nobody there")
        return SimpleNamespace(experiment_id="1")

    def log_batch(self, run_id, metrics):
        self.set_experiment("")
        self.mlflow.calls.append(("log_batch", (run_id,), {"metrics": list(metrics)}))

    def train(self, away, steps=60, reachable_at_end=True):
        """A checkpoint each 20 steps, as they come."""
        self.away = 0 in away
        trackers = Trackers.open(config("mlflow"), self.run)
        for step in range(steps):
            self.away = step in away
            trackers.step(replace(REPORT, step=step))
            if opened := trackers.trackers[1].tracker:
                opened.sender.submit(int).result()  # the thread has sent what it was told to
            if step % 20 == 19:
                trackers.flush()
            self.now += 1.0
        self.away = not reachable_at_end
        trackers.close()
        return [step for batch in self.mlflow.metrics() for name, _, step in batch if name == "train/loss"]


@pytest.mark.parametrize("away", [range(1), range(15), range(10, 13), range(18, 22), range(1, 60)])
def test_an_outage_of_mlflow_costs_no_figure_nor_the_end(run, monkeypatch, caplog, away):
    outage = Outage(run, monkeypatch)
    assert outage.train(away) == list(range(1, 61))
    assert outage.mlflow.calls[-1][0] == "end_run"
    assert len([r for r in caplog.records if "mlflow takes no figures" in r.message]) <= 1


def test_an_mlflow_that_stays_away_is_told_the_end_all_the_same(run, monkeypatch):
    outage = Outage(run, monkeypatch)
    assert outage.train(range(30, 60), reachable_at_end=False) == list(range(1, outage.mlflow.metrics()[-1][-1][2] + 1))
    assert outage.mlflow.calls[-1][0] == "end_run"


@pytest.mark.parametrize("away", [range(60), range(1, 60)])
def test_no_more_than_so_much_waits_in_memory(run, monkeypatch, away):
    monkeypatch.setattr(trackers_module, "MOST_WAITING", 8)
    assert 1 <= len(Outage(run, monkeypatch).train(away)) <= 11


class Unreachable:
    """A tracker whose server is not there, from some call on."""

    def __init__(self, works=0):
        self.works, self.calls = works, 0

    def log(self, step, figures, at):
        self.calls += 1
        if self.calls > self.works:
            raise ConnectionError("nobody there")

    flush = close = lambda self: self.log(0, {}, 0.0)


@pytest.mark.parametrize("opens", [True, False])
def test_a_tracker_that_cannot_be_reached_is_warned_of_once_and_harms_nothing(run, monkeypatch, caplog, opens):
    tracker = Unreachable(works=1)
    opened = []

    def opener(config, run):
        opened.append(1)
        if not opens:
            raise ConnectionError("nobody there")
        return tracker

    monkeypatch.setitem(trackers_module.OPEN, "mlflow", opener)
    monkeypatch.setitem(sys.modules, "mlflow", FakeTracker())
    trackers = Trackers.open(config("mlflow"), run)
    for _ in range(5):
        trackers.step(REPORT)
    trackers.flush()
    assert tracker.calls == (2 if opens else 0)  # and is then left alone: it may take minutes to say so
    assert len(opened) == 1
    monkeypatch.setattr(trackers_module, "QUIET_S", 0.0)
    trackers.trackers[1].quiet_until = 0.0
    trackers.step(REPORT)
    trackers.close()
    assert (tracker.calls if opens else len(opened)) > 1
    assert len([r for r in caplog.records if "mlflow takes no figures (ConnectionError" in r.message]) == 1
    events = EventAccumulator(run.store.path(f"{run.folder}/{TENSORBOARD}"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 6  # the others got everything


class FullDisk:
    """A disk that takes so many bytes more, and then none; in place of `open`."""

    def __init__(self, room):
        self.room = room

    @contextmanager
    def open(self, path, mode):
        with open(path, mode) as file:
            yield SimpleNamespace(
                write=partial(self.write, file), flush=file.flush, tell=file.tell, truncate=file.truncate
            )

    def write(self, file, data):
        file.write(data[: self.room])
        self.room -= len(data)
        if self.room < 0:
            self.room = 0
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 30, 200])
def test_curves_are_whole_again_once_a_full_disk_has_room(run, monkeypatch, caplog, room):
    trackers = Trackers.open(config(), run)
    for step in range(12):
        if step == 4:
            monkeypatch.setattr(trackers_module, "open", FullDisk(room).open, raising=False)
        if step == 8:
            monkeypatch.undo()
        trackers.step(replace(REPORT, step=step, loss=float(step)))
        trackers.flush()
    trackers.close()
    events = EventAccumulator(run.store.path(f"{run.folder}/{TENSORBOARD}"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(step + 1, step) for step in range(12)]
    assert len([r for r in caplog.records if "tensorboard takes no figures (OSError" in r.message]) == 1


@pytest.mark.parametrize("error", [OSError("the store is away"), StorageError("read-only"), DataError("no")])
def test_a_store_that_is_away_for_a_while_gets_all_curves_and_ends_no_training(run, tmp_path, monkeypatch, error):
    away = [True]

    def upload(store, folder, relative):
        if away[0]:
            raise error
        shutil.copytree(folder, tmp_path / "bucket", dirs_exist_ok=True)

    monkeypatch.setattr(Store, "is_local", False)
    monkeypatch.setattr(Store, "upload_folder", upload)
    trackers = Trackers.open(config(), run)
    for step in range(6):
        away[0] = step < 4
        trackers.step(replace(REPORT, step=step))
        trackers.flush()
    events = EventAccumulator(str(tmp_path / "bucket"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    away[0] = True
    trackers.close()


def test_what_a_resumed_training_computes_again_is_shown_once(run):
    for start, steps in ((0, range(8)), (5, range(5, 10))):
        trackers = Trackers.open(config(), run, start)
        for step in steps:
            trackers.step(replace(REPORT, step=step, loss=1.0 + start))
        trackers.close()
    events = EventAccumulator(run.store.path(f"{run.folder}/{TENSORBOARD}"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(step, 1.0 if step <= 5 else 6.0) for step in range(1, 11)]


def test_a_tracker_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"training\.trackers names wandb.*pip install wandb"):
        Trackers.open(config("wandb"), run)
