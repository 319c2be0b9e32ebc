"""What a training worker does, without Ray and DeepSpeed: looks decide what is kept and when it ends, checkpoints are
sound, and a notice that the node will be taken is heard."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from safetensors.torch import load_file
from stand_in import save_tiny_base

from cascade.artifacts import Run
from cascade.config import Config, PromptStyle, check_config
from cascade.errors import ConfigError, DataError
from cascade.models.student import Student
from cascade.store import StorageError, Store
from cascade.tasks import Example, Message, Task
from cascade.training.deepspeed_engine import MOMENTS
from cascade.training.looks import Look
from cascade.training.loop import TorchEngine
from cascade.training.measures import StepReport
from cascade.training.state_file import STATE, State, apart, joined, read_state
from ray_jobs import _train_worker
from ray_jobs._results import ADAPTER
from ray_jobs._train_controller import Assigned
from ray_jobs._train_ledger import CURVE, check_ledger
from ray_jobs._train_worker import BEST, POSITION, train_worker

WORDS = ("apple", "banana", "cherry", "melon", "papaya", "orange", "lemon", "grape")


class AloneEngine(TorchEngine):
    """In place of DeepSpeed's."""

    def __init__(self, module: Any, training: Any, device: Any, dtype: Any) -> None:
        super().__init__(module, training.lora)

    def weights(self) -> dict[str, torch.Tensor]:
        named = self.module.model.named_parameters()
        return {n: p.detach().clone() for n, p in named if p.requires_grad}

    def state(self, step: int) -> State:
        weights, adam = self.weights(), [self.optimizer.state[p] for p in self.parameters]
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        moments = {key: joined([each[key] for each in adam]) for key in MOMENTS}
        return State(step, int(adam[0]["step"]), shapes, joined(list(weights.values())), moments)

    def load(self, folder: str | Path) -> int:
        state = read_state(folder)
        self.module.model.load_state_dict(dict(apart(state.weights, state.shapes)), strict=False)
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state.updates))}
        for key, moments in state.moments.items():
            for parameter, (_, moment) in zip(self.parameters, apart(moments, state.shapes), strict=True):
                self.optimizer.state[parameter][key] = moment.clone()
        return state.next_step


