"""The figures of a training in TensorBoard's files, and on the trackers that a config names."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cascade.artifacts import Run, Store
from cascade.errors import ConfigError
from cascade.training.looks import Look
from cascade.training.loop import StepReport
from cascade.training.trackers import TENSORBOARD, Trackers

REPORT = StepReport(4, loss=1.5, learning_rate=1e-3, gradient_norm=float("nan"), tokens=600, targets=60, seconds=2.0, memory_bytes=2_000_000_000)


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


class FakeTracker(SimpleNamespace):
    """Notes every call."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        def note(*args, **named):
            self.calls.append((name, args, named))
            return self

        return note


def test_named_trackers_get_the_same_figures(run, monkeypatch):
    mlflow, wandb = FakeTracker(), FakeTracker()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = Trackers.open(config("mlflow", "wandb"), run)
    trackers.step(REPORT)
    trackers.close()
    figures = {"train/loss": 1.5, "train/learning_rate": 1e-3, "train/tokens_per_second": 300.0, "train/memory_bytes": 2e9}
    assert ("log_metrics", (figures,), {"step": 5}) in mlflow.calls
    assert ("log", (figures,), {"step": 5}) in wandb.calls
    assert mlflow.calls[-1][0] == "end_run"
    assert wandb.calls[-1][0] == "finish"
    assert next(named for name, _, named in wandb.calls if name == "init")["resume"] == "allow"


def test_a_tracker_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"training\.trackers names wandb.*pip install wandb"):
        Trackers.open(config("wandb"), run)
