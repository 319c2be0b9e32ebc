from __future__ import annotations

import random

import pytest
from three_tiers import PRICES

from cascade.tasks import Verdict
from cascade.teachers.budget import price_usd
from cascade.teachers.economics import settled_tiers, single_teacher_cost, tier_report
from cascade.teachers.ledger import LedgerEntry


def row(tier: int, task: str, tokens: int = 1000, **changes) -> LedgerEntry:
    price = tokens * 2 * PRICES[tier - 1][0] / 1e6
    values = {"key": f"{tier}{task}", "domain": "reasoning", "tier": tier, "task_id": task, "attempt": 0}
    values |= {"teacher": f"t{tier}", "endpoint": "u", "prompt_tokens": tokens, "completion_tokens": tokens}
    return LedgerEntry(**values | {"price_usd": price} | changes)


def verdicts(tier: int, **outcomes: str) -> list[Verdict]:
    return [Verdict(task, f"t{tier}", "", outcome) for task, outcome in outcomes.items()]


def test_shares_costs_and_saving(tiers) -> None:
    judged = {
        1: verdicts(1, a="pass", b="pass", c="fail", d="fail"),
        2: verdicts(2, b="pass", c="pass", d="unparsed"),  # a probe still failed b
        3: verdicts(3, d="fail"),
    }
    rows = [row(1, t) for t in "abcd"] + [row(2, t) for t in "bcd"] + [row(3, "d"), row(3, "d", attempt=1)]
    rows += [row(1, "zz"), row(1, "a", outcome="error", price_usd=0.0)]
    report = tier_report(rows, judged, tiers)
    assert report.failures == 4
    assert report.shares == {1: 0.25, 2: 0.5, 3: 0.0}
    assert report.unsolved_share == 0.25
    assert [t.tasks_in for t in report.tiers] == [4, 3, 1]
    assert [t.verified for t in report.tiers] == [2, 2, 0]
    assert [t.escalated for t in report.tiers] == [3, 1, 1]
    assert [t.requests for t in report.tiers] == [4, 3, 2]
    assert report.cost_usd == pytest.approx((4 * 0.05 + 3 * 0.2 + 2 * 1.0) * 2e-3)
    assert report.cost_single_teacher_usd == pytest.approx((3 * 1.0 + 2 * 1.0) * 2e-3)
    assert report.saving == pytest.approx(1 - 2.8 / 5)
    assert report.saving_interval.low < report.saving < report.saving_interval.high
    assert 0.25 in report.share_intervals[1]


def test_the_expected_shares_save_three_quarters(tiers) -> None:
    tasks = [f"t{n}" for n in range(1000)]
    judged = {
        1: verdicts(1, **{t: "pass" if n < 650 else "fail" for n, t in enumerate(tasks)}),
        2: verdicts(2, **{t: "pass" if n < 225 else "fail" for n, t in enumerate(tasks[650:])}),
        3: verdicts(3, **dict.fromkeys(tasks[875:], "pass")),
    }
    rows = [row(k, v.task_id, random.Random(v.task_id).randint(50, 500)) for k in judged for v in judged[k]]
    report = tier_report(rows, judged, tiers)
    assert report.shares == {1: 0.65, 2: 0.225, 3: 0.125}
    assert report.saving == pytest.approx(1 - (0.05 + 0.35 * 0.2 + 0.125), abs=0.03)
    assert report.saving in report.saving_interval


def test_what_another_teacher_was_asked_before_the_config_changed_is_no_cost_of_this_cascade(tiers) -> None:
    now = [row(1, "a"), row(3, "b")]
    before = [row(1, "a", teacher="older", price_usd=1.0), row(3, "b", teacher="dearer", price_usd=9.0)]
    judged = {1: verdicts(1, a="pass", b="fail"), 3: verdicts(3, b="pass")}
    assert tier_report(now + before, judged, tiers) == tier_report(now, judged, tiers)


def test_a_conversation_has_steps_and_no_repairs_and_costs_all_of_them_elsewhere_too(tiers) -> None:
    rows = [row(1, "a", key=f"step {n}", step=n) for n in range(10)]
    report = tier_report(rows, {1: verdicts(1, a="pass")}, tiers)
    assert report.tiers[0].repairs == 0
    assert report.cost_single_teacher_usd == pytest.approx(10 * price_usd(tiers[-1], 1000, 1000))


def test_an_empty_or_unfinished_cascade_has_a_report(tiers) -> None:
    assert tier_report([], {}, tiers).saving == 0.0
    report = tier_report([row(1, "a"), row(1, "b")], {1: verdicts(1, a="pass", b="fail")}, tiers)
    assert report.shares == {1: 0.5, 2: 0.0, 3: 0.0}
    assert report.unsolved_share == 0.5


