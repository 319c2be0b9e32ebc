"""What a cascade is expected to cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade import benchmarks
from cascade.config import ANSWER_KEY, check_config
from cascade.tasks import Message
from cascade.teachers.ledger import LedgerEntry
from cascade.teachers.plan import expected_calls, expected_samples, plan


def config(tiers, **changes):
    source = {"sources": [{"benchmark": "jsonl"}]}
    tasks = {"train": source, "validation": source, "test": source}
    raw = {"domain": "reasoning", "base": {"model": "m"}, "tasks": tasks, "budget_usd": 9.0}
    return check_config(raw | {"tiers": [t.model_dump() for t in tiers]} | changes)


def row(tier: int, tokens: int) -> LedgerEntry:
    values = {"key": "k", "domain": "reasoning", "tier": tier, "task_id": "x", "attempt": 0}
    return LedgerEntry(**values, teacher=f"t{tier}", endpoint="u", prompt_tokens=tokens, completion_tokens=tokens)


def measured(*lengths: int) -> list[LedgerEntry]:
    return [row(tier, tokens) for tier in (1, 2, 3) for tokens in lengths]


@given(st.floats(0.0, 1.0), st.integers(1, 8))
def test_expected_samples_are_between_one_and_all(solved: float, samples: int) -> None:
    assert expected_samples(solved, samples) + 1e-9 >= 1.0
    assert expected_samples(solved, samples) <= samples + 1e-9


def test_expected_samples_agree_with_a_simulation() -> None:
    draw, total = random.Random(0), 0
    for _ in range(20_000):
        for attempt in range(1, 4):
            if draw.random() < 0.4 or attempt == 3:
                total += attempt
                break
    assert expected_samples(1 - 0.6**3, 3) == pytest.approx(total / 20_000, rel=0.02)


def test_the_plan_follows_shares_prompts_and_prices(tiers, make_task) -> None:
    tasks = [make_task(n) for n in range(10, 60)]  # 16 to 18 characters: 4 or 5 tokens and the frame
    found = plan(config(tiers), tasks, failure_rate=0.9, n_tasks=10_000)
    rows = found.rows
    assert found.interval is None, "nothing was measured"
    assert [r.tasks for r in rows] == [9000, 3150, 1125]
    assert [r.calls for r in rows] == [9000, 3150, 1125]
    assert rows[0].prompt_tokens == 9000 * (4 + 4)
    assert rows[0].completion_tokens == 9000 * 25
    assert rows[0].cost_usd == pytest.approx(9000 * 33 * 0.05 / 1e6)
    assert rows[2].cost_usd == pytest.approx(1125 * 33 / 1e6)
    assert rows[0].budget_usd == 9.0
    measured = plan(config(tiers), tasks, n_tasks=10_000, ledger=[row(1, 40) for n in range(5)]).rows
    assert (measured[0].measured, measured[1].measured) == (5, 0)
    assert measured[0].completion_tokens == 9000 * 40


def test_the_plan_knows_what_an_answer_key_will_say(make_teacher, make_task) -> None:
    teachers = [
        make_teacher(ANSWER_KEY, name=f"answer-key-{n}", answer_key={"max_difficulty": n}, samples=2, expected_share=s)
        for n, s in ((1, 0.5), (2, 0.5), (3, 0.0))
    ]
    rows = plan(config(teachers), [make_task(n) for n in range(10, 50)], failure_rate=1.0, n_tasks=100).rows
    assert [r.tasks for r in rows] == [100, 50, 0]
    assert rows[0].calls == round(100 * 0.5 / (1 - 0.5**0.5))
    assert rows[1].calls == 50
    assert rows[0].completion_tokens == rows[0].calls


def test_every_step_of_a_conversation_is_a_request(tiers, make_task, monkeypatch) -> None:
    def steps(task):
        said = (Message("assistant", "12345678"), Message("user", "And then?"))
        return [replace(task, messages=(*task.messages, *(said * n))) for n in range(3)]

    monkeypatch.setattr(benchmarks, "right_steps", steps)
    tasks = [make_task(n) for n in range(10, 20)]
    talks = [replace(t, max_turns=8) for t in tasks]
    single, talking = (plan(config(tiers), t, failure_rate=1.0).rows for t in (tasks, talks))
    assert [r.tasks for r in talking] == [r.tasks for r in single]
    assert talking[0].calls == 3 * single[0].calls == 30
    assert talking[0].prompt_tokens == 3 * single[0].prompt_tokens + 10 * (1 + 2) * (4 + 2 + 4 + 3)
    first = [replace(row(1, 40), task_id=t.id, prompt_tokens=16) for t in tasks]  # twice as many as estimated
    assert plan(config(tiers), talks, failure_rate=1.0, ledger=first).rows[0].prompt_tokens == pytest.approx(
        2 * talking[0].prompt_tokens
    )


def test_the_plan_counts_repairs_and_samples_drawn_at_once(tiers, make_teacher) -> None:
    def teacher(**changes: object):
        return make_teacher("http://x/v1", **changes)

    assert expected_calls(0.75, teacher(samples=2)) == pytest.approx(1.5)
    assert expected_calls(0.75, teacher(repair_rounds=1)) == pytest.approx(1.5)
    assert expected_calls(0.75, teacher(samples=2, choose="shortest")) == pytest.approx(2)
    assert expected_calls(0.75, teacher(samples=2, choose="shortest", repair_rounds=1)) > 2
    assert expected_calls(0.0, teacher(samples=2, repair_rounds=2)) == pytest.approx(6)


def test_the_interval_holds_the_cost_and_shrinks_with_what_is_known(tiers, make_task) -> None:
    tasks = [make_task(n) for n in range(10, 60)]
    few = plan(config(tiers), tasks, ledger=measured(20, 30, 40))
    many = plan(config(tiers), tasks, ledger=measured(*[20, 30, 40] * 40))
    known = plan(config(tiers), tasks, ledger=measured(*[20, 30, 40] * 40), settled={1: (9000, 5850), 2: (3150, 2025)})
    assert few.interval is not None
    assert few.cost_usd == pytest.approx(sum(r.cost_usd for r in few.rows))
    assert [r.measured for r in few.rows] == [3, 3, 3]
    widths = [p.interval.high - p.interval.low for p in (few, many, known)]
    assert widths[0] > 1.3 * widths[1] > 1.3 * widths[2]
    assert all(p.cost_usd in p.interval for p in (few, many, known))
    assert widths[2] < 0.1 * known.cost_usd


def test_the_shares_of_finished_tiers_take_the_place_of_expected_ones(tiers, make_task) -> None:
    tasks = [make_task(n) for n in range(10, 60)]
    found = plan(config(tiers), tasks, failure_rate=1.0, n_tasks=10_000, settled={1: (100_000, 40_000)})
    assert found.rows[1].tasks == pytest.approx(6000, abs=30)
    assert found.rows[2].tasks == pytest.approx(6000 * 0.125 / 0.35, abs=30)
