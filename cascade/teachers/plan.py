"""What a cascade of teachers is expected to cost, and how far that can be off.

The cost per failure is c1 + s2 c2 + s3 c3, with c the price of a task at a tier and s the share of the failures that
reaches it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade import benchmarks
from cascade.config import Config, Teacher
from cascade.scoring.statistics import Interval
from cascade.tasks import Task
from cascade.teachers.budget import price_usd
from cascade.teachers.conversation import estimate_tokens, teacher_messages
from cascade.teachers.ledger import LedgerEntry

EXPECTED_SHARES = (0.65, 0.225, 0.125)
"""Share of the failures that each tier is expected to settle, where the config does not say."""

_SHARES_WEIGHT = 100
"""How many tasks the expected shares are worth: so they are 55 to 74, 15 to 31 and 7 to 20 %, to 95 %."""
_MEASURED_FROM = 2
_FRAME_TOKENS = 4
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one tier is expected to do.

    Attributes:
        tasks: failures that reach the tier.
        calls: requests, further samples and the later steps of conversations included.
        prompt_tokens: over all calls, as `completion_tokens`.
        measured: number of earlier answers in the ledger that the tokens are taken from; 0: they are guessed.
        cost_usd: expected.
        budget_usd: the tier's limit, or the domain's.
        minutes: the least that the endpoints' limits allow.
    """

    tier: int
    teacher: str
    tasks: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    measured: int
    cost_usd: float
    budget_usd: float
    minutes: float


@dataclass(frozen=True)
class Plan:
    """What all tiers are expected to do.

    Attributes:
        interval: 95 % interval of `cost_usd`; None where a tier that costs something was never measured. It knows of
            the few answers that lengths were measured on, and that shares are as expected only about.
    """

    rows: tuple[PlanRow, ...]
    interval: Interval | None

    @property
    def cost_usd(self) -> float:
        return sum(row.cost_usd for row in self.rows)


@dataclass(frozen=True)
class _Call:
    """One request of a tier, in the mean.

    Attributes:
        cached: share of the prompt tokens.
        completions: tokens of each answer measured, empty if they are guessed.
    """

    prompt: float
    completion: float
    cached: float
    completions: tuple[int, ...]

    def price(self, teacher: Teacher, completion_factor: float = 1.0) -> float:
        """US dollars."""
        micro = 1_000_000  # tokens are whole numbers, means are not
        tokens = (self.prompt, self.completion * completion_factor, self.prompt * self.cached)
        return price_usd(teacher, *(round(t * micro) for t in tokens)) / micro


def plan(
    config: Config,
    tasks: Sequence[Task],
    *,
    failure_rate: float = 0.9,
    n_tasks: int | None = None,
    ledger: Iterable[LedgerEntry] = (),
    settled: Mapping[int, tuple[int, int]] | None = None,
    count_tokens: Callable[[str], int] = estimate_tokens,
) -> Plan:
    """Expected calls, tokens and cost of each tier, without spending anything.

    Args:
        tasks: the training tasks, or a sample of them: their prompts are measured. Conversations are taken to go as
            the right ones do.
        failure_rate: share of the tasks that the base fails, known or guessed.
        n_tasks: number of training tasks; None: as many as given.
        ledger: earlier rows; from 2 answers of a tier's teacher on, theirs are the completion tokens, the share of
            the prompt tokens that was cached, and what the prompts have that `count_tokens` does not see.
        settled: tier -> of how many tasks that it was asked, and how many of them it settled, where that is known;
            elsewhere the config's expectation is taken.
        count_tokens: tokens of a text; without a tokenizer about four characters each.
    """
    failures = (len(tasks) if n_tasks is None else n_tasks) * failure_rate
    measured: dict[str, list[LedgerEntry]] = defaultdict(list)
    for entry in ledger:
        if entry.responded and not entry.judge and not entry.round:
            measured[entry.teacher].append(entry)
    steps = [s for t in tasks for s in (benchmarks.right_steps(t) if t.max_turns > 1 else (t,))]
    asked = failures * len(steps) / max(1, len(tasks))
    calls = [_mean_call(t, steps, measured[t.name], count_tokens) for t in config.tiers]
    beliefs = _beliefs(config.tiers, settled or {})
    solved = [_share(belief) for belief in beliefs]
    counts = calls_of_tiers(asked, solved, config.tiers)
    entering, rows = failures, []
    for tier, (teacher, call, count) in enumerate(zip(config.tiers, calls, counts, strict=True), 1):
        budget = config.budget_usd if teacher.budget_usd is None else teacher.budget_usd
        rows.append(_plan_row(tier, teacher, entering, count, call, budget))
        entering *= 1 - solved[tier - 1]
    return Plan(tuple(rows), _interval(asked, beliefs, calls, rows, config.tiers))


