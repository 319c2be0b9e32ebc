"""Numbers with their uncertainty: scores with intervals, paired comparisons, pass@k.

Sources: Wilson (1927) for the interval of a proportion; McNemar (1947) in its exact binomial form for paired
verdicts; Efron's percentile bootstrap over tasks for paired differences, and Agresti and Min (2005) where all
differences are the same; Chen et al. 2021 (arXiv 2107.03374) for the unbiased pass@k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb, fsum, sqrt
from typing import Literal

import numpy as np
from scipy.special import ndtri

from cascade.errors import DataError
from cascade.tasks import Task, Verdict

BOOTSTRAP_CELLS = 4_000_000
"""Most resampled values held in memory at once (8 bytes each)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval of a figure."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def wilson(passed: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion. Never empty: 0 of n still has an upper bound above 0.

    Args:
        passed: successes; a fraction where trials succeeded in part.
        n: trials; with 0 nothing is known and the interval is [0, 1].
        level: coverage, e.g. 0.95.

    Raises:
        ValueError: not 0 <= passed <= n.
    """
    if not 0 <= passed <= n:
        raise ValueError(f"{passed} of {n} is no proportion")
    if n == 0:
        return Interval(0.0, 1.0)
    z = float(ndtri(0.5 + level / 2))
    rate, z2n = passed / n, z * z / n
    centre = (rate + z2n / 2) / (1 + z2n)
    half = z * sqrt(rate * (1 - rate) / n + z2n / (4 * n)) / (1 + z2n)
    return Interval(0.0 if passed == 0 else max(0.0, centre - half), 1.0 if passed == n else min(1.0, centre + half))


def mcnemar_exact(b: int | Sequence[bool], c: int | Sequence[bool]) -> float:
    """Two-sided p-value that two models, judged on the same tasks, are equally good.

    Args:
        b: tasks that only the first passed, or all verdicts of the first (one bool per task).
        c: tasks that only the second passed, or all verdicts of the second in the same order.

    Returns:
        p of the exact binomial test of the discordant pairs; 1.0 where there are none.

    Raises:
        ValueError: sequences of different lengths, or a count beside a sequence.
    """
    if isinstance(b, int) and isinstance(c, int):
        only_first, only_second = b, c
    elif isinstance(b, int) or isinstance(c, int):
        raise ValueError("give two counts of discordant tasks or two sequences of verdicts")
    else:
        pairs = [(bool(x), bool(y)) for x, y in zip(b, c, strict=True)]
        only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    from scipy.stats import binomtest  # a second to import, which all that reads a score would pay

    return float(binomtest(only_first, discordant, 0.5).pvalue)


def paired_loss(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """By how much accuracy fell between two verdicts on each task, and the standard error of that.

    Returns:
        Shares of the tasks. The error is Agresti and Min's (Statistics in Medicine 24, 2005): half a task is added to
        either kind of change, so that it is not 0 where nothing changed.

    Raises:
        ValueError: no tasks, or sequences of different lengths.
    """
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        raise ValueError("no tasks to compare on")
    lost, won, n = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
    return (lost - won) / n, _agresti_min_error(lost + won, lost - won, n)


def surely_lost(before: Sequence[bool], after: Sequence[bool]) -> bool:
    """Whether accuracy fell by more than two standard errors (`paired_loss`) between two verdicts on each task."""
    lost, error = paired_loss(before, after)
    return lost > 2 * error


def _agresti_min_error(changed: float, net: float, n: int) -> float:
    """Standard error of a paired difference of shares, half a task added to either kind of change."""
    return math.sqrt(changed + 1 - net**2 / (n + 2)) / (n + 2)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile interval of mean(b) - mean(a), resampling tasks (both values of a task stay together).

    Where the difference is the same for all tasks (none, mostly) there is nothing to resample, and what was not seen to
    vary is not certain: the interval is then Agresti and Min's, which narrows with the number of tasks.

    Args:
        a: value of each task under the first model, from 0 to 1 (bools count as 0 and 1).
        b: value of each task under the second, same order.
        seed: of the resampling; the same seed gives the same interval.
        resamples: bootstrap samples.
        level: coverage.

    Raises:
        ValueError: no tasks, or a different number of them.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired values need the same tasks, got {len(a)} and {len(b)}")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n, rng = len(difference), np.random.default_rng(seed)
    if np.ptp(difference) == 0.0:
        same, net = float(difference[0]), float(difference.sum())
        reach = float(ndtri(0.5 + level / 2)) * _agresti_min_error(float((difference**2).sum()), net, n)
        centre = net / (n + 2)
        return Interval(max(-1.0, min(same, centre - reach)), min(1.0, max(same, centre + reach)))
    means: list[float] = []
    while len(means) < resamples:
        rows = min(resamples - len(means), max(1, BOOTSTRAP_CELLS // n))
        means.extend(difference[rng.integers(0, n, size=(rows, n))].mean(axis=1))
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes, from n samples of which c passed.

    Raises:
        ValueError: fewer samples than k, or more passes than samples.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} cannot be estimated from {c} of {n} samples")
    return 1.0 - comb(n - c, k) / comb(n, k)


def mean_interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> Interval:
    """Interval of the mean over tasks of values from 0 to 1 (pass@k, say): percentile bootstrap over tasks.

    Wilson's where all values are the same, so that 0 of n is not certain.

    Raises:
        ValueError: no values.
    """
    if len(set(values)) == 1:
        return wilson(fsum(values), len(values), level)
    return paired_bootstrap([0.0] * len(values), values, seed=seed, level=level)


def mean_of_scores(scores: Sequence[Score]) -> tuple[float, Interval]:
    """The unweighted mean of accuracies on different tasks, with an interval from theirs (MOVER, Zou and Donner 2008).

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no scores to take the mean of")
    n, mean = len(scores), fsum(s.accuracy for s in scores) / len(scores)
    below = sqrt(fsum((s.accuracy - s.low) ** 2 for s in scores)) / n
    above = sqrt(fsum((s.high - s.accuracy) ** 2 for s in scores)) / n
    return mean, Interval(max(0.0, mean - below), min(1.0, mean + above))


