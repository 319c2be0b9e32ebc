"""A few paid calls before a run, so that its plan rests on real prices. The run finds them in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cascade import benchmarks
from cascade.config import Config
from cascade.tasks import Task
from cascade.teachers.budget import LocalBudget
from cascade.teachers.client import Answer, TeacherClient
from cascade.teachers.conversation import estimate_prompt_tokens
from cascade.teachers.ledger import Ledger

MOST_CALLS = 20


async def buy_sample(
    config: Config, tasks: Sequence[Task], ledger: Ledger, calls: int, *, resolve: Mapping[str, str] | None = None
) -> list[Answer]:
    """Ask every tier a share of the calls, within the budget, and live also where the run will use batches.

    Tier 1 is asked tasks of all lengths. The next tiers are asked what the tier before failed, which is what the run
    will ask them too, and then others, so that every tier has its share.

    Args:
        tasks: those that the run may ask.
        calls: in all, at most 20.
        resolve: see `TeacherClient`.

    Raises:
        TeacherError, BudgetExceeded: as in the run.
    """
    budget = LocalBudget.of(config, ledger)
    answers: list[Answer] = []
    chosen = evenly_by_length(tasks, min(calls, MOST_CALLS))
    for tier, share in enumerate(_shares(min(calls, MOST_CALLS), len(config.tiers)), 1):
        teacher = config.tier(tier).model_copy(update={"mode": "live"})
        async with TeacherClient(teacher, tier, config.domain, ledger, budget, resolve=resolve) as client:
            asked = evenly_by_length(chosen, share) if tier == 1 else chosen[:share]
            found = await asyncio.gather(*(client.answer(task) for task in asked))
        answers += found
        solved = {t.id for t, a in zip(asked, found, strict=True) if a.ok and _passes(t, a)}
        failed = [t for t in asked if t.id not in solved]
        others = [t for t in chosen if t not in failed and t.id not in solved]
        chosen = [*failed, *others, *(t for t in asked if t.id in solved)]
    return answers


def evenly_by_length(tasks: Sequence[Task], count: int) -> list[Task]:
    """Tasks from all over the range of prompt lengths: a smaller error than as many drawn at random."""
    ordered = sorted(tasks, key=lambda t: (estimate_prompt_tokens(t.messages), t.id))
    step = len(ordered) / count if count else 0.0
    return ordered if count >= len(ordered) else [ordered[int((i + 0.5) * step)] for i in range(count)]


def _shares(calls: int, tiers: int) -> list[int]:
    """Calls of each tier, as even as can be."""
    return [calls // tiers + (tier < calls % tiers) for tier in range(tiers)]


def _passes(task: Task, answer: Answer) -> bool:
    return benchmarks.get(task.benchmark).score(task, answer.completion()).passed
