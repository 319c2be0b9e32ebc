"""What has been computed of prompts and answers, for those that begin alike: a template, a system message, turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence

from cascade.models.caches import Prefix
from serve.jobs import Key

_SHORTEST = 8
"""Tokens that must be alike for it to be worth while."""


class Kept:
    """Keys and values of token sequences, bounded in bytes; those that nobody used for longest go first.

    They are kept by the version of the modifier that they were computed under, and are found under that one alone.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held: OrderedDict[tuple[Key, tuple[int, ...]], Prefix] = OrderedDict()
        self.nbytes = 0

    def find(self, key: Key, tokens: Sequence[int]) -> Prefix | None:
        """The longest beginning of a prompt that is known under a version, without the prompt's last token."""
        prompt = tuple(tokens[:-1])
        best, length = None, _SHORTEST - 1
        for name in self._held:
            if name[0] == key and (alike := _alike(name[1], prompt)) > length:
                best, length = name, alike
        if best is None:
            return None
        self._held.move_to_end(best)
        return self._held[best].cut(length)

    def keep(self, key: Key, prefix: Prefix) -> None:
        """Keep what has been computed under a version, in place of what it goes on from; not what exceeds the bound."""
        tokens = prefix.tokens
        if prefix.nbytes > self._most:
            return
        for name in [n for n in self._held if n[0] == key]:
            alike = _alike(name[1], tokens)
            if alike == len(tokens):
                self._held.move_to_end(name)
                return
            if alike == len(name[1]):
                self._drop(name)
        self._held[key, tokens] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._most:
            self._drop(next(iter(self._held)))

    def retain(self, keys: Container[Key]) -> None:
        """Forget what was computed under any other version."""
        for name in [n for n in self._held if n[0] not in keys]:
            self._drop(name)

    def _drop(self, name: tuple[Key, tuple[int, ...]]) -> None:
        self.nbytes -= self._held.pop(name).nbytes


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with alike; by halving, as comparing slices takes no time."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