def calls_of_tiers(failures: float, solved: Sequence[float], tiers: Sequence[Teacher]) -> list[float]:
    """Requests of each tier, of which a task goes on to the next where it is not solved.

    Args:
        failures: tasks that reach tier 1, or steps of them.
        solved: share of the tasks that each tier is asked which it settles within its samples.
    """
    calls, entering = [], failures
    for share, teacher in zip(solved, tiers, strict=True):
        calls.append(entering * expected_calls(share, teacher))
        entering *= 1 - share
    return calls


def expected_solved(tiers: Sequence[Teacher]) -> list[float]:
    """Share of the tasks that each tier is asked which it is expected to settle."""
    return [_share(belief) for belief in _beliefs(tiers, {})]


def _beliefs(tiers: Sequence[Teacher], settled: Mapping[int, tuple[int, int]]) -> list[tuple[float, float]]:
    """Of each tier: how many tasks it is taken to have been seen to settle, and not to settle.

    Where it was seen, Jeffreys' prior is added.
    """
    beliefs, remaining = [], 1.0
    for number, teacher in enumerate(tiers):
        share = EXPECTED_SHARES[number] if teacher.expected_share is None else teacher.expected_share
        left = max(0.0, remaining - share)
        left = left if left > 1e-9 else 0.0
        if number + 1 in settled:
            asked, right = settled[number + 1]
            beliefs.append((right + 0.5, asked - right + 0.5))
        else:
            beliefs.append((_SHARES_WEIGHT * min(share, remaining), _SHARES_WEIGHT * left))
        remaining = left
    return beliefs


def _share(belief: tuple[float, float]) -> float:
    return belief[0] / sum(belief) if sum(belief) else 1.0


def _mean_call(
    teacher: Teacher, steps: Sequence[Task], measured: Sequence[LedgerEntry], count_tokens: Callable[[str], int]
) -> _Call:
    lengths = [_prompt_tokens(s, teacher, count_tokens) for s in steps]
    prompt = _mean(lengths)
    if len(measured) < _MEASURED_FROM:
        return _Call(prompt, _guess_completion(teacher, steps, count_tokens), 0.0, ())
    first = {s.id: n for s, n in zip(reversed(steps), reversed(lengths), strict=True)}
    completions = tuple(e.completion_tokens for e in measured)
    return _Call(prompt * _prompt_ratio(measured, first), _mean(completions), _cached_share(measured), completions)


def _prompt_tokens(task: Task, teacher: Teacher, count_tokens: Callable[[str], int]) -> int:
    return sum(_FRAME_TOKENS + count_tokens(m.content) for m in teacher_messages(task, teacher))


def _plan_row(tier: int, teacher: Teacher, entering: float, calls: float, call: _Call, budget: float) -> PlanRow:
    requests = sum(e.requests_per_minute for e in teacher.endpoints)
    tokens = sum(e.tokens_per_minute for e in teacher.endpoints)
    return PlanRow(
        tier=tier,
        teacher=teacher.name,
        tasks=round(entering),
        calls=round(calls),
        prompt_tokens=round(calls * call.prompt),
        completion_tokens=round(calls * call.completion),
        measured=len(call.completions),
        cost_usd=calls * call.price(teacher),
        budget_usd=budget,
        minutes=max(calls / requests, calls * (call.prompt + call.completion) / tokens),
    )


def _interval(
    asked: float,
    beliefs: Sequence[tuple[float, float]],
    calls: Sequence[_Call],
    rows: Sequence[PlanRow],
    tiers: Sequence[Teacher],
) -> Interval | None:
    """95 % of the cost over draws of the shares and of the mean lengths.

    Lengths are taken to spread alike, in proportion to their mean, in all tiers: a handful of answers of one tells
    little of that.
    """
    if any(row.cost_usd and not row.measured for row in rows):
        return None
    found = {t.name: c.completions for t, c in zip(tiers, calls, strict=True) if sum(c.completions)}
    freedom = sum(len(tokens) - 1 for tokens in found.values())
    squares = sum((n / _mean(tokens) - 1) ** 2 for tokens in found.values() for n in tokens)
    spread = math.sqrt(squares / freedom) if freedom else 0.0
    rng, costs = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        solved = [rng.beta(*b) if all(b) else _share(b) for b in beliefs]
        counts = calls_of_tiers(asked, solved, tiers)
        error = [
            spread * rng.standard_t(freedom) / math.sqrt(len(c.completions)) if c.completions else 0 for c in calls
        ]
        prices = [c.price(t, math.exp(e)) for c, t, e in zip(calls, tiers, error, strict=True)]
        costs.append(sum(n * usd for n, usd in zip(counts, prices, strict=True)))
    low, high = np.quantile(costs, [0.025, 0.975])
    return Interval(float(low), float(high))


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
