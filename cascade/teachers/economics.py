"""What a cascade of teachers has cost, and what one expensive teacher alone would have cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.config import Teacher
from cascade.reports.summary import TierRow
from cascade.scoring.statistics import Interval, wilson
from cascade.tasks import Verdict
from cascade.teachers.budget import price_usd
from cascade.teachers.ledger import LedgerEntry


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """What the tiers have done with the failures.

    Attributes:
        tiers: one row each, as the report shows them.
        failures: n of all shares: the tasks that any tier was asked.
        shares: tier -> share of the failures that went no further than it.
        share_intervals: their Wilson intervals of 95 %.
        unsolved_share: what no tier settled.
        cost_usd: of all requests, with what those that broke off are expected to have cost.
        cost_single_teacher_usd: all failures by the last tier alone, see `single_teacher_cost`.
        saving: 1 - cost_usd / cost_single_teacher_usd; 0 if that would have cost nothing.
        saving_interval: 95 % bootstrap over tasks.
        settled: task id -> tier at which it came to rest, None if it is unsolved.
        paid: task id -> US dollars that were paid for it.
        single: task id -> US dollars that the last tier alone would have cost for it.
    """

    tiers: tuple[TierRow, ...]
    failures: int
    shares: dict[int, float]
    share_intervals: dict[int, Interval]
    unsolved_share: float
    cost_usd: float
    cost_single_teacher_usd: float
    saving: float
    saving_interval: Interval
    settled: Mapping[str, int | None]
    paid: Mapping[str, float]
    single: Mapping[str, float]


def tier_report(
    entries: Iterable[LedgerEntry], verdicts: Mapping[int, Iterable[Verdict]], teachers: Sequence[Teacher]
) -> CascadeReport:
    """Shares, costs and saving of a cascade that has run.

    Args:
        entries: rows of the ledger; only those of a tier and task that it has a verdict on count, and of the teacher
            that the tier has now.
        verdicts: tier -> verdicts on its teacher's answers, at least one for each task that it was asked. A tier's
            tasks that the next tier was asked too have not been settled by it, whatever their verdict (a probe may
            still have failed them).
        teachers: of tier 1, 2, …
    """
    passed: dict[int, dict[str, bool]] = {}
    for tier in range(1, len(teachers) + 1):
        passed[tier] = defaultdict(bool)
        for verdict in verdicts.get(tier, ()):
            passed[tier][verdict.task_id] |= verdict.passed
    rows = [
        e
        for e in entries
        if e.task_id in passed.get(e.tier, ()) and (e.judge or e.teacher == teachers[e.tier - 1].name)
    ]
    settled = settled_tiers(passed)
    tiers = tuple(_tier_row(t, teachers[t - 1], passed, settled, rows) for t in passed)
    failures = list(dict.fromkeys(task_id for asked in passed.values() for task_id in asked))
    single = single_teacher_cost(rows, failures, teachers[-1], len(teachers))
    paid: dict[str, float] = defaultdict(float)
    for row in rows:
        paid[row.task_id] += row.price_usd
    cost, alone = sum(paid.values()), sum(single.values())
    n = len(failures)
    return CascadeReport(
        tiers=tiers,
        failures=n,
        shares={t.tier: t.settled / n if n else 0.0 for t in tiers},
        share_intervals={t.tier: wilson(t.settled, n) for t in tiers},
        unsolved_share=(n - sum(t.settled for t in tiers)) / n if n else 0.0,
        cost_usd=cost,
        cost_single_teacher_usd=alone,
        saving=1 - cost / alone if alone else 0.0,
        saving_interval=saving_interval([paid[t] for t in failures], [single[t] for t in failures]),
        settled=settled,
        paid=paid,
        single=single,
    )


def settled_tiers(passed: Mapping[int, Mapping[str, bool]]) -> dict[str, int | None]:
    """The tier at which each failure came to rest, None if it is unsolved.

    Args:
        passed: tier -> task id -> whether an answer of this tier was verified.

    A task rests at the last tier that was asked it. Where nothing was asked above, it must have been verified there.
    """
    last = max((t for t in passed if passed[t]), default=0)
    rested = {task_id: tier for tier in sorted(passed) for task_id in passed[tier]}
    return {task: tier if tier < last or passed[tier][task] else None for task, tier in rested.items()}


def _tier_row(
    tier: int,
    teacher: Teacher,
    passed: Mapping[int, Mapping[str, bool]],
    settled: Mapping[str, int | None],
    rows: Sequence[LedgerEntry],
) -> TierRow:
    """What a tier did, and which tasks were sent past it."""
    paid = sum(r.price_usd for r in rows if r.tier == tier)
    own = [r for r in rows if r.tier == tier and r.responded]
    asked = passed[tier]
    above = {task_id for later, tasks in passed.items() if later > tier for task_id in tasks}
    return TierRow(
        tier=tier,
        teacher=teacher.name,
        answer_key=teacher.is_answer_key,
        tasks_in=len(asked),
        verified=sum(asked.values()),
        escalated=sum(1 for t in asked if settled[t] != tier),
        requests=len(own),
        input_tokens=sum(r.prompt_tokens for r in own),
        output_tokens=sum(r.completion_tokens for r in own),
        cost_usd=paid,
        skipped=len(above - asked.keys()),
        repairs=sum(r.round > 0 and not r.judge for r in own),
        judge_requests=sum(r.judge for r in own),
        judge_usd=sum(r.price_usd for r in own if r.judge),
    )


def single_teacher_cost(
    rows: Iterable[LedgerEntry], failures: Iterable[str], teacher: Teacher, tier: int
) -> dict[str, float]:
    """What each failure would have cost if the expensive teacher of `tier` had been asked alone, in US dollars.

    A task that this tier was asked costs what it did cost there: retries, repairs and judges included. Any other is
    taken to need one sample and no retry, with the mean tokens of the first answers that were really given to it, as
    many of them cached, at this teacher's price; and, if answers to it were judged, the judging of one answer.
    """
    of_task: dict[str, list[LedgerEntry]] = defaultdict(list)
    for row in rows:
        of_task[row.task_id].append(row)
    return {task_id: _single_cost(of_task[task_id], teacher, tier) for task_id in failures}


def _single_cost(rows: Sequence[LedgerEntry], teacher: Teacher, tier: int) -> float:
    there = [r.price_usd for r in rows if r.tier == tier]
    if there:
        return sum(there)
    priced: dict[tuple[int, int], float] = defaultdict(float)  # a conversation has several requests a sample
    for r in rows:
        if r.responded and not r.judge and r.round == 0:
            priced[r.tier, r.attempt] += price_usd(teacher, r.prompt_tokens, r.completion_tokens, r.cached_tokens)
    judged = {(r.tier, r.attempt, r.round) for r in rows if r.judge}
    judging = sum(r.price_usd for r in rows if r.judge) / len(judged) if judged else 0.0
    return (sum(priced.values()) / len(priced) if priced else 0.0) + judging


def saving_interval(paid: Sequence[float], single: Sequence[float], resamples: int = 2000) -> Interval:
    """95 % percentile bootstrap of 1 - sum(paid) / sum(single) over tasks."""
    if not sum(single):
        return Interval(0.0, 0.0)
    rng, ours, theirs = np.random.default_rng(0), np.asarray(paid), np.asarray(single)
    savings = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(ours), len(ours))
        total = theirs[drawn].sum()
        savings.append(1 - ours[drawn].sum() / total if total else 0.0)
    low, high = np.quantile(savings, [0.025, 0.975])
    return Interval(float(low), float(high))
