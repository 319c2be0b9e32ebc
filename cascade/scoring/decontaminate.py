"""Keeping test tasks out of training data, and near-duplicates out of it.

Three checks per example and test task. *exact*: a message is the task's question or its whole prompt, normalised.
*question*: a message holds the whole question, if that has 8 words or more. *ngram*: it shares a run of 13 words with
the task (the GPT-3 rule) that is more than boilerplate. A last message that chats share tells nothing: they are the
same if what is before it is, and share runs of that. Near-duplicates are found by MinHash over word 5-grams (library
`datasketch`), their Jaccard similarity then measured exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from datasketch import MinHash, MinHashLSH

from cascade.benchmarks.normalise import Questions, asked, normalise, tells
from cascade.benchmarks.questions import questions, unwrapped
from cascade.tasks import Example, Task

NGRAM = 13
WHOLE = 8
"""Words from which on a whole question inside a message tells; shorter ones ("Which of these is true?") must be all of
it."""
SHARED_BY, SHARED_SHARE = 10, 0.2
"""A run of words that more test tasks than this, and this share of their category, have in common is boilerplate (an
instruction, a template), not content."""
PHRASE = 5
"""Length in words of the runs by which boilerplate is known."""
CONTENT = 7
"""Words of a run that must lie outside boilerplate: "your task: write a function to find the sum of" proves nothing."""
TEMPLATED = frozenset({"reasoning_gym"})
"""Benchmarks whose prompts are filled-in templates: they share runs of words by construction, so that only a whole
prompt inside an example tells, its symbols included ("3 + 4" is not "3 - 4")."""
_EDGES = " .,;:!?\"'`*"
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
"""Scripts without blanks between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer): each letter counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
"""Soft hyphens and the like, which part no words."""


Kind = Literal["exact", "question", "ngram"]
Run = tuple[str, ...]
"""Of words."""
Key = TypeVar("Key", bytes, Run)


@dataclass(frozen=True, slots=True)
class Overlap:
    """An example that shares text with a test task.

    Attributes:
        example: position in the list of examples.
        task_id: of the test task.
        kind: "exact" for the same normalised text, "question" for a whole question within a message, "ngram" for a
            shared run of words.
        text: what they share.
    """

    example: int
    task_id: str
    kind: Kind
    text: str


def words(text: str) -> list[str]:
    """The words of a text, normalised."""
    return _WORD.findall(normalise(text).translate(_INVISIBLE))


def ngrams(text: str, n: int = NGRAM) -> Iterator[tuple[str, ...]]:
    """Every run of n words; the whole text if it is shorter (nothing if it is empty)."""
    found = words(text)
    if found:
        yield from (tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1)))


def _task_texts(task: Task, chat: list[str] | None) -> list[str]:
    """What of a test task must not be learned: its questions, and the answer texts that are long enough to tell.

    `chat` stands for a last message that tells nothing.
    """
    asks = [task.prompt] if chat is None else chat
    return [*asks, *questions(task)[1:], *(c for c in task.choices if len(words(c)) >= NGRAM), *_solutions(task)]


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
    chats = _chats(tasks, examples)
    known, runs = _Questions(tasks), _index(tasks, n, chats)
    found = []
    for position, example in enumerate(examples):
        seen: set[int] = set()
        for text in _example_texts(example):
            own = words(text)
            shared = itertools.chain(
                ((number, "exact", text) for number in known.equal(example.benchmark, text)),
                ((number, "question", tasks[number].prompt) for number in known.within(text, own)),
                ((number, "ngram", " ".join(run)) for run in _windows(own, n) for number in runs.get(_key(run), ())),
            )
            for number, kind, what in shared:
                if number not in seen and (kind == "ngram" or number not in chats or chats[number].is_in(example)):
                    seen.add(number)
                    found.append(Overlap(position, tasks[number].id, kind, what))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True, slots=True)
class _Chat:
    """What a test task whose last message tells nothing has before it.

    Attributes:
        before: the messages, normalised.
        own: those that no other chat has: instructions are shared.
    """

    before: tuple[str, ...]
    own: list[str]

    def is_in(self, example: Example) -> bool:
        """Whether an example may be that chat: it has all its messages, or nothing before its question that differs."""
        return not asked(example)[1] or set(self.before) <= {normalise(text) for text in _example_texts(example)}


def _chats(tasks: Sequence[Task], examples: Sequence[Example]) -> dict[int, _Chat]:
    """The chats, by number of the task."""
    there, here = ([asked(one) for one in many] for many in (tasks, examples))
    sets = Questions(tasks), Questions(examples)
    shared = set[str]()
    for side in (there, here):
        counts = Counter(message for before in {before for _, before in side} for message in set(before))
        shared |= {message for message, count in counts.items() if count > 1}
    return {
        number: _Chat(before, [message for message in before if message not in shared])
        for number, (question, before) in enumerate(there)
        if before and not tells(question, *sets)
    }


