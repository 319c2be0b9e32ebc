"""Conversations that are not trained on, with answers known to be right: what loss is measured on."""

from __future__ import annotations

from collections.abc import Sequence

from cascade import benchmarks
from cascade.errors import DataError
from cascade.tasks import Message, Task

Conversation = tuple[str, tuple[Message, ...]]
"""Task id and messages up to the answer."""


def held_out(tasks: Sequence[Task], most: int | None = None) -> list[Conversation]:
    """Chat tasks with their reference answers; those without one (code tasks without a solution) are left out.

    Args:
        most: of the tasks that have an answer; None: all of them.
    """
    found: list[Conversation] = []
    for task in tasks:
        if len(found) == most:
            break
        if task.form == "chat" and (answer := reference_answer(task)) is not None:
            found.append((task.id, (*task.messages, Message("assistant", answer))))
    return found


def reference_answer(task: Task) -> str | None:
    """A right answer to the task, or None where its benchmark has none."""
    try:
        return benchmarks.get(task.benchmark).reference_answer(task)
    except DataError:
        return None
