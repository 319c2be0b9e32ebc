"""Plain Python values as JSON text, the only thing that crosses a sandbox's wall.

Only values of exactly known types survive; everything else becomes an opaque `Remote` handle on the side that
receives it, equal to nothing but itself. So an object that claims to equal everything arrives as something that
equals nothing. Standard library alone: this file also runs inside the sandbox.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEMS = 1_000_000
"""Values taken from an iterator before it is cut; longest range that is read, since a few bytes can name any."""
ANSWERED = b"\n"
"""What the tests' process says after every answer of the candidate, where calls have a limit each."""
_PLAIN = (type(None), bool, str)
_BIG = 1 << 63
_ITERATORS: tuple[Any, ...] = (Iterator, map, filter, zip, range, type({}.keys()), type({}.values()), type({}.items()))


class Remote:
    """Something that lives on the other side: a name there, or the number of a kept object."""

    __slots__ = ("key",)

    def __init__(self, key: str | int) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<value of the candidate that is no plain literal: {self.key}>"


Keep = Callable[[Any], Any]
"""What becomes of a value that is no literal: an encoded handle, or an exception."""


def encode(value: Any, keep: Keep) -> Any:
    """A value as JSON-ready structure.

    Raises:
        Whatever `keep` raises for values that are no literals, and RecursionError for endless nesting.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if -_BIG < value < _BIG else {"$": "int", "v": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
    if kind is complex:
        return {"$": "complex", "v": [repr(value.real), repr(value.imag)]}
    if kind is list:
        return [encode(v, keep) for v in value]
    if kind in (bytes, bytearray):
        return {"$": kind.__name__, "v": value.hex()}
    if kind in (tuple, set, frozenset, deque):
        return {"$": kind.__name__, "v": [encode(v, keep) for v in value]}
    if kind is dict:
        return {"$": "dict", "v": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    if kind is range:
        return {"$": "range", "v": [value.start, value.stop, value.step]}
    if kind is Remote:
        return {"$": "remote", "v": value.key}
    return _encode_relative(value, keep)


def _encode_relative(value: Any, keep: Keep) -> Any:
    """Subclasses and look-alikes of literals, as the literal they stand for."""
    if isinstance(value, dict):
        return {"$": "dict", "v": [[encode(k, keep), encode(v, keep)] for k, v in dict.items(value)]}
    bases: tuple[Any, ...] = (int, float, str, tuple, list, set, frozenset)
    for base in bases:
        if isinstance(value, base) and type(value).__eq__ is base.__eq__:
            return encode(base(value), keep)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item(), keep)
    if isinstance(value, _ITERATORS):
        return {"$": "iterator", "v": [encode(v, keep) for v in itertools.islice(value, MAX_ITEMS)]}
    return keep(value)


def decode(data: Any, fetch: Callable[[str | int], Any]) -> Any:
    """The inverse of `encode`; `fetch` resolves handles.

    Raises:
        ValueError, TypeError, KeyError: the structure is not one that `encode` makes, or a range is too long.
    """
    if isinstance(data, list):
        return [decode(v, fetch) for v in data]
    if not isinstance(data, dict):
        return data
    kind, body = data["$"], data["v"]
    if kind == "dict":
        return {decode(k, fetch): decode(v, fetch) for k, v in body}
    if kind == "remote":
        return fetch(body)
    if kind == "iterator":
        return iter([decode(v, fetch) for v in body])
    collections: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
    if kind in collections:
        return collections[kind](decode(v, fetch) for v in body)
    scalars: dict[str, Callable[[Any], Any]] = {
        "int": lambda b: int(b, 16),
        "float": float,
        "complex": lambda b: complex(float(b[0]), float(b[1])),
        "bytes": bytes.fromhex,
        "bytearray": bytearray.fromhex,
        "range": _short_range,
    }
    return scalars[kind](body)


def _short_range(bounds: list[int]) -> range:
    numbers = range(*bounds)
    if numbers[MAX_ITEMS:]:
        raise ValueError(f"a range of more than {MAX_ITEMS} numbers")
    return numbers


def to_line(message: dict[str, Any]) -> bytes:
    """One message of the protocol as one line."""
    return json.dumps(message).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: the line is no JSON object.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a message must be an object")
    return message