class _Questions:
    """The questions of test tasks, to be found as a whole message or within one.

    A question is looked up by its rarest run of `WHOLE` words. Where several questions have the same words and differ
    in symbols alone (brackets to be closed, signs of a sum), and in templates, the symbols must be there as well.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._equal: dict[str, list[int]] = defaultdict(list)
        self._texts: dict[str, list[int]] = defaultdict(list)
        for number, task in enumerate(tasks):
            bare = questions(task)
            for key in {_bare(task.prompt), _bare(bare[0])}:
                self._equal[key].append(number)
            for key in dict.fromkeys(map(normalise, bare)):
                self._texts[key].append(number)
        spoken = {text: " ".join(words(text)) for text in self._texts}
        said = Counter(spoken.values())
        self._spoken = {
            text: None if said[own] > 1 or tasks[self._texts[text][0]].benchmark in TEMPLATED else own
            for text, own in spoken.items()
        }
        runs = {text: [_key(run) for run in _windows(own.split(), WHOLE)] for text, own in spoken.items()}
        counts = Counter(key for keys in runs.values() for key in keys)
        self._anchors: dict[bytes, list[str]] = defaultdict(list)
        for text, keys in runs.items():
            if keys:
                self._anchors[min(keys, key=counts.__getitem__)].append(text)

    def equal(self, benchmark: str, text: str) -> Iterator[int]:
        """Tasks whose question or prompt is all of a text, or of what the benchmark's prompt wraps in it."""
        for key in dict.fromkeys([_bare(text), _bare(unwrapped(benchmark, text))]):
            yield from self._equal.get(key, ())

    def within(self, text: str, own: Sequence[str]) -> Iterator[int]:
        """Tasks whose whole question is in a text, of which `own` are the words."""
        candidates = {q: None for run in _windows(own, WHOLE) for q in self._anchors.get(_key(run), ())}
        if candidates:
            spoken, written = f" {' '.join(own)} ", normalise(text)
            for question in candidates:
                bare = self._spoken[question]
                if f" {bare} " in spoken if bare is not None else _holds(written, question):
                    yield from self._texts[question]


def _bare(text: str) -> str:
    """A text normalised, without marks at its ends; as it is if there is nothing else."""
    return normalise(text).strip(_EDGES) or text


def _holds(text: str, question: str) -> bool:
    """Whether a normalised text holds a question that neither begins nor ends within a word of it."""
    return re.search(rf"(?<!\w){re.escape(question)}(?!\w)", text) is not None


def _windows(text: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n words."""
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def _key(run: tuple[str, ...]) -> bytes:
    return hashlib.blake2b(" ".join(run).encode(), digest_size=12).digest()


def _index(tasks: Sequence[Task], n: int, chats: Mapping[int, _Chat]) -> dict[bytes, list[int]]:
    """Runs of full length -> numbers of the tasks that hold them, without boilerplate.

    Shorter texts are left to the comparison of whole questions, and so are templates.
    """
    alone = {number: chat.own for number, chat in chats.items()}
    texts = [
        [] if task.benchmark in TEMPLATED else [words(text) for text in _task_texts(task, alone.get(number))]
        for number, task in enumerate(tasks)
    ]
    boilerplate = _boilerplate(tasks, texts)
    index: dict[bytes, list[int]] = defaultdict(list)
    for number, own in enumerate(texts):
        for key in {key for text in own for key in _content_runs(text, n, boilerplate)}:
            index[key].append(number)
    return index


def _runs(text: Sequence[str], n: int) -> list[bytes]:
    return [_key(run) for run in _windows(text, n)]


def _boilerplate(tasks: Sequence[Task], texts: Sequence[Sequence[list[str]]]) -> set[bytes]:
    """Phrases that too many tasks of one category share."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        groups[task.benchmark, task.category].append(number)
    found: set[bytes] = set()
    for members in groups.values():
        found |= _shared([{key for text in texts[number] for key in _runs(text, PHRASE)} for number in members])
    return found


def _shared(of_each: Sequence[set[Key]]) -> set[Key]:
    """What more members of a group have than content would be in, see `SHARED_BY`."""
    counts = Counter(key for own in of_each for key in own)
    limit = max(SHARED_BY, SHARED_SHARE * len(of_each))
    return {key for key, count in counts.items() if count > limit}


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

    Alike are two whose questions are, and all that users and assistants say. System messages, with their instructions
    and tools, tell nothing, nor does what many questions share (as `SHARED_BY` has it).

    Args:
        examples: in order of preference.
        threshold: Jaccard similarity of the sets of word runs from which on two are alike. Two filled-in templates
            (`TEMPLATED`) are alike only if they are the same.
        permutations: of the MinHash; candidates that it proposes are compared exactly.
        shingle: length of the runs in words.
    """
    index = MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=permutations)
    asks = _without_boilerplate(examples, [set(ngrams(_asked_in(e), shingle)) for e in examples])
    said = [set(ngrams("\n".join(m.content for m in e.messages if m.role != "system"), shingle)) for e in examples]
    kept: list[int] = []
    for number, example in enumerate(examples):
        sketch = MinHash(num_perm=permutations, seed=1)
        sketch.update_batch([" ".join(run).encode() for run in sorted(asks[number])])
        limit = 1.0 if example.benchmark in TEMPLATED else threshold
        others = index.query(sketch)
        if any(min(_jaccard(of[number], of[other]) for of in (asks, said)) >= limit for other in others):
            continue
        index.insert(number, sketch)
        kept.append(number)
    return [examples[number] for number in kept]


def _asked_in(example: Example) -> str:
    """What users say in an example, without what the benchmark puts around it."""
    return "\n".join(unwrapped(example.benchmark, m.content) for m in example.messages if m.role == "user")


def _without_boilerplate(examples: Sequence[Example], asks: Sequence[set[Run]]) -> list[set[Run]]:
    """The runs of questions less those that many of a benchmark, or of a category, share.

    All of them where nothing else is left.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        for group in ((example.benchmark,), (example.benchmark, example.category)):
            groups[group].append(number)
    own = [set(runs) for runs in asks]
    for members in groups.values():
        shared = _shared([asks[number] for number in members])
        for number in members:
            own[number] -= shared
    return [left or runs for left, runs in zip(own, asks, strict=True)]


def _jaccard(a: set[Run], b: set[Run]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0
