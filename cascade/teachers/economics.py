"""What a cascade of teachers is expected to cost, and what it has cost beside one expensive teacher.

The cost per failure is c1 + s2 c2 + s3 c3, with c the price of a request at a tier and s the share of the failures
that reaches it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade import benchmarks
from cascade.config import Config, Teacher
from cascade.reports.summary import TierRow
from cascade.scoring.statistics import Interval, wilson
from cascade.tasks import Task, Verdict
from cascade.teachers.budget import price_usd
from cascade.teachers.conversation import estimate_tokens, most_prompt_tokens, teacher_messages
from cascade.teachers.ledger import LedgerEntry

EXPECTED_SHARES = (0.65, 0.225, 0.125)
"""Share of the failures that each tier is expected to settle, where the config does not say."""

_MEASURED_FROM = 5
_FRAME_TOKENS = 4


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one tier is expected to do.

    Attributes:
        tasks: failures that reach the tier.
        calls: requests, further samples included.
        prompt_tokens: over all calls, as `completion_tokens`.
        tokens_from: "measured" if the tokens of earlier answers in the ledger were taken, else "estimated".
        cost_usd: expected.
        worst_cost_usd: if every sample were drawn and every answer as long as allowed, for the same tasks.
        budget_usd: the tier's limit, or the domain's.
        minutes: the least that the endpoints' limits allow.
    """

    tier: int
    teacher: str
    tasks: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    tokens_from: str
    cost_usd: float
    worst_cost_usd: float
    budget_usd: float
    minutes: float


def plan(
    config: Config,
    tasks: Sequence[Task],
    *,
    failure_rate: float = 0.9,
    n_tasks: int | None = None,
    ledger: Iterable[LedgerEntry] = (),
    count_tokens: Callable[[str], int] = estimate_tokens,
) -> list[PlanRow]:
    """Expected calls, tokens and cost of each tier, without spending anything.

    Args:
        tasks: the training tasks, or a sample of them: their prompts are measured.
        failure_rate: share of the tasks that the base fails, known or guessed.
        n_tasks: number of training tasks; None: as many as given.
        ledger: earlier rows; from 5 answers of a tier's teacher on, theirs are the completion tokens, the share of
            the prompt tokens that was cached, and what the prompts have that `count_tokens` does not see.
        count_tokens: tokens of a text; without a tokenizer about four characters each.
    """
    failures = (len(tasks) if n_tasks is None else n_tasks) * failure_rate
    measured: dict[str, list[LedgerEntry]] = defaultdict(list)
    for entry in ledger:
        if entry.responded and not entry.judge and not entry.round:
            measured[entry.teacher].append(entry)
    rows, remaining = [], 1.0
    for tier, teacher in enumerate(config.tiers, 1):
        share = EXPECTED_SHARES[tier - 1] if teacher.expected_share is None else teacher.expected_share
        solved = min(1.0, share / remaining) if remaining > 0 else 1.0
        budget = config.budget_usd if teacher.budget_usd is None else teacher.budget_usd
        rows.append(
            _plan_row(tier, teacher, tasks, failures * remaining, solved, measured[teacher.name], budget, count_tokens)
        )
        remaining = max(0.0, remaining - share)
    return rows


def _plan_row(
    tier: int,
    teacher: Teacher,
    tasks: Sequence[Task],
    entering: float,
    solved: float,
    measured: Sequence[LedgerEntry],
    budget: float,
    count_tokens: Callable[[str], int],
) -> PlanRow:
    """One tier; `solved` is the share of the `entering` tasks that it settles within its samples."""
    conversations = [teacher_messages(t, teacher) for t in tasks]
    lengths = [sum(_FRAME_TOKENS + count_tokens(m.content) for m in c) for c in conversations]
    known = len(measured) >= _MEASURED_FROM
    prompt = _mean(lengths)
    if known:
        prompt *= _prompt_ratio(measured, {t.id: n for t, n in zip(tasks, lengths, strict=True)})
        completion, cached = _mean([e.completion_tokens for e in measured]), _cached_share(measured)
    else:
        completion, cached = _guess_completion(teacher, tasks, count_tokens), 0.0
    calls = entering * expected_calls(solved, teacher)
    worst = price_usd(teacher, round(_mean([most_prompt_tokens(c) for c in conversations])), teacher.max_tokens)
    requests = sum(e.requests_per_minute for e in teacher.endpoints)
    tokens = sum(e.tokens_per_minute for e in teacher.endpoints)
    return PlanRow(
        tier=tier,
        teacher=teacher.name,
        tasks=round(entering),
        calls=round(calls),
        prompt_tokens=round(calls * prompt),
        completion_tokens=round(calls * completion),
        tokens_from="measured" if known else "estimated",
        cost_usd=calls * _price_of_means(teacher, prompt, completion, cached),
        worst_cost_usd=round(entering) * teacher.samples * (1 + teacher.repair_rounds) * worst,
        budget_usd=budget,
        minutes=max(calls / requests, calls * (prompt + completion) / tokens),
    )


