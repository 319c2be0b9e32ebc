from __future__ import annotations

from dataclasses import replace

import pytest

from cascade.config import Config, check_config
from cascade.errors import BudgetExceeded
from cascade.store import Store
from cascade.tasks import Message
from cascade.teachers.ledger import Ledger
from cascade.teachers.plan import plan
from cascade.teachers.sample import allocate, buy_sample, evenly_by_length


@pytest.fixture
def make_config(make_teacher, tmp_path):
    def make(url: str, **changes) -> Config:
        teacher = make_teacher(url, **changes).model_dump()
        sources = {split: {"sources": [{"benchmark": "reasoning_gym"}]} for split in ("train", "validation", "test")}
        tiers = [teacher | {"name": f"model-{n}"} for n in (1, 2, 3)]
        raw = {"domain": "reasoning", "storage": str(tmp_path), "base": {"model": "b"}, "tasks": sources}
        return check_config(raw | {"tiers": tiers, "budget_usd": 5.0})

    return make


async def test_a_sample_is_small_measures_every_tier_and_is_never_paid_again(
    fake_server, make_config, make_task, tmp_path
) -> None:
    server, tasks = fake_server(), [make_task(n) for n in range(50)]
    config = make_config(server.url)
    guessed = plan(config, tasks, failure_rate=1.0).rows
    ledger = Ledger(Store(str(tmp_path)))
    answers = await buy_sample(config, tasks, ledger, 20)
    assert len(answers) == len(server.calls) == 20
    assert [sum(a.tier == t for a in answers) for t in (1, 2, 3)] == [13, 4, 3], "prices are equal, shares are not"
    measured = plan(config, tasks, failure_rate=1.0, ledger=ledger.entries()).rows
    assert [r.measured for r in guessed + measured] == [0, 0, 0, 13, 4, 3]
    price = (100 * 10 + 20 * 100) / 1e6
    assert measured[0].cost_usd == pytest.approx(50 * price), "the endpoint's own count of prompt tokens is taken"
    again = await buy_sample(config, tasks, Ledger(Store(str(tmp_path))), 20)
    assert all(a.from_ledger for a in again)
    assert len(server.calls) == 20


def test_a_plan_knows_the_price_of_batches_and_of_cached_prompts(fake_server, make_config, make_task) -> None:
    tasks = [make_task(n) for n in range(5)]
    live, batch = (make_config("http://x/v1", mode=mode) for mode in ("live", "batch"))
    for one, other in zip(plan(live, tasks).rows, plan(batch, tasks).rows, strict=True):
        assert other.cost_usd == pytest.approx(one.cost_usd / 2)


async def test_what_is_in_flight_when_a_sample_is_broken_off_is_kept(
    fake_server, make_config, make_task, tmp_path
) -> None:
    server = fake_server()
    server.delay = 0.2
    long = replace(make_task(3), messages=(Message("user", "x" * 1_000_000),))
    ledger = Ledger(Store(str(tmp_path)))
    with pytest.raises(BudgetExceeded):
        await buy_sample(make_config(server.url), [make_task(1), make_task(2), long], ledger, 9)
    assert len(server.calls) == len(ledger) == 2
    assert ledger.unsettled == 0


def test_a_sample_is_of_all_lengths(make_task) -> None:
    tasks = [make_task(10**n) for n in range(12)]
    assert [t.reference for t in evenly_by_length(tasks[::-1], 3)] == [2 * 10**n for n in (2, 6, 10)]
    assert len(evenly_by_length(tasks, 99)) == 12


async def test_the_calls_go_where_the_cost_is_and_to_what_was_failed_before(
    fake_server, make_config, make_task, tmp_path
) -> None:
    server, tasks = fake_server(), [make_task(n) for n in range(50)]
    config = make_config(server.url)
    dear = config.tiers[2].model_copy(update={"input_usd_per_million": 200.0, "output_usd_per_million": 2000.0})
    config = config.model_copy(update={"tiers": [*config.tiers[:2], dear]})
    answers = await buy_sample(config, tasks, Ledger(Store(str(tmp_path))), 20)
    asked = {t: [a.task_id for a in answers if a.tier == t] for t in (1, 2, 3)}
    assert [len(asked[t]) for t in (1, 2, 3)] == [5, 3, 12]
    assert set(asked[2]) <= set(asked[1]), "it was failed there"
    assert set(asked[1]) <= set(asked[3]), "and here, before tasks that nobody was asked"
    assert len(set(asked[3])) == 12


def test_calls_are_allocated_as_neyman_says() -> None:
    assert allocate([1.0, 1.0, 1.0], [0, 0, 0], 20) == [7, 7, 6]
    assert allocate([1.0, 2.0, 7.0], [0, 0, 0], 20) == [2, 4, 14]
    assert allocate([1.0, 2.0, 7.0], [3, 3, 3], 9) == [3, 3, 3]
    assert allocate([0.0, 0.0, 0.0], [1, 1, 1], 4) == [2, 1, 1]