def passes_by_task(verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
    """Task id -> (answers that passed, answers), for `pass_at_k`."""
    found: dict[str, tuple[int, int]] = {}
    for verdict in verdicts:
        passes, samples = found.get(verdict.task_id, (0, 0))
        found[verdict.task_id] = passes + verdict.passed, samples + 1
    return found


@dataclass(frozen=True, slots=True)
class Score:
    """The share of tasks passed, with its Wilson interval.

    Several verdicts of one task (sampled answers) count as one task that passed in part: the accuracy is the mean
    pass@1, and the interval that of as many trials as there are tasks, which is too wide rather than too narrow.

    Attributes:
        n: tasks counted.
        passed: of them, with fractions where tasks have several verdicts. Outcome "error" counts as not passed, so
            that broken runs cannot flatter a score.
        unparsed: answers in which nothing could be read (counted as not passed, shown apart).
        errors: verdicts that say nothing of the answer (scorer or model broke).
        low, high: 95 % interval of the accuracy.
    """

    n: int
    passed: float
    unparsed: int
    accuracy: float
    low: float
    high: float
    errors: int = 0

    @classmethod
    def of(cls, verdicts: Iterable[Verdict], level: float = 0.95) -> Score:
        """Count verdicts. Without any, accuracy is 0 and the interval [0, 1]."""
        judged = list(verdicts)
        outcomes = [v.outcome for v in judged]
        by_task = passes_by_task(judged)
        n = len(by_task)
        passed: float = outcomes.count("pass")
        if n < len(judged):
            passed = fsum(passes / samples for passes, samples in by_task.values())
        interval = wilson(passed, n, level)
        return cls(
            n=n,
            passed=passed,
            unparsed=outcomes.count("unparsed"),
            accuracy=passed / n if n else 0.0,
            low=interval.low,
            high=interval.high,
            errors=outcomes.count("error"),
        )

    def __str__(self) -> str:
        text = f"{self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.passed:g}/{self.n}"
        text += f", {self.unparsed} unparsed" if self.unparsed else ""
        return text + (f", {self.errors} errors)" if self.errors else ")")


Key = Literal["benchmark", "category", "difficulty", "split", "domain"]


def breakdown(
    tasks: Iterable[Task], verdicts: Iterable[Verdict], key: Key | Callable[[Task], str | int] = "category"
) -> dict[str | int, Score]:
    """Scores per group of tasks, groups in sorted order.

    Args:
        tasks: at least those that the verdicts judge.
        verdicts: of one model.
        key: a field of Task, or a function of the task.

    Raises:
        DataError: a verdict judges a task that is not among `tasks`.
    """
    by_id = {task.id: task for task in tasks}
    groups: dict[str | int, list[Verdict]] = {}
    for verdict in verdicts:
        task = by_id.get(verdict.task_id)
        if task is None:
            raise DataError(f"a verdict judges the task {verdict.task_id!r}, which is not among the tasks given")
        group = getattr(task, key) if isinstance(key, str) else key(task)
        groups.setdefault(group, []).append(verdict)
    return {group: Score.of(groups[group]) for group in sorted(groups, key=lambda g: (isinstance(g, str), g))}
