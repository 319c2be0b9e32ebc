"""A training's own account of what was seen how often, and that the job holds it against what was planned."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade.artifacts import Run
from cascade.config import Lora
from cascade.errors import DataError
from cascade.store import StorageError, Store
from cascade.tasks import Example, Message
from cascade.training.examples import EncodedExample, EncodedSet
from cascade.training.measures import StepReport
from cascade.training.packing import plan_steps
from ray_jobs import _train_ledger
from ray_jobs._train_ledger import ATTEMPTS, CURVE, PROGRESS, Attempt, Recorder, check_ledger

ENCODED = EncodedSet(
    tuple(EncodedExample(f"e{i}", tuple(range(5, 12)), (False,) * 4 + (True,) * 3) for i in range(9)), ("w",), ("l",)
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(Store(str(tmp_path)), "sums", "train_modifier", "0f0f")
    messages = (Message("user", "q"), Message("assistant", "a"))
    names = [e.sample_id for e in ENCODED.examples] + ["w", "l"]
    run.write_table("examples", Example, [Example(n, "quiz", "sums", "", 1, messages, "t", 1) for n in names])
    return run


def curve(epochs: float, seed: int = 1) -> list[StepReport]:
    plan = plan_steps(ENCODED.examples, Lora(epochs=epochs, tokens_per_step=21), seed)
    return [StepReport(n, 1.0, 1e-3, 1.0, s.tokens, s.targets, 1.0, s.sample_ids) for n, s in enumerate(plan)]


def train(run: Run, points: list[StepReport], *, start: int = 0, workers: int = 1) -> None:
    """One start of the workers that ends with a checkpoint behind these points."""
    recorder = Recorder(run, 99, first=True)
    recorder.start(start, workers, ENCODED)
    for point in points:
        recorder.add(point)
    recorder.write(99)


@pytest.mark.parametrize(("epochs", "bounds"), [(3.0, (3, 3)), (2.5, (2, 3)), (0.5, (0, 1))])
def test_a_whole_training_saw_everything_as_often_as_planned(run: Run, epochs: float, bounds: Any) -> None:
    points = curve(epochs)
    train(run, points)
    found = check_ledger(run, len(points), len(points), epochs)
    assert (found["seen_least"], found["seen_most"]) == bounds
    assert (found["attempts"], found["steps_again"], found["skipped_steps"]) == (1, 0, 0)


def test_what_is_computed_again_after_a_resume_is_counted_and_not_taken_for_seen_twice(run: Run) -> None:
    points = curve(3.0)
    train(run, points[:5])
    run.store.write_json(f"{run.folder}/{PROGRESS}", {"step": 7})  # noted, and lost with the worker
    train(run, points[4:8], start=4, workers=2)
    train(run, points[8:], start=8)
    found = check_ledger(run, len(points), len(points), 3.0)
    assert (found["seen_least"], found["seen_most"], found["attempts"], found["steps_again"]) == (3, 3, 3, 3)
    attempts = run.read(ATTEMPTS, Attempt)
    assert attempts == [Attempt(1, 1, 0, 0), Attempt(2, 2, 4, 3), Attempt(3, 1, 8, 0)]


def test_an_early_end_leaves_no_example_more_than_one_behind(run: Run) -> None:
    points = curve(3.0)[:4]
    train(run, points)
    found = check_ledger(run, 4, 9, 3.0)
    assert (found["seen_least"], found["seen_most"]) == (1, 2)


def repeated(points: list[StepReport]) -> list[StepReport]:
    return [*points[:2], replace(points[2], sample_ids=points[0].sample_ids), *points[3:]]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda p: p[:3] + p[4:], "steps 3 are missing"),
        (repeated, "were seen between 2 and 4 times, not 3 to 3"),
        (lambda p: [*p[:2], replace(p[2], sample_ids=()), *p[3:]], "were seen between 2 and 3 times"),
        (lambda p: [*p[:2], replace(p[2], sample_ids=(*p[2].sample_ids, "w")), *p[3:]], "w were seen between"),
    ],
)
def test_a_ledger_that_does_not_hold_is_an_error_that_says_what_to_do(run: Run, broken: Any, said: str) -> None:
    points = curve(3.0)
    train(run, broken(points))
    with pytest.raises(DataError, match=rf"{said}.*remove that folder and run again"):
        check_ledger(run, len(points), len(points), 3.0)


def test_a_skipped_step_is_counted(run: Run) -> None:
    points = curve(3.0)
    train(run, [replace(points[0], loss=float("nan")), replace(points[1], gradient_norm=float("inf")), *points[2:]])
    assert check_ledger(run, len(points), len(points), 3.0)["skipped_steps"] == 2


def test_progress_that_cannot_be_noted_is_warned_of_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_train_ledger, "NOTE_S", -1.0)
    recorder = Recorder(run, 99, first=True)

    def refuse(self: Store, path: str, value: Any) -> None:
        raise StorageError("503 SlowDown")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", refuse)
        for point in curve(1.0):
            recorder.add(point)
            recorder.write(99)
    assert len(run.read(CURVE, StepReport)) == 3
    assert [r.message for r in caplog.records] == ["progress cannot be noted (503 SlowDown); training goes on"]


def test_no_step_waits_for_a_note_and_none_is_under_way_behind_what_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_train_ledger, "NOTE_S", -1.0)
    answered, ordinary, taken = threading.Event(), Store.write_json, []

    def slow(self: Store, path: str, value: Any) -> None:
        assert answered.wait(60)
        taken.append(value["step"])
        ordinary(self, path, value)

    monkeypatch.setattr(Store, "write_json", slow)
    recorder, points = Recorder(run, 99, first=True), curve(1.0)
    for point in points:
        recorder.add(point)
    assert taken == []
    answered.set()
    recorder.write(99)
    assert taken == [1], "those that came meanwhile were put off, not put in a queue"
    assert run.store.read_json(f"{run.folder}/{PROGRESS}") == {"step": 1, "steps": 99, "loss": 1.0}
    assert len(run.read(CURVE, StepReport)) == len(points)


def test_steps_that_are_taken_while_it_writes_are_written_with_the_next(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, points, ordinary = Recorder(run, 99, first=True), curve(2.0), Run.write_part

    def slow(self: Run, table: str, rows: Any) -> None:
        ordinary(self, table, rows)
        if len(recorder.pending) == 3:
            for point in points[3:]:
                recorder.add(point)

    monkeypatch.setattr(Run, "write_part", slow)
    for point in points[:3]:
        recorder.add(point)
    recorder.write(2)
    assert [p.step for p in run.read(CURVE, StepReport)] == [0, 1]
    recorder.write(99)
    assert [p.step for p in run.read(CURVE, StepReport)] == [p.step for p in points]


def test_what_could_not_be_written_is_written_with_the_next(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, points = Recorder(run, 99, first=True), curve(1.0)

    def full(self: Run, table: str, rows: Any) -> None:
        raise StorageError("503 SlowDown")

    for point in points:
        recorder.add(point)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_part", full)
        with pytest.raises(StorageError, match="503"):
            recorder.write(99)
    recorder.write(99)
    assert [p.step for p in run.read(CURVE, StepReport)] == [p.step for p in points]


def test_an_object_store_is_written_to_less_often(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recorder(run, 9, first=True).between == 1
    monkeypatch.setattr(Store, "is_local", False)
    assert Recorder(run, 9, first=True).between >= 5


def test_only_the_first_worker_writes(run: Run) -> None:
    recorder = Recorder(run, 9, first=False)
    recorder.start(0, 2, ENCODED)
    recorder.add(curve(1.0)[0])
    recorder.write(99)
    assert run.tables() == ["examples"]
    assert json.dumps(run.store.list(run.folder)) == '["examples.parquet"]'
