"""Contamination: does a training example overlap a test task?

Two rules, over normalised text (lower case, runs of letters and digits): the same question, or a shared sequence of
13 words, as in the GPT-3 paper (arXiv 2005.14165, appendix C). A sequence that stands in several test tasks is the
benchmark's boilerplate and tells nothing. Tasks of a procedural benchmark are made from templates, so that two of
them share long sequences by construction: there the same question decides, and n-grams only across benchmarks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cascade.tasks import Example, Message, Task

NGRAM = 13
BOILERPLATE_FROM = 3
"""A word sequence in so many test tasks or more is boilerplate."""
PROCEDURAL = frozenset({"reasoning_gym"})
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """One example that overlaps one test task.

    Attributes:
        example_id: the example's task id.
        rule: "same question" or "13-gram".
        evidence: the shared text.
    """

    example_id: str
    test_id: str
    rule: str
    evidence: str


def find_overlaps(examples: Iterable[Example], test_tasks: Sequence[Task]) -> list[Overlap]:
    """The first overlap of each example that has one, in the order of the examples."""
    questions = {words_of(t.prompt): t for t in test_tasks}
    owners = _distinctive_ngrams(test_tasks)
    found = []
    for example in examples:
        overlap = _same_question(example, questions) or _shared_ngram(example, owners)
        if overlap is not None:
            found.append(overlap)
    return found


def words_of(text: str) -> tuple[str, ...]:
    """Lower-cased runs of letters and digits."""
    return tuple(_WORD.findall(text.lower()))


def _ngrams(messages: Iterable[Message]) -> Iterator[tuple[str, ...]]:
    for message in messages:
        words = words_of(message.content)
        for start in range(len(words) - NGRAM + 1):
            yield words[start : start + NGRAM]


def _distinctive_ngrams(tasks: Sequence[Task]) -> dict[tuple[str, ...], list[Task]]:
    """Word sequences that few test tasks have, with those tasks."""
    per_task = [(task, set(_ngrams(task.messages))) for task in tasks]
    counts = Counter(ngram for _, ngrams in per_task for ngram in ngrams)
    owners: dict[tuple[str, ...], list[Task]] = {}
    for task, ngrams in per_task:
        for ngram in ngrams:
            if counts[ngram] < BOILERPLATE_FROM:
                owners.setdefault(ngram, []).append(task)
    return owners


def _same_question(example: Example, questions: dict[tuple[str, ...], Task]) -> Overlap | None:
    for message in example.messages:
        task = questions.get(words_of(message.content)) if message.role == "user" else None
        if task is not None:
            return Overlap(example.task_id, task.id, "same question", task.prompt)
    return None


def _shared_ngram(example: Example, owners: dict[tuple[str, ...], list[Task]]) -> Overlap | None:
    for ngram in _ngrams(example.messages):
        for task in owners.get(ngram, ()):
            if task.benchmark != example.benchmark or task.benchmark not in PROCEDURAL:
                return Overlap(example.task_id, task.id, f"{NGRAM}-gram", " ".join(ngram))
    return None
