"""The step loop: it learns, the number of workers does not matter, and a resumed run is the unbroken one."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cascade.config import Base, Lora
from cascade.errors import DataError
from cascade.models.base import load_base
from cascade.models.generation import generate
from cascade.models.rows import Request
from cascade.tasks import Message
from cascade.training.examples import EncodedExample, encode_example
from cascade.training.loop import TargetLoss, TorchEngine, mean_loss, run_steps, target_losses
from cascade.training.lora import add_lora, trainable
from cascade.training.packing import Row, Step, pack, plan_steps
from cascade.training.schedule import learning_rate_at

CPU = torch.device("cpu")
SETTINGS = Lora(rank=4, learning_rate=5e-3, epochs=2, tokens_per_step=90, max_length=48, gradient_clip=0.7)


@pytest.fixture
def base(tiny_folder):
    return load_base(Base(model=str(tiny_folder), dtype="float32"), CPU)


@pytest.fixture
def module(base):
    """A fresh adapter whose loss is differentiable in both A and B."""
    module = TargetLoss(add_lora(base, SETTINGS, seed=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(module):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module


def made(lengths):
    """Examples of which the second half is learned."""
    return [
        EncodedExample(
            f"e{i}", tuple(5 + (i * 31 + j * 7) % 250 for j in range(n)), tuple(j >= n // 2 for j in range(n))
        )
        for i, n in enumerate(lengths)
    ]


PLAN = plan_steps(made([12, 30, 7, 40, 9, 22, 15, 33, 8, 19]), SETTINGS, seed=1)


def weights(module):
    return [p.detach().clone() for p in trainable(module)]


def train(module, plan=PLAN, settings=SETTINGS, **more):
    return list(run_steps(TorchEngine(module, settings), plan, settings, **more))


def test_a_tiny_task_is_learned_and_answered(base):
    pairs = [("red", "stop"), ("green", "go"), ("amber", "wait")]
    conversations = [(Message("user", q), Message("assistant", a)) for q, a in pairs]
    examples = [encode_example(c[0].content, c, base.tokenizer) for c in conversations]
    settings = Lora(rank=8, learning_rate=1e-2, epochs=40, tokens_per_step=64, max_length=64)
    module = TargetLoss(add_lora(base, settings, seed=1))
    rows = pack(examples, 64)
    before = mean_loss(module, rows, CPU)
    reports = train(module, plan_steps(examples, settings, seed=1), settings)
    assert reports[0].loss == pytest.approx(before, rel=1e-4)
    assert mean_loss(module, rows, CPU) < 0.05 < 2 < before
    prompts = [e.input_ids[: e.is_target.index(True)] for e in examples]
    answers = generate(base, [Request(p, 8) for p in prompts])
    assert [(a.text, a.finish_reason) for a in answers] == [(a, "stop") for _, a in pairs]


class Worker(TorchEngine):
    """One of several workers in threads of one process; gradients are averaged by hand, as engines do."""

    def __init__(self, module, settings, meeting, rank):
        super().__init__(module, settings)
        self.meeting, self.rank = meeting, rank

    def step(self, learning_rate):
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gathered = self.meeting.exchange(self.rank, own)
        for i, parameter in enumerate(self.parameters):
            parameter.grad = torch.stack([g[i] for g in gathered]).mean(0)
        return super().step(learning_rate)


class Meeting:
    """Where all workers wait for each other and swap what they have."""

    def __init__(self, world):
        self.slots = [None] * world
        self.barrier = threading.Barrier(world, timeout=120)

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        everything = list(self.slots)
        self.barrier.wait()
        return everything


def train_in(world, module, plan, settings):
    """Train copies of a module on several workers; returns the reports and the module of each."""
    meeting = Meeting(world)
    copies = [copy.deepcopy(module) for _ in range(world)]

    def work(rank):
        torch.set_num_threads(1)
        engine = Worker(copies[rank], settings, meeting, rank)
        add_up = lambda value: sum(meeting.exchange(rank, value))  # noqa: E731
        return list(run_steps(engine, plan, settings, rank=rank, world=world, reduce_sum=add_up))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world))), copies


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_takes_the_same_steps(module, world):
    plan = PLAN[:3]
    assert any(len(step.rows) % world for step in plan)  # some worker goes without a row
    assert len({row.targets for step in plan for row in step.rows}) > 1
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-4})
    reports, copies = train_in(world, module, plan, settings)
    alone = train(module, plan, settings)
    for per_worker in reports:
        for ours, theirs in zip(per_worker, alone, strict=True):
            assert (ours.step, ours.tokens, ours.targets) == (theirs.step, theirs.tokens, theirs.targets)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4)
    for other in copies:
        for x, y in zip(trainable(module), trainable(other), strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


def test_a_gradient_is_that_of_the_mean_over_all_targets_of_the_step(module):
    step = PLAN[0]
    assert len(step.rows) > 1
    total = sum(module(**row.tensors(CPU)) for row in step.rows) / step.targets
    expected = torch.autograd.grad(total, trainable(module))
    engine = TorchEngine(module, SETTINGS)
    seen = []
    engine.step = lambda rate: seen.extend(p.grad.clone() for p in engine.parameters) or 0.0
    report = next(run_steps(engine, [step], SETTINGS))
    assert report.loss == pytest.approx(total.item(), rel=1e-5)
    for x, y in zip(seen, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_packing_does_not_change_what_is_learned(module):
    step = PLAN[0]
    unpacked = Step(tuple(Row((e,)) for r in step.rows for e in r.examples))
    assert len(unpacked.rows) > len(step.rows)
    other = copy.deepcopy(module)
    one, two = train(module, [step])[0], train(other, [unpacked])[0]
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_a_run_resumed_at_step_k_is_the_unbroken_run(module, k):
    assert len(PLAN) > 4
    unbroken = copy.deepcopy(module)
    expected = train(unbroken)
    first = TorchEngine(module, SETTINGS)
    steps = run_steps(first, PLAN, SETTINGS)
    reports = [next(steps) for _ in range(k)]
    resumed = copy.deepcopy(module)  # what a checkpoint holds: weights, optimiser, the next step
    second = TorchEngine(resumed, SETTINGS)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    reports += run_steps(second, PLAN, SETTINGS, start=k)
    assert [(r.step, r.loss, r.learning_rate) for r in reports] == [(r.step, r.loss, r.learning_rate) for r in expected]
    for x, y in zip(weights(resumed), weights(unbroken), strict=True):
        assert torch.equal(x, y)


def test_a_resumed_run_without_its_optimiser_would_differ(module):
    # What the test above can tell apart.
    unbroken = copy.deepcopy(module)
    train(unbroken)
    steps = run_steps(TorchEngine(module, SETTINGS), PLAN, SETTINGS)
    for _ in range(3):
        next(steps)
    train(module, start=3)
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(weights(module), weights(unbroken), strict=True))


def test_only_the_adapter_changes(module):
    frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    before = weights(module)
    train(module)
    assert all(torch.equal(p, frozen[n]) for n, p in module.named_parameters() if n in frozen)
    assert all(not torch.equal(x, y) for x, y in zip(weights(module), before, strict=True))


def test_gradients_are_clipped_before_the_step_and_cleared_after(module):
    settings = SETTINGS.model_copy(update={"gradient_clip": 1e-3})
    engine = TorchEngine(module, settings)
    norms = []
    original = engine.optimizer.step
    engine.optimizer.step = lambda: (
        norms.append(torch.stack([p.grad.norm() for p in engine.parameters]).norm().item()) or original()
    )
    reports = list(run_steps(engine, PLAN[:2], settings))
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert all(r.gradient_norm > 0.1 for r in reports)
    assert all(p.grad is None for p in engine.parameters)


def test_the_rate_of_each_step_is_the_one_used(module):
    engine = TorchEngine(module, SETTINGS)
    used = []
    original = engine.optimizer.step
    engine.optimizer.step = lambda: used.append(engine.optimizer.param_groups[0]["lr"]) or original()
    reports = list(run_steps(engine, PLAN, SETTINGS, start=2))
    assert [r.step for r in reports] == list(range(2, len(PLAN)))
    assert all(10e6 < r.memory_bytes < 100e9 for r in reports), "torch alone takes more than the one"
    assert used == [r.learning_rate for r in reports]
    assert used == [learning_rate_at(i, len(PLAN), SETTINGS) for i in range(2, len(PLAN))]


def test_mean_loss_weighs_targets_alike(module):
    rows = [Row((e,)) for e in made([6, 30])]
    sums = [module(**r.tensors(CPU)).item() for r in rows]
    before = weights(module)
    assert mean_loss(module, rows, CPU) == pytest.approx(sum(sums) / 18, rel=1e-5)
    assert math.isnan(mean_loss(module, [], CPU))
    assert all(torch.equal(x, y) for x, y in zip(weights(module), before, strict=True))


def test_lora_plus_learns_b_at_a_multiple_of_the_rate(module):
    settings = SETTINGS.model_copy(update={"lora_plus": 8.0})
    engine = TorchEngine(module, settings)
    a, b = engine.optimizer.param_groups
    names = {p: n for n, p in module.named_parameters()}
    assert all("lora_A" in names[p] for p in a["params"])
    assert all("lora_B" in names[p] for p in b["params"])
    reports = list(run_steps(engine, PLAN, settings))
    assert (a["lr"], b["lr"]) == (reports[-1].learning_rate, 8 * reports[-1].learning_rate)


def test_a_step_reports_what_it_learned_from(module):
    reports = train(module)
    for report, step in zip(reports, PLAN, strict=True):
        assert report.sample_ids == tuple(sorted(e.sample_id for row in step.rows for e in row.examples))
    seen = [i for r in reports for i in r.sample_ids]
    assert sorted(seen) == sorted([f"e{i}" for i in range(10)] * 2)


def test_gradient_checkpointing_changes_nothing_but_memory(module):
    other = copy.deepcopy(module)
    other.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other.model.train()
    one, two = train(module), train(other)
    assert [r.loss for r in one] == pytest.approx([r.loss for r in two], rel=1e-5)


def poisoned(engine, numbers, kind):
    """An engine whose loss or gradient is not finite in the steps of these numbers (from 0)."""
    counted = {"step": 0}
    loss, step = engine.loss, engine.step

    def bad_loss(row):
        found = loss(row)
        return found * math.inf if counted["step"] in numbers and kind == "loss" else found

    def bad_step(rate):
        if counted["step"] in numbers and kind == "gradient":
            engine.parameters[-1].grad[0, 0] = math.nan
        counted["step"] += 1
        return step(rate)

    engine.loss, engine.step = bad_loss, bad_step
    return engine


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_the_others_are_as_without_it(module, kind):
    other = copy.deepcopy(module)
    reports = list(run_steps(poisoned(TorchEngine(module, SETTINGS), {1, 2}, kind), PLAN[:5], SETTINGS))
    assert [r.skipped for r in reports] == [False, True, True, False, False]
    engine = TorchEngine(other, SETTINGS)
    for k in (0, 3, 4):
        next(run_steps(engine, PLAN[:5], SETTINGS, start=k))
    for x, y in zip(weights(module), weights(other), strict=True):
        assert torch.equal(x, y)


def test_several_steps_in_a_row_that_are_not_finite_end_the_training(module):
    before = weights(module)
    steps = run_steps(poisoned(TorchEngine(module, SETTINGS), range(99), "loss"), PLAN, SETTINGS)
    with pytest.raises(DataError, match=r"3 steps in a row \(from step 1 on\).*e\d.*training\.lora\.learning_rate"):
        list(steps)
    assert all(torch.equal(x, y) for x, y in zip(before, weights(module), strict=True))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_training_of_which_no_step_counts_is_none(module, length):
    """Also for who asks for no more steps than the plan has."""
    steps = run_steps(poisoned(TorchEngine(module, SETTINGS), range(99), "loss"), PLAN[:length], SETTINGS)
    with pytest.raises(DataError, match=rf"not finite in {length} steps in a row"):
        [next(steps) for _ in range(length)]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_the_last_steps_of_a_plan_end_it_as_others_do(module, kind):
    steps = run_steps(poisoned(TorchEngine(module, SETTINGS), {2, 3, 4}, kind), PLAN[:5], SETTINGS)
    assert [next(steps).skipped for _ in range(4)] == [False, False, True, True]
    with pytest.raises(DataError, match=r"3 steps in a row \(from step 3 on\)"):
        next(steps)


def test_the_losses_of_all_targets_add_up_to_that_of_their_rows(module):
    rows = [Row(tuple(made([6, 30]))), Row(tuple(made([9])))]
    losses = target_losses(module, rows, CPU)
    assert losses.shape == (sum(row.targets for row in rows),)
    split = np.split(losses, [rows[0].targets])
    assert [part.sum() for part in split] == pytest.approx([module(**r.tensors(CPU)).item() for r in rows], rel=1e-5)
    assert target_losses(module, [], CPU).shape == (0,)
