"""Tasks are sent past a tier only where that is expected to be cheaper, and what it saved is measured on controls."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.config import Predictor
from cascade.tasks import Message, Task
from cascade.teachers.client import Answer
from cascade.teachers.predictor import Costs, Sent, first_wave, measure, send_past, task_features, tier_costs

COSTS = Costs(settled=0.1, failed=0.1, above=1.0)
SETTINGS = Predictor(enabled=True)


def tasks(count: int) -> list[Task]:
    return [
        Task(f"t/{i}", "b", "d", "train", (Message("user", "q"),), None, difficulty=1 + i % 2) for i in range(count)
    ]


def world(count: int, chance_of_hard: float, *, telling: bool = True, seed: int = 0):
    """Tasks of two kinds; of odd numbers the tier settles `chance_of_hard`, of even ones nine in ten."""
    rng = np.random.default_rng(seed)
    all_tasks = tasks(count)
    kind = np.array([i % 2 for i in range(count)]) if telling else rng.integers(0, 2, count)
    vectors = rng.normal(size=(count, 30)) + 2 * kind[:, None]
    outcome = {t.id: bool(rng.random() < (chance_of_hard if i % 2 else 0.9)) for i, t in enumerate(all_tasks)}
    if not telling:
        all_tasks = [Task(t.id, "b", "d", "train", t.messages, None) for t in all_tasks]
    return all_tasks, vectors.astype(np.float32), outcome


def shortcut(all_tasks, vectors, outcome, costs=COSTS, settings=SETTINGS):
    asked = set(first_wave([t.id for t in all_tasks], settings, seed=1))
    others = [t.id for t in all_tasks if t.id not in asked]
    known = {i: outcome[i] for i in outcome if i in asked}
    return send_past(known, others, task_features(all_tasks, vectors), costs, settings, 1), known


def test_hopeless_tasks_are_sent_past_and_it_saves_what_the_plain_cascade_pays() -> None:
    all_tasks, vectors, outcome = world(600, 0.0)
    sent, known = shortcut(all_tasks, vectors, outcome)
    hard = {t.id for i, t in enumerate(all_tasks) if i % 2}
    ids = {s.task_id for s in sent}
    assert len(ids & hard) > 0.8 * len(hard - known.keys())
    assert len(ids - hard) < 5
    assert 0.03 < np.mean([s.control for s in sent]) < 0.2
    plain = sum(COSTS.settled if ok else COSTS.failed + COSTS.above for ok in outcome.values())
    past = {s.task_id for s in sent if not s.control}
    ours = sum(COSTS.above if i in past else 0.1 + (0 if ok else COSTS.above) for i, ok in outcome.items())
    result = measure(1, sent, known | {s.task_id: outcome[s.task_id] for s in sent if s.control}, COSTS)
    assert ours < plain
    assert result.sent == len(past)
    assert result.low <= plain - ours <= result.high + 1e-9


def test_nothing_is_sent_past_where_the_tier_is_worth_its_price() -> None:
    assert shortcut(*world(600, 0.5))[0] == []
    free = Costs(settled=0.0, failed=0.0, above=1.0)
    assert shortcut(*world(600, 0.0), costs=free)[0] == []


def test_a_predictor_that_knows_nothing_sends_nothing() -> None:
    assert shortcut(*world(600, 0.0, telling=False))[0] == []
    assert shortcut(*world(40, 0.0))[0] == [], "too little to learn from"
    assert send_past({}, ["a"], {}, COSTS, SETTINGS, 1) == []


@pytest.mark.parametrize("count", [17, 23, 29, 31])
def test_it_learns_from_few_tasks(count: int) -> None:
    all_tasks, vectors, _ = world(60, 0.0)
    known = {t.id: i % 2 == 0 for i, t in enumerate(all_tasks[:count])}
    others = [t.id for t in all_tasks[count:]]
    sent = send_past(known, others, task_features(all_tasks, vectors), COSTS, SETTINGS, 1)
    assert {s.task_id for s in sent} <= {t.id for i, t in enumerate(all_tasks) if i % 2}


def test_the_first_wave_is_a_share_that_the_seed_draws() -> None:
    ids = [t.id for t in tasks(2000)]
    drawn = first_wave(ids, SETTINGS, seed=1)
    assert 0.2 < len(drawn) / 2000 < 0.3
    assert drawn == first_wave(ids, SETTINGS, seed=1)
    assert drawn != first_wave(ids, SETTINGS, seed=2)


def test_costs_are_those_that_were_paid_and_the_prices_above(make_teacher) -> None:
    def teacher(price: float, share: float):
        prices = {"input_usd_per_million": price, "output_usd_per_million": price}
        return make_teacher("http://x/v1", expected_share=share, **prices)

    def answer(task_id: str, cost: float, attempt: int = 0) -> Answer:
        return Answer(task_id, attempt, "m", 1, "a", cost, 600, 400, 0.1, "h", False)

    tiers = [teacher(1, 0.6), teacher(10, 0.3), teacher(100, 0.1)]
    answers = [answer("a", 0.1), answer("b", 0.1), answer("b", 0.3, 1)]
    costs = tier_costs(answers, {"a": True, "b": False}, tiers, 1)
    assert (costs.settled, costs.failed) == (pytest.approx(0.1), pytest.approx(0.4))
    assert costs.above == pytest.approx(1000 * 10 / 1e6 + 0.25 * 1000 * 100 / 1e6)
    assert tier_costs(answers, {"a": True}, tiers, 2).above == pytest.approx(0.1)


def test_a_loss_is_called_a_loss() -> None:
    sent = [Sent(str(i), 0.05, i < 10) for i in range(50)]
    lost = measure(1, sent, {str(i): i < 4 for i in range(10)}, COSTS)
    assert (lost.sent, lost.controls, lost.control_settled) == (40, 10, 4)
    assert lost.saving_usd == pytest.approx(40 * (0.6 * 0.1 - 0.4 * 0.9))
    assert lost.saving_usd < 0
    assert lost.low < lost.saving_usd < lost.high
    assert measure(1, [Sent("a", 0.1, False)], {}, COSTS).saving_usd == 0.0
