"""Draws tasks from reasoning-gym generators in a process of its own: `python -m cascade.benchmarks.procedural`.

A child process, because some generators iterate over sets of strings (only a fixed hash seed makes them
deterministic), some loop for ever (only a process can be given a time limit that holds), and some (codeio) run
programs of the package that print, draw from the global random state, and write files where they stand: here standard
output is set aside, the state is seeded for every entry, and the folder is a temporary one.

It reads one JSON request from standard input and prints one JSON entry per line: the generator's number, the
question and the entry (see `pack`). A line with "error" reports a request that cannot be served.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from cascade.benchmarks.normalise import text_hash

ENTRY_SECONDS = 5.0
"""CPU seconds one entry may take before it is skipped."""
MAX_SLOW = 3
"""Skipped entries after which a generator counts as exhausted."""
MAX_REPEATS = 2_000
"""Draws in a row that bring nothing new for the split after which a generator counts as exhausted."""
SPLIT_SHARES = (("train", 0.6), ("validation", 0.15), ("test", 0.25))
"""Each distinct prompt belongs to the split that its own hash falls into, whatever the seed and the counts."""
_BLOCK = 2**20
"""Consecutive dataset seeds of one (seed, split, generator): entry i is drawn from seed start + i."""
_WINDOW = 2_000
"""Size of one dataset object; some generators prepare all entries of a dataset at once."""
_BLOCKS = 2**32 // _BLOCK // len(SPLIT_SHARES)
"""Blocks per split below 2**32; no block belongs to two splits."""


def split_of(question: str) -> str:
    """The one split that a prompt may appear in."""
    point, bound = int(text_hash(question), 16) / 16**16, 0.0
    for split, share in SPLIT_SHARES:
        bound += share
        if point < bound:
            return split
    return SPLIT_SHARES[-1][0]


def pack(value: Any) -> Any:
    """A value as JSON that `unpack` restores exactly: tuples, sets and dicts with other keys than text are tagged."""
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: pack(v) for k, v in value.items()}
        return {"$items": [[pack(k), pack(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [pack(v) for v in value]}
    if isinstance(value, set | frozenset):
        return {"$set": [pack(v) for v in value]}
    return [pack(v) for v in value] if isinstance(value, list) else value


def unpack(value: Any) -> Any:
    """The inverse of `pack` (a frozenset comes back as a set)."""
    if isinstance(value, list):
        return [unpack(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "$items" in value:
        return {unpack(k): unpack(v) for k, v in value["$items"]}
    if "$tuple" in value:
        return tuple(unpack(v) for v in value["$tuple"])
    if "$set" in value:
        return {unpack(v) for v in value["$set"]}
    return {k: unpack(v) for k, v in value.items()}


class _TooSlow(Exception):
    """An entry took longer than ENTRY_SECONDS."""


def _interrupt(*_: object) -> None:
    raise _TooSlow


@dataclass
class _Stream:
    """New entries of one generator for one split, until it has nothing new."""

    index: int
    generator: dict[str, Any]
    seed: int
    split: str
    seen: set[str]
    dataset: Any = None
    position: int = 0
    slow: int = 0

    def open(self, position: int) -> None:
        """Make the dataset of the window that starts at a position."""
        from reasoning_gym.factory import create_dataset

        options = self.generator["options"]
        self.dataset = create_dataset(self.generator["name"], seed=self.seed + position, size=_WINDOW, **options)

    def next(self) -> dict[str, Any] | None:
        for _ in range(MAX_REPEATS):
            entry = self._draw()
            if self.slow >= MAX_SLOW:
                return None
            if entry is None or split_of(entry["question"]) != self.split:
                continue
            key = text_hash(entry["question"])
            if key not in self.seen:
                self.seen.add(key)
                return entry
        return None

    def _draw(self) -> dict[str, Any] | None:
        if self.position and self.position % _WINDOW == 0:
            self.open(self.position % _BLOCK)
        random.seed(self.seed + self.position)
        numpy.random.seed((self.seed + self.position) % 2**32)
        signal.setitimer(signal.ITIMER_VIRTUAL, ENTRY_SECONDS, ENTRY_SECONDS)  # repeated: some kernels lose one
        try:
            entry: dict[str, Any] = self.dataset[self.position % _WINDOW]
            stored = json.loads(json.dumps(pack(entry)))
            return entry if unpack(stored) == entry and isinstance(entry["answer"], str) else None
        except _TooSlow:
            self.slow += 1
            return None
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self.position += 1


def _streams(request: dict[str, Any]) -> list[_Stream]:
    streams, seen = [], set[str]()
    names = [split for split, _ in SPLIT_SHARES]
    for index, generator in enumerate(request["generators"]):
        label = json.dumps([request["seed"], generator["name"], generator["options"]])
        block = random.Random(label).randrange(_BLOCKS) * len(names) + names.index(request["split"])
        stream = _Stream(index, generator, block * _BLOCK, request["split"], seen)
        stream.open(0)
        streams.append(stream)
    return streams


def draw(streams: list[_Stream], count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Entries of the streams in turn by weight; the rest go on when one is exhausted."""
    credit = [0.0] * len(streams)
    weights = [stream.generator["weight"] for stream in streams]
    alive = list(range(len(streams)))
    while alive and count > 0:
        for i in alive:
            credit[i] += weights[i]
        chosen = max(alive, key=lambda i: credit[i])
        credit[chosen] -= sum(weights[i] for i in alive)
        entry = streams[chosen].next()
        if entry is None:
            alive.remove(chosen)
            continue
        count -= 1
        yield streams[chosen].index, entry


def main() -> None:
    """Serve one request."""
    signal.signal(signal.SIGVTALRM, _interrupt)
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        streams = _streams(request)
    except (AssertionError, TypeError, ValueError) as error:
        answers.write(json.dumps({"error": f"{error}"}) + "\n")
        answers.close()
        return
    for index, entry in draw(streams, request["count"]):
        answers.write(json.dumps({"generator": index, "entry": pack(entry)}, ensure_ascii=True) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