def test_one_teacher_alone_is_not_charged_for_the_cheap_tiers_retries(tiers) -> None:
    rows = [row(1, "a", 100), row(1, "a", 300, attempt=1), row(1, "b", 100), row(3, "b", 500), row(3, "b", 700)]
    costs = single_teacher_cost(rows, ["a", "b", "c"], tiers[2], 3)
    assert costs["a"] == pytest.approx(price_usd(tiers[2], 200, 200))
    assert costs["b"] == pytest.approx(2 * (500 + 700) / 1e6)
    assert costs["c"] == 0.0


def test_tasks_sent_past_a_tier_are_counted_where_they_come_to_rest(tiers) -> None:
    judged = {
        1: verdicts(1, a="pass", b="fail"),  # c and d were sent past tier 1
        2: verdicts(2, b="fail", c="pass"),  # d past tier 2 as well
        3: verdicts(3, b="pass", d="fail"),
    }
    rows = [row(1, t) for t in "ab"] + [row(2, t) for t in "bc"] + [row(3, t) for t in "bd"]
    report = tier_report(rows, judged, tiers)
    assert report.failures == 4
    assert [(t.tasks_in, t.skipped, t.settled) for t in report.tiers] == [(2, 2, 1), (2, 1, 1), (2, 0, 1)]
    assert report.unsolved_share == 0.25
    assert report.cost_usd == pytest.approx(sum(r.price_usd for r in rows))
    assert settled_tiers({1: {"a": True, "b": False}, 2: {"b": False}}) == {"a": 1, "b": None}


def test_retries_and_judges_count_on_both_sides(tiers) -> None:
    def judge(tier: int, task: str, **more: object) -> LedgerEntry:
        return row(tier, task, judge=True, price_usd=0.001, **more)

    cheap = [row(1, "a", 100), row(1, "a", 100, round=1), judge(1, "a"), judge(1, "a"), judge(1, "a", round=1)]
    dear = [row(3, "b", 100), row(3, "b", 300, attempt=1), judge(3, "b"), judge(3, "b")]
    costs = single_teacher_cost(cheap + dear, ["a", "b"], tiers[2], 3)
    assert costs["a"] == pytest.approx(price_usd(tiers[2], 100, 100) + 0.003 / 2)
    assert costs["b"] == pytest.approx(800 / 1e6 + 0.002)
    report = tier_report(cheap + dear, {1: verdicts(1, a="pass"), 3: verdicts(3, b="pass")}, tiers)
    assert (report.tiers[0].requests, report.tiers[0].repairs, report.tiers[0].judge_requests) == (5, 1, 3)
    assert report.tiers[2].judge_usd == pytest.approx(0.002)
    assert report.cost_usd == pytest.approx(sum(r.price_usd for r in cheap + dear))


def test_what_broke_off_is_paid_but_says_nothing_of_an_answers_length(tiers) -> None:
    broken = {"outcome": "error", "prompt_tokens": 0, "completion_tokens": 0, "price_usd": 0.5}
    rows = [row(1, "a", 100), row(1, "a", **broken), row(3, "b", 100), row(3, "b", **broken)]
    report = tier_report(rows, {1: verdicts(1, a="pass"), 3: verdicts(3, b="pass")}, tiers)
    assert report.cost_usd == pytest.approx(sum(r.price_usd for r in rows))
    assert [t.requests for t in report.tiers] == [1, 0, 1]
    assert sum(t.cost_usd for t in report.tiers) == pytest.approx(report.cost_usd)
    assert report.single["a"] == pytest.approx(price_usd(tiers[2], 100, 100))
    assert report.single["b"] == pytest.approx(0.5 + 200 / 1e6)


def test_the_teacher_compared_with_is_as_cheap_as_its_batches(tiers) -> None:
    batched = tiers[2].model_copy(update={"mode": "batch", "batch_price_share": 0.5})
    costs = [single_teacher_cost([row(1, "a", 100)], ["a"], teacher, 3)["a"] for teacher in (tiers[2], batched)]
    assert costs[1] == pytest.approx(costs[0] / 2)


def test_cached_tokens_are_as_cheap_for_the_teacher_compared_with(tiers) -> None:
    dear = tiers[2].model_copy(update={"cached_input_usd_per_million": 0.1})
    costs = single_teacher_cost([row(1, "a", 1000, cached_tokens=600)], ["a"], dear, 3)
    assert costs["a"] == pytest.approx((400 * 1.0 + 600 * 0.1 + 1000 * 1.0) / 1e6)
