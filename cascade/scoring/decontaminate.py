"""Keeping test tasks out of training data, and near-duplicates out of it.

Two checks per example and test task, over the words of their texts: the same normalised prompt, and a shared run of 13
words (the GPT-3 rule). Texts shorter than 13 words are compared whole. Near-duplicates are found by MinHash over word
5-grams (library `datasketch`), their Jaccard similarity then measured exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from datasketch import MinHash, MinHashLSH

from cascade.benchmarks.normalise import normalise
from cascade.tasks import Example, Task

NGRAM = 13
SHARED_BY, SHARED_SHARE = 10, 0.2
"""A run of words that more test tasks than this, and this share of their category, have in common is boilerplate (an
instruction, a template), not content."""
PHRASE = 5
"""Length in words of the runs by which boilerplate is known."""
CONTENT = 7
"""Words of a run that must lie outside boilerplate: "your task: write a function to find the sum of" proves nothing."""
TEMPLATED = frozenset({"reasoning_gym"})
"""Benchmarks whose prompts are filled-in templates: they share runs of words by construction, so that only a whole
prompt inside an example tells."""
_WORD = re.compile(r"\w+", re.UNICODE)


@dataclass(frozen=True, slots=True)
class Overlap:
    """An example that shares text with a test task.

    Attributes:
        example: position in the list of examples.
        task_id: of the test task.
        kind: "exact" for the same normalised prompt, "ngram" for a shared run of words.
        text: what they share.
    """

    example: int
    task_id: str
    kind: Literal["exact", "ngram"]
    text: str


def words(text: str) -> list[str]:
    """The words of a text, normalised."""
    return _WORD.findall(normalise(text))


def ngrams(text: str, n: int = NGRAM) -> Iterator[tuple[str, ...]]:
    """Every run of n words; the whole text if it is shorter (nothing if it is empty)."""
    found = words(text)
    if found:
        yield from (tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1)))


def _task_texts(task: Task) -> list[str]:
    """What of a test task must not be learned: its question, and the answer texts that are long enough to tell."""
    return [task.prompt, *(c for c in task.choices if len(words(c)) >= NGRAM), *_solutions(task)]


def _solutions(task: Task) -> list[str]:
    reference = task.reference if isinstance(task.reference, dict) else {}
    kept = (reference.get(key) for key in ("canonical_solution", "code", "solution"))
    return [text for text in kept if isinstance(text, str) and len(words(text)) >= NGRAM]


def _example_texts(example: Example) -> list[str]:
    return [m.content for m in example.messages]


def find_overlaps(examples: Sequence[Example], test_tasks: Iterable[Task], *, n: int = NGRAM) -> list[Overlap]:
    """Every example that overlaps a test task; the first shared run per pair.

    Args:
        examples: what is to be trained on.
        test_tasks: of all benchmarks and domains that will ever be reported.
        n: length of the runs in words.

    Returns:
        Overlaps by example, then task. An example without any is clean.
    """
    tasks = list(test_tasks)
    index = _index(tasks, n)
    whole = {i: " ".join(words(t.prompt)) for i, t in enumerate(tasks) if t.benchmark in TEMPLATED}
    prompts: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        prompts[normalise(task.prompt)].append(task.id)
    found = []
    for position, example in enumerate(examples):
        seen: set[str] = set()
        for text in _example_texts(example):
            for task_id in prompts.get(normalise(text), ()):
                if task_id not in seen:
                    seen.add(task_id)
                    found.append(Overlap(position, task_id, "exact", text))
            joined = " ".join(words(text))
            for run in ngrams(text, n):
                for number in index.get(_key(run), ()):
                    if tasks[number].id not in seen and whole.get(number, "") in joined:
                        seen.add(tasks[number].id)
                        found.append(Overlap(position, tasks[number].id, "ngram", " ".join(run)))
    return found


def _key(run: tuple[str, ...]) -> bytes:
    return hashlib.blake2b(" ".join(run).encode(), digest_size=12).digest()


def _index(tasks: Sequence[Task], n: int) -> dict[bytes, list[int]]:
    """Runs of full length -> numbers of the tasks that hold them, without boilerplate.

    Shorter texts are left to the comparison of whole prompts: a run of three words proves nothing.
    """
    texts = [[words(text) for text in _task_texts(task)] for task in tasks]
    boilerplate = _boilerplate(tasks, texts)
    index: dict[bytes, list[int]] = defaultdict(list)
    for number, own in enumerate(texts):
        for key in {key for text in own for key in _content_runs(text, n, boilerplate)}:
            index[key].append(number)
    return index


def _runs(text: Sequence[str], n: int) -> list[bytes]:
    return [_key(tuple(text[i : i + n])) for i in range(len(text) - n + 1)]


def _boilerplate(tasks: Sequence[Task], texts: Sequence[Sequence[list[str]]]) -> set[bytes]:
    """Phrases that too many tasks of one category share."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        groups[task.benchmark, task.category].append(number)
    found: set[bytes] = set()
    for members in groups.values():
        counts = Counter(k for number in members for k in {k for text in texts[number] for k in _runs(text, PHRASE)})
        limit = max(SHARED_BY, SHARED_SHARE * len(members))
        found |= {key for key, count in counts.items() if count > limit}
    return found


def _content_runs(text: Sequence[str], n: int, boilerplate: set[bytes]) -> Iterator[bytes]:
    """The runs of a text that tell it from others."""
    covered = [False] * len(text)
    for i, phrase in enumerate(_runs(text, PHRASE)):
        if phrase in boilerplate:
            covered[i : i + PHRASE] = [True] * PHRASE
    for i, key in enumerate(_runs(text, n)):
        if covered[i : i + n].count(False) >= min(n, CONTENT):
            yield key


def clean(examples: Sequence[Example], test_tasks: Iterable[Task]) -> tuple[list[Example], list[Overlap]]:
    """The examples that overlap no test task, and the overlaps of the others."""
    overlaps = find_overlaps(examples, test_tasks)
    dirty = {o.example for o in overlaps}
    return [e for i, e in enumerate(examples) if i not in dirty], overlaps


def deduplicate(
    examples: Sequence[Example], *, threshold: float = 0.8, permutations: int = 128, shingle: int = 5
) -> list[Example]:
    """The examples without near-duplicates: of two that are alike, the earlier stays.

    Args:
        examples: in order of preference.
        threshold: Jaccard similarity of the sets of word runs from which on two are alike. Two filled-in templates
            (`TEMPLATED`) are alike only if they are the same.
        permutations: of the MinHash; candidates that it proposes are compared exactly.
        shingle: length of the runs in words.
    """
    index = MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=permutations)
    sets: dict[str, set[tuple[str, ...]]] = {}
    kept = []
    for position, example in enumerate(examples):
        own = set(ngrams("\n".join(_example_texts(example)), shingle))
        sketch = MinHash(num_perm=permutations, seed=1)
        sketch.update_batch([" ".join(run).encode() for run in sorted(own)])
        limit = 1.0 if example.benchmark in TEMPLATED else threshold
        if any(_jaccard(own, sets[name]) >= limit for name in index.query(sketch)):
            continue
        name = str(position)
        index.insert(name, sketch)
        sets[name] = own
        kept.append(example)
    return kept


def _jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0