def _price_of_means(teacher: Teacher, prompt: float, completion: float, cached_share: float) -> float:
    """US dollars of a mean request; through the Batch API if that is how the tier is asked."""
    micro = 1_000_000  # tokens are whole numbers, means are not
    usd = (
        price_usd(teacher, round(prompt * micro), round(completion * micro), round(prompt * cached_share * micro))
        / micro
    )
    return usd * (teacher.batch_price_share if teacher.mode == "batch" else 1.0)


def _prompt_ratio(measured: Sequence[LedgerEntry], estimated: Mapping[str, int]) -> float:
    """Prompt tokens that the endpoint counted for each one estimated, over the tasks of which both are known."""
    known = [(e.prompt_tokens, estimated[e.task_id]) for e in measured if e.task_id in estimated]
    total = sum(ours for _, ours in known)
    return sum(theirs for theirs, _ in known) / total if total else 1.0


def _cached_share(measured: Sequence[LedgerEntry]) -> float:
    prompt = sum(e.prompt_tokens for e in measured)
    return sum(e.cached_tokens for e in measured) / prompt if prompt else 0.0


def expected_calls(solved: float, teacher: Teacher) -> float:
    """Mean number of requests for a task that the teacher settles with probability `solved`.

    A repair round counts as one more sample; where all samples are drawn at once, all are paid.
    """
    rounds = 1 + teacher.repair_rounds
    if teacher.choose == "first":
        return expected_samples(solved, teacher.samples * rounds)
    by_one = 1.0 - (1.0 - solved) ** (1.0 / teacher.samples)
    return teacher.samples * expected_samples(by_one, rounds)


def expected_samples(solved: float, samples: int) -> float:
    """Mean number of attempts at a task if at most `samples` are drawn, one by one until one passes.

    Args:
        solved: probability that one of all the samples passes.
        samples: most attempts.
    """
    missed = (1.0 - solved) ** (1.0 / samples)  # by one sample
    return sum(missed**already for already in range(samples))


def _guess_completion(teacher: Teacher, tasks: Sequence[Task], count_tokens: Callable[[str], int]) -> float:
    """Completion tokens of one answer: an answer-key teacher's are known, of others half of the limit."""
    if not teacher.is_answer_key:
        return teacher.max_tokens / 2
    answers = [benchmarks.get(t.benchmark).reference_answer(t) for t in tasks]
    return _mean([min(count_tokens(a), teacher.max_tokens) for a in answers])


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """What the tiers have done with the failures.

    Attributes:
        tiers: one row each, as the report shows them.
        failures: n of all shares: the tasks that any tier was asked.
        shares: tier -> share of the failures that went no further than it.
        share_intervals: their Wilson intervals of 95 %.
        unsolved_share: what no tier settled.
        cost_usd: of all requests.
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
        entries: rows of the ledger; only those of a tier and task that it has a verdict on count.
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
    rows = [e for e in entries if e.responded and e.task_id in passed.get(e.tier, ())]
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
        saving_interval=_saving_interval([paid[t] for t in failures], [single[t] for t in failures]),
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
    own = [r for r in rows if r.tier == tier]
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
        cost_usd=sum(r.price_usd for r in own),
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
    taken to need one request and no retry, with the mean tokens of the first answers that were really given to it, as
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
    first = [r for r in rows if not r.judge and r.round == 0]
    priced = [price_usd(teacher, r.prompt_tokens, r.completion_tokens, r.cached_tokens) for r in first]
    judged = {(r.tier, r.attempt, r.round) for r in rows if r.judge}
    judging = sum(r.price_usd for r in rows if r.judge) / len(judged) if judged else 0.0
    return (sum(priced) / len(priced) if priced else 0.0) + judging


def _saving_interval(paid: Sequence[float], single: Sequence[float], resamples: int = 2000) -> Interval:
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
