"""Clients of a teacher that is asked in batches, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cascade.config import Teacher
from cascade.store import Store
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.ledger import Ledger


@contextlib.asynccontextmanager
async def opened(path: Path, teacher: Teacher, **more: Any) -> AsyncIterator[TeacherClient]:
    """A client with a ledger below `path`; `seen` is the state of its budget."""
    ledger = Ledger(Store(str(path)))
    budget = LocalBudget(BudgetState("reasoning", 100.0))
    async with TeacherClient(teacher, 1, "reasoning", ledger, budget, **more) as client:
        client.seen = budget.state  # type: ignore[attr-defined]
        yield client
    ledger.close()
