"""One idea of when two prompts are the same, for splits, mixtures and contamination checks."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from cascade.tasks import Example, Task


def normalise(text: str) -> str:
    """Compatibility-composed (NFKC), case-folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


Asked = tuple[str, tuple[str, ...]]
"""The last user message and, in chats of users' own, the messages before it; all normalised."""


def asked(of: Task | Example) -> Asked:
    """What is asked. What other benchmarks put before a question (instructions, examples, tools) is no part of it."""
    messages = of.messages
    last = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), len(messages))
    before = messages[:last] if of.benchmark == "jsonl" else ()
    question = messages[last].content if last < len(messages) else ""
    return normalise(question), tuple(normalise(m.content) for m in before)


class Questions:
    """What a set of tasks or examples asks: each last user message, with all that stands before it somewhere."""

    def __init__(self, of: Iterable[Task | Example]) -> None:
        self._before: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for question, before in map(asked, of):
            self._before[question].add(before)

    def before(self, question: str) -> set[tuple[str, ...]]:
        return self._before.get(question, set())


def tells(question: str, *sets: Questions) -> bool:
    """Whether a last user message is a question by itself; not if chats in one set differ only in what is before it."""
    return all(len(questions.before(question)) < 2 for questions in sets)


def asks_the_same(task: Task, others: Questions, own: Questions) -> bool:
    """Whether others ask what a task of a set asks: by its last message where that tells, else by the whole chat."""
    question, before = asked(task)
    there = others.before(question)
    return bool(there) and (tells(question, others, own) or not before or () in there or before in there)


def conversation_key(task: Task) -> str:
    """All that the model is shown: the normalised messages and choices."""
    return "\x1f".join(normalise(text) for text in (*(m.content for m in task.messages), *task.choices))


def text_hash(text: str, digits: int = 16) -> str:
    """The first hex digits of the SHA-256 of the normalised text."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:digits]
