"""How well the functions that a conversation offers fit its question, as words that the router can read.

Whether a call is to be made is neither in the question nor in the functions but in what they have in common, and a
modifier that calls functions answers worse than the base where none of them is meant. Two things are counted, each of
the function where it is the most: the words that it and the question both say, and their share of the function's words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from cascade.benchmarks.offered_functions import SYSTEM_PROMPT

_BEFORE = SYSTEM_PROMPT.partition("{functions}")[0]
_WORD = re.compile(r"[^\W\d_]{4,}")
_HUMP = re.compile(r"([a-z])([A-Z])")
_STEM = 6
"""Letters by which two words are the same: "retrieve" and "retrieval"."""
_MOST_LETTERS = 16_000
"""That are read of a question, and of all functions together: bounded time per request."""
_MOST_COMMON, _PARTS = 8, 10
_KEPT, _MOST_KEPT = 64, 100_000
"""System messages whose functions are kept for the next request, and the letters of one: longer ones are read anew."""

Functions = Sequence[frozenset[str]]
"""The words of each function's name and description."""


def fit(question: str, functions: Functions) -> str:
    """What a question has in common with functions.

    Returns:
        "fitsa fitsb" for two words in common, "saysa saysb" for two tenths of the function's words, and so on: each
        step adds a word, so that more in common is more of the same to the router. "" without anything in common.
    """
    asked = _words(question[:_MOST_LETTERS])
    common = [(len(asked & own), len(own)) for own in functions]
    most = max((both for both, _ in common), default=0)
    share = max((both / own for both, own in common), default=0.0)
    return " ".join([*_steps("fits", min(most, _MOST_COMMON)), *_steps("says", int(_PARTS * share))])


def _steps(stem: str, count: int) -> list[str]:
    """Told apart by letters, since the router reads digits alike."""
    return [stem + chr(ord("a") + i) for i in range(count)]


def functions_of(system: str) -> Functions:
    """The functions that a system message describes; none where it lists them in another way.

    Args:
        system: for which `describes_functions` holds.
    """
    return _kept(system) if len(system) <= _MOST_KEPT else _read(system)


def _read(system: str) -> Functions:
    try:
        listed, _ = json.JSONDecoder().raw_decode(system, len(_BEFORE))
    except (ValueError, RecursionError):
        return ()
    found, room = [], _MOST_LETTERS
    for function in listed if isinstance(listed, list) else ():
        if isinstance(function, dict) and room > 0:
            text = f"{function.get('name', '')} {function.get('description', '')}"[:room]
            room -= len(text)
            found.append(_words(text))
    return tuple(words for words in found if words)


_kept = lru_cache(maxsize=_KEPT)(_read)


def _words(text: str) -> frozenset[str]:
    """Beginnings of the words of four letters and more, camel humps apart."""
    return frozenset(word[:_STEM] for word in _WORD.findall(_HUMP.sub(r"\1 \2", text).lower()))
