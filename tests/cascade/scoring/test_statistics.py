"""Intervals cover what they claim, paired tests agree with first principles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cascade.errors import DataError
from cascade.scoring.statistics import (
    Interval,
    Score,
    breakdown,
    mcnemar_exact,
    mean_interval,
    mean_of_scores,
    paired_bootstrap,
    paired_loss,
    pass_at_k,
    surely_lost,
    wilson,
)
from cascade.tasks import Message, Task, Verdict


def verdict(task_id: str, outcome: str) -> Verdict:
    return Verdict(task_id, "m", "", outcome)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 20, 0.2188, 0.6134)]
)
def test_wilson_matches_published_values(passed: int, n: int, low: float, high: float) -> None:
    interval = wilson(passed, n)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_nothing_passed_is_never_certain() -> None:
    for n in (1, 5, 500, 12_000):
        assert wilson(0, n).low == 0.0
        assert wilson(0, n).high > 0.0
        assert wilson(n, n).low < 1.0
    assert wilson(0, 0).high == 1.0


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(3, 2)


def test_wilson_covers_by_simulation() -> None:
    rng = np.random.default_rng(7)
    rates, sizes = (0.01, 0.1, 0.3, 0.5, 0.93), (50, 300)
    covered = [np.mean([r in wilson(int(k), n) for k in rng.binomial(n, r, size=1500)]) for r in rates for n in sizes]
    assert np.mean(covered) > 0.94
    assert min(covered) > 0.90  # a proportion near 0 with few tasks: Wilson's known worst case


def test_mcnemar_equals_the_binomial_sum_and_reads_both_forms() -> None:
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_exact(0, 0) == 1.0
    first, second = [True] + [False] * 9 + [True] * 5, [False] + [True] * 9 + [True] * 5
    assert mcnemar_exact(first, second) == mcnemar_exact(1, 9)
    with pytest.raises(ValueError, match="two counts"):
        mcnemar_exact(3, [True])


def test_mcnemar_false_alarms_stay_below_its_level() -> None:
    rng = np.random.default_rng(3)
    p = [mcnemar_exact(list(rng.random(200) < 0.4), list(rng.random(200) < 0.4)) for _ in range(800)]
    assert np.mean(np.array(p) < 0.05) <= 0.065


def test_paired_bootstrap_covers_the_difference_by_simulation() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        a = rng.random(150) < 0.3
        b = a | (rng.random(150) < 0.2)
        hits += 0.7 * 0.2 in paired_bootstrap(list(a), list(b), seed=trial, resamples=400)
    assert hits / 300 > 0.9


def test_paired_bootstrap_is_deterministic_and_paired() -> None:
    a, b = [0, 1] * 50, [0, 1] * 50
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="same tasks"):
        paired_bootstrap([1], [1, 0])


@pytest.mark.parametrize("n", [1, 10, 164, 12_000])
def test_what_never_changed_is_not_certain_to_stay(n: int) -> None:
    """No pair differs: as wide as Agresti and Min's interval, and narrower with more tasks."""
    same = paired_bootstrap([0] * n, [0] * n)
    assert same.low == -same.high
    assert same.high == pytest.approx(min(1.0, 1.96 / (n + 2)), rel=1e-3)
    gained, lost = paired_bootstrap([0] * n, [1] * n), paired_bootstrap([1] * n, [0] * n)
    assert (gained.high, lost.low) == (1.0, -1.0)
    assert gained.low == -lost.high < 1.0


def test_what_never_changed_covers_rare_changes_by_simulation() -> None:
    rng = np.random.default_rng(2)
    for rate in (0.0, 0.002, 0.005):
        hits = 0
        for trial in range(200):
            changed = rng.choice([0, 1], size=100, p=[1 - rate, rate])
            hits += rate in paired_bootstrap([0] * 100, changed.tolist(), seed=trial, resamples=200)
        assert hits / 200 > 0.93 if rate == 0 else hits / 200 > 0.8, rate


def test_an_interval_of_pass_at_k() -> None:
    assert mean_interval([0.0] * 20) == wilson(0, 20)
    assert mean_interval([1.0] * 20) == wilson(20, 20)
    values = [0.0, 0.5, 1.0, 1.0] * 25
    interval = mean_interval(values)
    assert 0.5 < interval.low < 0.625 < interval.high < 0.75


