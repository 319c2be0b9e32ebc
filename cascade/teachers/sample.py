"""A few paid calls before a run, so that its plan rests on real prices. The run finds them in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import groupby

from cascade import benchmarks
from cascade.config import Config
from cascade.tasks import Task
from cascade.teachers import MOST_CALLS
from cascade.teachers.budget import LocalBudget, price_usd
from cascade.teachers.client import Answer, TeacherClient
from cascade.teachers.conversation import estimate_prompt_tokens
from cascade.teachers.ledger import Ledger
from cascade.teachers.plan import calls_of_tiers, expected_solved

_FIRST_CALLS = 3
"""Of each tier, before it is decided which tiers the other calls go to."""


async def buy_sample(
    config: Config, tasks: Sequence[Task], ledger: Ledger, calls: int, *, resolve: Mapping[str, str] | None = None
) -> list[Answer]:
    """Ask every tier a few tasks, within the budget, and live also where the run will use batches.

    After three calls each, the others go where the expected cost is least certain (Neyman allocation). Tier 1 is
    asked tasks of all lengths, the next tiers first what the one before failed, which is what the run will ask them.

    Args:
        tasks: those that the run may ask.
        calls: in all, at most 20.
        resolve: see `TeacherClient`.

    Raises:
        TeacherError, BudgetExceeded: as in the run.
    """
    budget, most = LocalBudget.of(config, ledger), min(calls, MOST_CALLS, len(tasks) * len(config.tiers))
    sampled = _Sampled(evenly_by_length(tasks, most))
    async with AsyncExitStack() as stack:
        clients = []
        for tier in range(1, len(config.tiers) + 1):
            teacher = config.tier(tier).model_copy(update={"mode": "live"})
            client = TeacherClient(teacher, tier, config.domain, ledger, budget, resolve=resolve)
            clients.append(await stack.enter_async_context(client))
        first = [min(n, _FIRST_CALLS) for n in allocate([1.0] * len(clients), [0] * len(clients), most)]
        for client, count in zip(clients, first, strict=True):
            await sampled.ask(client, count)
        wanted = allocate(_uncertainty(config, sampled.answers), first, most)
        for client, count, before in zip(clients, wanted, first, strict=True):
            await sampled.ask(client, count - before)
    return sampled.answers


class _Sampled:
    """Tasks that may be asked, and what was answered so far."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._solved: dict[tuple[str, int], bool] = {}  # (task id, tier) -> whether it solved it
        self.answers: list[Answer] = []

    async def ask(self, client: TeacherClient, count: int) -> None:
        """Put so many more tasks to a tier: those that the tiers below failed, then others, then what they solved."""
        tier = client.tier
        rank = {t.id: self._rank(t, tier) for t in self._tasks if (t.id, tier) not in self._solved}
        left = sorted((t for t in self._tasks if t.id in rank), key=lambda t: rank[t.id])
        chosen: list[Task] = []
        for _, alike in groupby(left, key=lambda t: rank[t.id]):
            chosen += evenly_by_length(list(alike), count - len(chosen))
        asked = [asyncio.ensure_future(client.answer(task)) for task in chosen]
        await asyncio.gather(*asked, return_exceptions=True)  # what is in flight is paid, whatever befalls another
        found = [answer.result() for answer in asked]
        self._solved |= {(t.id, tier): _passes(t, a) for t, a in zip(chosen, found, strict=True)}
        self.answers += found

    def _rank(self, task: Task, tier: int) -> int:
        verdicts = [self._solved[task.id, t] for t in range(1, tier) if (task.id, t) in self._solved]
        return 1 if not verdicts else 2 * verdicts[-1]


def allocate(uncertainty: Sequence[float], counts: Sequence[int], total: int) -> list[int]:
    """Calls of each tier, so that the variance of a sum of means is least.

    Args:
        uncertainty: of each tier: its share of the sum times the standard deviation of one call, in any unit.
        counts: calls that are made already.
        total: of all calls.
    """
    found = list(counts)
    while sum(found) < total:  # each next call where it takes most off u²/n
        gains = [u * u / (n * (n + 1)) if n else float("inf") for u, n in zip(uncertainty, found, strict=True)]
        found[gains.index(max(gains))] += 1
    return found


def _uncertainty(config: Config, answers: Sequence[Answer]) -> list[float]:
    """What each tier's completions are expected to cost for one failure: their spread goes with their mean."""
    calls = calls_of_tiers(1.0, expected_solved(config.tiers), config.tiers)
    found = []
    for tier, teacher in enumerate(config.tiers, 1):
        prices = [price_usd(teacher, 0, a.completion_tokens) for a in answers if a.tier == tier]
        found.append(calls[tier - 1] * sum(prices) / max(1, len(prices)))
    return found


def evenly_by_length(tasks: Sequence[Task], count: int) -> list[Task]:
    """Tasks from all over the range of prompt lengths: a smaller error than as many drawn at random."""
    ordered = sorted(tasks, key=lambda t: (estimate_prompt_tokens(t.messages), t.id))
    step = len(ordered) / count if count else 0.0
    return ordered if count >= len(ordered) else [ordered[int((i + 0.5) * step)] for i in range(count)]


def _passes(task: Task, answer: Answer) -> bool:
    return answer.ok and benchmarks.score(task, answer.completion()).passed
