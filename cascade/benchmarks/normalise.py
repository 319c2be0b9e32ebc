"""One idea of when two prompts are the same, for splits, mixtures and contamination checks."""

from __future__ import annotations

import hashlib
import unicodedata

from cascade.tasks import Task


def normalise(text: str) -> str:
    """Compatibility-composed (NFKC), case-folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(task: Task) -> str:
    """What two tasks share if they ask the same: the normalised last user message."""
    return normalise(task.prompt)


def conversation_key(task: Task) -> str:
    """All that the model is shown: the normalised messages and choices."""
    return "\x1f".join(normalise(text) for text in (*(m.content for m in task.messages), *task.choices))


def text_hash(text: str, digits: int = 16) -> str:
    """The first hex digits of the SHA-256 of the normalised text."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:digits]