@dataclass
class FakeRay:
    """Ray Train for one worker in this process."""

    folder: Path
    notice: Callable[[], Any] = lambda: None
    checkpoint: Checkpoint | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    def report(
        self,
        metrics: dict[str, Any],
        checkpoint: Checkpoint | None = None,
        checkpoint_upload_fn: Callable[[Checkpoint, str], Checkpoint] | None = None,
        **how: Any,
    ) -> None:
        self.reports.append(metrics)
        if checkpoint is not None:
            store, name = checkpoint_upload_fn or self.persist_current_checkpoint, f"checkpoint{len(self.reports)}"
            try:
                self.checkpoint = store(checkpoint, name)
            except OSError as error:
                if "AWS Error SLOW_DOWN" not in str(error):
                    raise
                self.checkpoint = store(checkpoint, name)

    def persist_current_checkpoint(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        kept = self.folder / name
        with checkpoint.as_directory() as folder:
            Path(folder).rename(kept)
            Path(folder).mkdir()
        return Checkpoint.from_directory(str(kept))

    def get_preemption_info(self) -> Any:
        self.asked += 1
        return self.notice()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    save_tiny_base(folder)
    return str(folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(tmp_path)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_storage=lambda: fake)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: fake.checkpoint)
    monkeypatch.setattr(ray.train, "report", fake.report)
    monkeypatch.setattr(ray.train, "get_preemption_info", fake.get_preemption_info)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda mode: [])
    monkeypatch.setattr(_train_worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(_train_worker, "DeepSpeedEngine", AloneEngine)
    monkeypatch.setattr(_train_worker, "limit_process", lambda execution, cpus: None)
    return fake


def make_config(base: str, store: Path, validation: dict[str, Any], **training: Any) -> Config:
    prices = {"input_usd_per_million": 1.0, "output_usd_per_million": 1.0}
    tier = {"endpoints": [{"base_url": "answer-key"}], "answer_key": {"max_difficulty": 1}}
    tasks = {"count": 4, "sources": [{"benchmark": "reasoning_gym", "options": {"generators": [{"name": "gcd"}]}}]}
    lora = {"rank": 2, "epochs": 4, "tokens_per_step": 120, "max_length": 200, "learning_rate": 3e-3}
    return check_config(
        {
            "domain": "words",
            "storage": str(store),
            "base": {"model": base, "dtype": "float32"},
            "tasks": dict.fromkeys(("train", "validation", "test"), tasks),
            "student": {"max_tokens": 4, "temperature": 0.7},
            "tiers": [{"name": f"answer-key-{n}", **tier, **prices} for n in (1, 2, 3)],
            "budget_usd": 1.0,
            "training": {"lora": lora, "validation": validation, "checkpoint_steps": 3} | training,
        }
    )


def conversation(word: str, answer: str) -> tuple[Message, ...]:
    return (Message("user", f"Say {word}."), Message("assistant", answer))


def assign(base: str, folder: Path, validation: dict[str, Any], *, measured: int = 2, **training: Any) -> Assigned:
    config = make_config(base, folder / "store", validation, **training)
    run = Run(Store(config.storage), "words", "train_modifier", "0f0f")
    examples = [Example(w, "quiz", "words", "", 1, conversation(w, w), "t", 1) for w in WORDS]
    run.write_table("examples", Example, examples)
    held_out = tuple((f"v{i}", conversation(w, w)) for i, w in enumerate(WORDS[:measured]))
    asked = tuple(
        Task(f"jsonl/{w}", "jsonl", "words", "validation", conversation(w, w)[:1], {"kind": "exact", "answers": [w]})
        for w in WORDS[: validation.get("answered", 0)]
    )
    return Assigned(config, run, PromptStyle(name="plain"), held_out, asked)


def train(assigned: Assigned) -> None:
    train_worker({"assigned": assigned})


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the looks find these losses, one after the other."""
    found = iter(losses)
    monkeypatch.setattr(_train_worker._Session, "_held_out_loss", lambda self: _next(self, found))


def _next(session: Any, losses: Any) -> float:
    return float(next(losses) * sum(step.targets for step in session.held_out))


def saved(fake: FakeRay) -> dict[str, torch.Tensor]:
    assert fake.checkpoint is not None
    return load_file(Path(fake.checkpoint.path) / ADAPTER / "adapter_model.safetensors")


def adapters_by_look(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights at each look, in fp16 as they are saved."""
    seen: list[dict[str, torch.Tensor]] = []
    ordinary = _train_worker._Session._look

    def look(self: Any, done: int) -> None:
        seen.append({n.replace(".default", ""): w.half() for n, w in self.engine.weights().items()})
        ordinary(self, done)

    monkeypatch.setattr(_train_worker._Session, "_look", look)
    return seen


def check_kept(fake: FakeRay, weights: dict[str, torch.Tensor]) -> None:
    found = saved(fake)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3.0, 2.0, 2.5, 2.6], 1), ([math.nan, 2.0, 1.0, math.nan], 2), ([1.0, 2.0, math.nan, 3.0], 0)],
)
def test_the_adapter_of_the_least_loss_is_kept(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    scripted(monkeypatch, losses)
    seen = adapters_by_look(monkeypatch)
    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss"})
    train(assigned)
    check_kept(fake, seen[best])
    looks = assigned.run.read("looks", Look)
    assert fake.reports[-1]["kept_step"] == looks[best].step
    assert fake.reports[-1]["validation_loss"] == pytest.approx(losses[best])


def test_the_adapter_that_answers_best_is_kept_and_asked_as_it_will_be(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = iter([1, 3, 2, 3])
    asked: list[Student] = []

    def judged(self: Student, tasks: Any, style: Any, examples: Any = None) -> Any:
        asked.append(self)
        right = next(passes)
        return [], [SimpleNamespace(passed=i < right) for i, _ in enumerate(tasks)]

    monkeypatch.setattr(Student, "judged", judged)
    scripted(monkeypatch, [4.0, 3.0, 2.0, 3.5])
    seen = adapters_by_look(monkeypatch)
    train(assign(base, tmp_path, {"tasks": 2, "answered": 4, "keep": "best_accuracy"}))
    check_kept(fake, seen[1])
    assert fake.reports[-1]["validation_passed"] == 3
    assert {student.temperature for student in asked} == {0.7}


def test_later_collections_of_garbage_leave_the_libraries_out(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[int] = []

    def report(metrics: dict[str, Any], **how: Any) -> None:
        left_out.append(gc.get_freeze_count())
        fake.report(metrics, **how)

    monkeypatch.setattr(ray.train, "report", report)
    train(assign(base, tmp_path, {"tasks": 0}))
    assert min(left_out, default=0) > 10_000
    assert gc.get_freeze_count() == 0, "the process is not the training's alone"


def test_patience_ends_training_and_says_after_how_many_steps(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [3.0, 2.0, 2.5, 2.6])
    seen = adapters_by_look(monkeypatch)
    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss", "patience": 1})
    train(assigned)
    curve = assigned.run.read(CURVE, StepReport)
    metrics = fake.reports[-1]
    assert len(seen) == 3
    assert metrics["steps"] == len(curve) < metrics["planned_steps"]
    check_kept(fake, seen[1])


def test_the_best_adapter_survives_a_resume(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = adapters_by_look(monkeypatch)
    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss"})
    with monkeypatch.context() as patch:
        scripted(patch, [1.0, 2.0])
        with pytest.raises(StopIteration):  # the third look fails, long after the first, which was the best
            train(assigned)
    scripted(monkeypatch, [2.0, 2.5, 3.0])
    train(assigned)
    check_kept(fake, seen[0])


def test_looks_that_fall_otherwise_after_a_loss_leave_a_sound_ledger(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss", "patience": 1})

    ordinary = fake.persist_current_checkpoint

    def persist(*given: Any) -> Checkpoint:
        if len(assigned.run.read("looks", Look)) == 3:
            raise OSError("the store is full")
        return ordinary(*given)

    with monkeypatch.context() as patch:
        scripted(patch, [3.0, 2.999, 2.9])
        patch.setattr(fake, "persist_current_checkpoint", persist)
        with pytest.raises(OSError, match="full"):
            train(assigned)
    scripted(monkeypatch, [3.001])  # of the second look, on another machine: training ends there
    train(assigned)
    metrics = fake.reports[-1]
    check_ledger(assigned.run, metrics["steps"], metrics["planned_steps"], assigned.config.training.lora.epochs)
    assert [look.loss for look in assigned.run.read("looks", Look)] == [3.0, 3.001]


def test_what_is_behind_a_checkpoint_is_written_down_before_it_is_one(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a training that is killed in between would go on behind steps that the ledger does not have."""
    ordinary, seen = fake.persist_current_checkpoint, []

    def persist(checkpoint: Checkpoint, name: str) -> Checkpoint:
        with checkpoint.as_directory() as folder:
            if (Path(folder) / STATE).exists():
                seen.append((read_state(folder).next_step, len(assigned.run.read(CURVE, StepReport))))
        return ordinary(checkpoint, name)

    monkeypatch.setattr(fake, "persist_current_checkpoint", persist)
    assigned = assign(base, tmp_path, {"tasks": 0})
    train(assigned)
    assert len(seen) > 1
    assert all(step == steps for step, steps in seen)


@pytest.mark.parametrize("failing", ["checkpoint", "curve"])
def test_a_checkpoint_is_stored_at_the_second_attempt(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """And training leaves nothing on the disk."""
    outboxes = tmp_path / "outboxes"
    outboxes.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(outboxes))
    where, what = (fake, "persist_current_checkpoint") if failing == "checkpoint" else (Run, "write_part")
    ordinary, calls = getattr(where, what), itertools.count()

    def busy_at_first(*given: Any) -> Any:
        if failing in ("checkpoint", given[1]) and next(calls) == 0:
            raise (OSError if failing == "checkpoint" else StorageError)("AWS Error SLOW_DOWN during PutObject")
        return ordinary(*given)

    monkeypatch.setattr(where, what, busy_at_first)
    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss"})
    train(assigned)
    assert read_state(tmp_path / "checkpoint1").next_step == 3
    assert [p.step for p in assigned.run.read(CURVE, StepReport)] == list(range(fake.reports[-1]["steps"]))
    assert not list(outboxes.iterdir())


def test_the_next_checkpoint_and_the_end_wait_until_the_last_is_noted(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread stores it, and what the steps measured is written down by one thread at a time."""
    awaited, writing, stores = threading.Event(), threading.Lock(), ThreadPoolExecutor()
    under_way: list[Future[None]] = []
    ordinary, main = _train_worker._Session._write_down, threading.current_thread()

    def report(metrics: dict[str, Any], checkpoint: Checkpoint | None = None, **how: Any) -> None:
        if how.get("checkpoint_upload_mode") is CheckpointUploadMode.ASYNC:
            under_way.append(stores.submit(fake.report, metrics, checkpoint, **how))
        else:
            fake.report(metrics, checkpoint, **how)

    def all_reported(mode: CheckpointConsistencyMode) -> list[Checkpoint]:
        assert mode is CheckpointConsistencyMode.COMMITTED
        awaited.set()
        for store in under_way:
            store.result()
        under_way.clear()
        awaited.clear()
        return []

    def write_down(*given: Any) -> None:
        assert writing.acquire(blocking=False), "another thread is writing"
        try:
            if threading.current_thread() is not main:
                assert awaited.wait(60)  # as slow as can be: training goes on until it needs this one
            ordinary(*given)
        finally:
            writing.release()

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", all_reported)
    monkeypatch.setattr(_train_worker._Session, "_write_down", write_down)
    assigned = assign(base, tmp_path, {"tasks": 0})
    try:
        train(assigned)
    finally:
        awaited.set()
        stores.shutdown()
    steps = [r["step"] for r in fake.reports[:-1]]
    assert steps == list(range(3, 3 * len(steps) + 1, 3))
    assert len(steps) > 1
    assert [read_state(tmp_path / f"checkpoint{n + 1}").next_step for n in range(len(steps))] == steps
    assert [p.step for p in assigned.run.read(CURVE, StepReport)] == list(range(fake.reports[-1]["steps"]))


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_keeps_the_best_adapter_of_its_time(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """It is stored while training goes on, which may find a better one meanwhile."""

    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", none)
    scripted(monkeypatch, [4.0, 3.0, 2.0, 1.0])
    seen, later = adapters_by_look(monkeypatch), []
    ordinary = fake.report

    def report(metrics: dict[str, Any], checkpoint: Checkpoint | None = None, **how: Any) -> None:
        while later:  # what was under way is stored only now
            later.pop()()
        if "checkpoint_upload_fn" not in how:
            return ordinary(metrics, checkpoint, **how)
        looks = len(seen)

        def store() -> None:
            ordinary(metrics, checkpoint, **how)
            assert fake.checkpoint is not None
            if looks:
                found = load_file(Path(fake.checkpoint.path) / BEST / "adapter_model.safetensors")
                assert all(torch.equal(found[name], seen[looks - 1][name]) for name in found)
                checked.append(len(seen) > looks)

        return later.append(store)

    checked: list[bool] = []
    monkeypatch.setattr(ray.train, "report", report)
    train(assign(base, tmp_path, {"tasks": 2, "keep": "best_loss"}))
    assert any(checked), "another look fell between one and its storing"
    check_kept(fake, seen[3])


@pytest.mark.parametrize("validation", [{"tasks": 0, "answered": 1}, {"tasks": 2}])
def test_a_loss_that_nobody_measured_is_not_reported(
    base: str, fake: FakeRay, tmp_path: Path, validation: dict[str, Any]
) -> None:
    train(assign(base, tmp_path, validation, measured=0))
    assert "validation_loss" not in fake.reports[-1]
    assert fake.reports[-1]["kept_step"] == fake.reports[-1]["steps"]


def test_a_loss_that_decides_must_be_measurable(base: str, fake: FakeRay, tmp_path: Path) -> None:
    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss"}, measured=0)
    with pytest.raises(DataError, match=r"training\.validation\.keep or patience goes by the loss"):
        train(assigned)


def test_held_out_conversations_that_the_template_refuses_are_left_out(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.training import examples

    ordinary = examples.encode_example

    def refusing(sample_id: str, *more: Any, **named: Any) -> Any:
        if sample_id == "v0":
            raise DataError("the base's chat template refuses it")
        return ordinary(sample_id, *more, **named)

    monkeypatch.setattr(examples, "encode_example", refusing)
    train(assign(base, tmp_path, {"tasks": 2}))
    assert math.isfinite(fake.reports[-1]["validation_loss"])


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the gradient of these steps be no number."""
    ordinary, counted = AloneEngine.step, itertools.count()

    def step(self: AloneEngine, rate: float) -> float:
        if next(counted) in steps:
            for parameter in self.parameters:
                parameter.grad = torch.full_like(parameter, math.nan)
        return ordinary(self, rate)

    monkeypatch.setattr(AloneEngine, "step", step)


def test_no_checkpoint_is_taken_behind_a_skipped_step(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3})
    assigned = assign(base, tmp_path, {"tasks": 0})
    train(assigned)
    curve = assigned.run.read(CURVE, StepReport)
    assert [p.step for p in curve if p.skipped] == [2, 3]
    assert [r["step"] for r in fake.reports[:-1]][:2] == [5, 6]  # due after the third, taken after the next sound one


def test_a_training_that_has_broken_down_ends_and_leaves_the_sound_checkpoint(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4, 5, 6})
    assigned = assign(base, tmp_path, {"tasks": 0})
    with pytest.raises(DataError, match=r"3 steps in a row"):
        train(assigned)
    assert fake.reports == [{"step": 3}]
    assert fake.checkpoint is not None
    assert bool(read_state(fake.checkpoint.path).weights.isfinite().all())


@pytest.mark.parametrize(("tokens_per_step", "epochs"), [(120, 4), (999, 3), (999, 1)])
def test_a_training_that_breaks_down_at_its_very_end_is_no_success(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_per_step: int, epochs: int
) -> None:
    lora = {"rank": 2, "epochs": epochs, "tokens_per_step": tokens_per_step, "max_length": 200}
    train(assign(base, tmp_path / "sound", {"tasks": 0}, lora=lora))
    steps, before, fake.checkpoint = fake.reports[-1]["steps"], len(fake.reports), None
    poison(monkeypatch, set(range(steps - 3, steps)))
    with pytest.raises(DataError, match=rf"not finite in {min(3, steps)} steps in a row"):
        train(assign(base, tmp_path, {"tasks": 0}, lora=lora))
    assert all(report.keys() == {"step"} for report in fake.reports[before:]), "no end was reported"


def test_a_checkpoint_under_way_when_an_error_ends_training_is_stored_whole(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: list[Callable[[], Checkpoint]] = []

    def report(metrics: Any, checkpoint: Any, checkpoint_upload_fn: Any, **how: Any) -> None:
        under_way.append(lambda: checkpoint_upload_fn(checkpoint, "late"))

    assigned = assign(base, tmp_path, {"tasks": 2, "keep": "best_loss"})
    with monkeypatch.context() as patch:
        poison(patch, {3, 4, 5})
        patch.setattr(ray.train, "report", report)
        with pytest.raises(DataError, match=r"3 steps in a row"):
            train(assigned)
    fake.checkpoint = under_way[0]()
    train(assigned)
    assert fake.reports[0] == {"step": 6}
    assert fake.reports[-1]["kept_step"] >= 2


def test_where_the_memory_ends_it_says_what_to_change(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TorchEngine, "__init__", full)
    with pytest.raises(ConfigError, match=r"execution\.gpu_share.*Tried to allocate"):
        train(assign(base, tmp_path, {"tasks": 0}))


def test_an_adapter_that_is_not_finite_is_never_saved(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = AloneEngine.weights
    monkeypatch.setattr(AloneEngine, "weights", lambda self: {n: w * 1e9 for n, w in ordinary(self).items()})
    with pytest.raises(DataError, match=r"weights are not finite.*learning_rate"):
        train(assign(base, tmp_path, {"tasks": 0}, checkpoint_steps=999))
    assert fake.reports == []


def test_a_notice_is_heard_by_time_however_long_steps_take(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=2.0)  # each look at the clock is two seconds later
    monkeypatch.setattr(_train_worker, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fake.notice = lambda: SimpleNamespace(deadline_ms=1) if fake.asked == 2 else None
    assigned = assign(base, tmp_path, {"tasks": 0}, checkpoint_steps=999)
    train(assigned)
    steps = len(assigned.run.read(CURVE, StepReport))
    assert 2 <= fake.asked < steps  # not at each step: all workers wait for each other there
    assert len(fake.reports) == 2
    assert fake.reports[0]["step"] < 10


def test_without_long_steps_nobody_asks_at_each(base: str, fake: FakeRay, tmp_path: Path) -> None:
    train(assign(base, tmp_path, {"tasks": 0}))
    assert fake.asked <= 2


@pytest.mark.parametrize("broken", [STATE, POSITION])
def test_a_checkpoint_that_cannot_be_gone_on_from_says_how_to_begin_again(
    base: str, fake: FakeRay, tmp_path: Path, broken: str
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    if broken == STATE:
        (folder / POSITION).write_text(json.dumps({"looks": [], "metrics": {}}))
    fake.checkpoint = Checkpoint.from_directory(str(folder))
    with pytest.raises(DataError, match=r"remove .*/words/train_modifier@0f0f/train and run again"):
        train(assign(base, tmp_path, {"tasks": 0}))


def test_a_checkpoint_that_cannot_be_read_just_now_is_nothing_to_remove(
    base: str, fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    assigned = assign(base, tmp_path, {"tasks": 0})
    train(assigned)
    fake.checkpoint = Checkpoint.from_directory(str(tmp_path / "checkpoint1"))
    monkeypatch.setattr(AloneEngine, "load", full)
    with pytest.raises(OSError, match="No space left"):
        train(assigned)
