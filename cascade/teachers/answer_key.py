"""What the offline teacher says: the known answer up to a difficulty, something plausibly wrong beyond.

Everything is drawn from (seed, model, prompt, attempt), so the same request always gets the same answer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from cascade import benchmarks
from cascade.config import AnswerKey
from cascade.errors import DataError
from cascade.tasks import Task

UNKNOWN = "I do not know the answer to that."
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")
_WORD = re.compile(r"[^\W\d_]{2,}")
_OPPOSITES = ("yes no", "true false", "valid invalid", "heads tails", "left right", "correct incorrect")
_FLIP = {w: o for pair in _OPPOSITES for w, o in (pair.split(), pair.split()[::-1])}


@dataclass(frozen=True, slots=True)
class KeyItem:
    """One task's known answer. `kind` says which answers could be mistaken for each other."""

    prompt_hash: str
    kind: str
    difficulty: int
    answer: str


def prompt_hash(prompt: str) -> str:
    """SHA-256 (hex) by which a request's last user message finds its task."""
    return hashlib.sha256(prompt.strip().encode()).hexdigest()


def make_key(tasks: Iterable[Task]) -> list[KeyItem]:
    """The answer key of tasks, from their benchmarks; of a conversation, of its every step."""
    return [
        KeyItem(
            prompt_hash=prompt_hash(task.prompt),
            kind=f"{task.benchmark}/{task.category}",
            difficulty=task.difficulty,
            answer=benchmarks.get(task.benchmark).reference_answer(task),
        )
        for whole in tasks
        for task in benchmarks.right_steps(whole)
    ]


def write_key(items: Iterable[KeyItem], path: Path) -> None:
    """One JSON line per item."""
    path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_key(path: Path) -> list[KeyItem]:
    """
    Raises:
        DataError: the file is missing or is no answer key.
    """
    try:
        return [KeyItem(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not an answer key: {error}") from error


class Replayer:
    """Answers prompts from the key, as well as each model's ability allows."""

    def __init__(self, items: Sequence[KeyItem], seed: int) -> None:
        self._items = {item.prompt_hash: item for item in items}
        answers: dict[str, list[str]] = defaultdict(list)
        for item in items:
            answers[item.kind].append(item.answer)
        self._choices = {kind: _choices(given) for kind, given in answers.items()}
        self._seed = seed

    def reply(self, model: str, ability: AnswerKey, prompt: str, attempt: int = 0) -> str:
        """The answer of a model to a prompt; the same at every call."""
        item = self._items.get(prompt_hash(prompt))
        if item is None:
            return UNKNOWN
        draw = random.Random(hashlib.sha256(f"{self._seed}|{model}|{item.prompt_hash}|{attempt}".encode()).digest())
        if item.difficulty <= ability.max_difficulty and draw.random() >= ability.slip_rate:
            return item.answer
        return wrong_answer(item.answer, self._choices[item.kind], draw)


def _choices(answers: Sequence[str]) -> list[str]:
    """What a kind of task chooses its answers from; nothing if most answers are new, as with free numbers or text."""
    distinct = sorted(set(answers))
    return distinct if 2 * len(distinct) <= len(answers) else []


def wrong_answer(right: str, choices: Sequence[str], draw: random.Random) -> str:
    """A plausible answer that is not the right one, whatever case and white space are taken for.

    Args:
        right: the known answer.
        choices: what this kind of task chooses from; if there is such a choice, the answer is another one of it.
        draw: source of chance.
    """
    others = [c for c in choices if _plain(c) != _plain(right)]
    if others:
        return draw.choice(others)
    ways: list[Callable[[str, random.Random], str]] = [_flip_word, _shift_number, _swap_words, _swap_letters]
    for way in ways:
        wrong = way(right, draw)
        if _plain(wrong) != _plain(right):
            return wrong
    return f"{right}0" if right.strip() else "0"


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _flip_word(text: str, draw: random.Random) -> str:
    """One word of a pair of opposites (yes, true, heads …) turned into the other."""
    found = [m for m in _WORD.finditer(text) if m[0].lower() in _FLIP]
    if not found:
        return text
    hit = draw.choice(found)
    other = _FLIP[hit[0].lower()]
    other = other.upper() if hit[0].isupper() else other.capitalize() if hit[0][0].isupper() else other
    return text[: hit.start()] + other + text[hit.end() :]


def _shift_number(text: str, draw: random.Random) -> str:
    """One number off by a little: a slip in the sum, a tenth, one too many."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return text
    hit = draw.choice(found)
    decimals = len(hit[0].partition(".")[2])
    value, unit = float(hit[0]), 10.0**-decimals
    step = draw.choice([1, 1, 2, 10, max(1, round(abs(value) / unit * 0.1))]) * draw.choice([-1, 1]) * unit
    if value >= 0 and value + step < 0:
        step = -step
    shifted = f"{value + step:.{decimals}f}" if decimals else str(int(hit[0]) + round(step))
    return text[: hit.start()] + shifted + text[hit.end() :]


def _swap_words(text: str, draw: random.Random) -> str:
    """Two neighbouring different words in each other's place."""
    words = list(_WORD.finditer(text))
    pairs = [(a, b) for a, b in pairwise(words) if a[0].lower() != b[0].lower()]
    if not pairs:
        return text
    a, b = draw.choice(pairs)
    return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]


def _swap_letters(text: str, draw: random.Random) -> str:
    """Two neighbouring different letters in each other's place."""
    places = [i for i in range(len(text) - 1) if text[i : i + 2].isalpha() and text[i].lower() != text[i + 1].lower()]
    if not places:
        return text
    i = draw.choice(places)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
