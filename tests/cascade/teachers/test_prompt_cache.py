"""Prompts that begin alike are asked together, and what the endpoint had cached is cheaper."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from mock_openai import MockOpenAI, Settings

from cascade.store import Store
from cascade.tasks import Message, Task
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.conversation import order_by_head
from cascade.teachers.ledger import Ledger

_PRICES = [10.0, 1.0, 100.0]
_TOPICS, _OF_EACH = 8, 12


async def _bill(server: MockOpenAI, teacher, tasks: list[Task], folder: str) -> tuple[float, Ledger]:
    """What the server wants for all answers if it remembers the beginnings of two prompts."""
    server.use(Settings(latency_s=0.0, cached_prompts=2, prices=_PRICES))
    ledger, budget = Ledger(Store(folder)), LocalBudget(BudgetState("reasoning", 100.0))
    async with TeacherClient(teacher, 1, "reasoning", ledger, budget) as client:
        await asyncio.gather(*(client.answer(task) for task in tasks))
    return server.counts.charged_usd, ledger


async def test_the_bill_falls_when_prompts_that_begin_alike_are_asked_together(
    serve_app, make_task, make_teacher, tmp_path
) -> None:
    server = MockOpenAI(Settings())
    limits = {"max_concurrency": 4, "cached_input_usd_per_million": 1.0}
    teacher = make_teacher(serve_app(server.app()), **limits)
    mixed = [
        dataclasses.replace(task, messages=(Message("system", f"Topic {n % _TOPICS}. " * 200), *task.messages))
        for n in range(_TOPICS * _OF_EACH)
        for task in [make_task(n)]
    ]
    dear, _ = await _bill(server, teacher, mixed, str(tmp_path / "mixed"))
    assert server.counts.cached_tokens == 0
    together = [mixed[n] for n in order_by_head(mixed, teacher)]
    cheap, ledger = await _bill(server, teacher, together, str(tmp_path / "together"))
    assert cheap < 0.5 * dear
    entries = list(ledger.entries())
    assert sum(e.cached_tokens for e in entries) == server.counts.cached_tokens > 0
    assert ledger.spent() == pytest.approx(cheap), "cached tokens are booked at their own price"
    missed = sum(not e.cached_tokens for e in entries)
    assert _TOPICS <= missed <= _TOPICS * 4, "of a topic, those that were sent before the first came back at most"