def test_pass_at_k_is_the_share_of_subsets_with_a_pass() -> None:
    samples = [True, True, False, False, False]
    subsets = list(itertools.combinations(samples, 3))
    assert pass_at_k(5, 2, 3) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 1, 6)


def test_score_counts_unparsed_and_errors_as_not_passed() -> None:
    score = Score.of([verdict(str(i), o) for i, o in enumerate(["pass", "fail", "unparsed", "error"])])
    assert (score.n, score.passed, score.unparsed, score.errors, score.accuracy) == (4, 1, 1, 1, 0.25)
    assert score.low < 0.25 < score.high
    assert str(Score.of([verdict(str(i), "fail") for i in range(20)])) == "0.0% [0.0%, 16.1%] (0/20)"
    assert (Score.of([]).low, Score.of([]).high) == (0.0, 1.0)
    halves = Score.of([verdict(task, outcome) for task in "ab" for outcome in ("pass", "fail")])
    assert (halves.n, halves.passed, halves.accuracy) == (2, 1.0, 0.5), "several answers to a task are one task"
    assert halves.low == wilson(1, 2).low


def test_the_mean_of_scores_is_unweighted_and_covers_by_simulation() -> None:
    def score(passed: int, n: int) -> Score:
        interval = wilson(passed, n)
        return Score(n, passed, 0, passed / n, interval.low, interval.high)

    mean, interval = mean_of_scores([score(0, 400), score(50, 100), score(50, 50)])
    assert mean == pytest.approx(0.5)
    assert interval.low < 0.5 < interval.high
    only = score(3, 10)
    assert mean_of_scores([only]) == (0.3, Interval(pytest.approx(only.low), pytest.approx(only.high)))
    rng = np.random.default_rng(4)
    sizes, rates = (400, 100, 50), (0.05, 0.3, 0.8)
    held = [
        np.mean(rates)
        in mean_of_scores([score(int(rng.binomial(n, r)), n) for n, r in zip(sizes, rates, strict=True)])[1]
        for _ in range(800)
    ]
    assert 0.93 < np.mean(held) < 0.98
    with pytest.raises(ValueError, match="no scores"):
        mean_of_scores([])


def test_breakdown_by_difficulty_sorts_and_refuses_strangers() -> None:
    tasks = [Task(f"b/{i}", "b", "d", "test", (Message("user", "q"),), None, difficulty=i % 3) for i in range(6)]
    verdicts = [verdict(t.id, "pass" if t.difficulty == 2 else "fail") for t in tasks]
    scores = breakdown(tasks, verdicts, "difficulty")
    assert [(k, s.passed, s.n) for k, s in scores.items()] == [(0, 0, 2), (1, 0, 2), (2, 2, 2)]
    assert set(breakdown(tasks, verdicts, lambda t: t.id[-1])) == set("012345")
    with pytest.raises(DataError, match="b/9"):
        breakdown(tasks, [verdict("b/9", "pass")])


def test_a_paired_loss_is_as_uncertain_as_it_varies() -> None:
    draws = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        changed = draws.choice([0, 1, -1], size=150, p=[0.9, 0.07, 0.03])
        found.append(paired_loss([c >= 0 for c in changed], [c <= 0 for c in changed]))
    losses, errors = np.array(found).T
    assert np.mean(losses) == pytest.approx(0.04, abs=0.002)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.06)


@pytest.mark.parametrize(("lost", "won", "surely"), [(3, 0, False), (5, 0, True), (9, 5, False), (5, 9, False)])
def test_a_few_tasks_lost_are_not_surely_a_loss(lost: int, won: int, surely: bool) -> None:
    before = [True] * lost + [False] * won + [True] * (120 - lost - won)
    after = [not b for b in before[: lost + won]] + before[lost + won :]
    assert surely_lost(before, after) == surely


def test_no_change_is_not_certain_to_be_none() -> None:
    assert paired_loss([True] * 98, [True] * 98) == (0.0, pytest.approx(0.01))
    with pytest.raises(ValueError, match="no tasks"):
        paired_loss([], [])
