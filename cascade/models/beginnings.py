"""Which token sequences begin alike, and which of their common beginnings are worth computing once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

_SHORTEST = 16
"""Tokens that a shared beginning must have."""
COST = 128
"""Tokens whose computation costs about as much as a group of its own: one more pass over the weights."""

Tokens = Sequence[int]


@dataclass(frozen=True)
class Group:
    """Sequences that begin with the same `length` tokens; 0 for those that share nothing worth while."""

    length: int
    members: tuple[int, ...]


@dataclass
class _Interval:
    """Sorted sequences, from `left` on, that have `length` tokens in common, and the best way to group them."""

    length: int
    left: int
    saved: int = 0
    groups: list[Group] = field(default_factory=list)


def shared_beginnings(sequences: Sequence[Tokens], cost: int = COST) -> list[Group]:
    """Put sequences into groups so that the most tokens are computed once instead of many times.

    At least one token of each sequence is left over. A group may be split into groups with longer beginnings where
    that saves more. Works on the tree of common beginnings, from its leaves up, in linear time after sorting.

    Args:
        cost: of each group, in tokens.

    Returns:
        Groups that together hold every index once; the one that shares nothing comes last, if there is any such.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    alike = [_common(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]
    stack, closed = [_Interval(0, 0)], None
    for at, common in enumerate([*alike, -1] if order else []):
        left = at
        while stack and common < stack[-1].length:
            closed = _close(stack.pop(), at, order, sequences, cost)
            left = closed.left
            if stack and common <= stack[-1].length:
                _adopt(stack[-1], closed)
                closed = None
        if stack and common > stack[-1].length:
            stack.append(_Interval(common, left))
            if closed is not None:
                _adopt(stack[-1], closed)
                closed = None
    groups = closed.groups if closed is not None else []
    rest = set(range(len(sequences))).difference(*(group.members for group in groups))
    return [*groups, Group(0, tuple(sorted(rest)))] if rest else groups


def _adopt(parent: _Interval, child: _Interval) -> None:
    parent.saved += child.saved
    parent.groups += child.groups


def _close(interval: _Interval, right: int, order: list[int], sequences: Sequence[Tokens], cost: int) -> _Interval:
    """Decide whether an interval is one group or stays as its parts are grouped."""
    first = sequences[order[interval.left]]  # a sequence that is wholly the beginning of the others sorts first
    length = interval.length - (len(first) == interval.length)
    members = order[interval.left : right + 1]
    saved = (len(members) - 1) * length - cost
    if length >= _SHORTEST and saved > interval.saved:
        interval.saved, interval.groups = saved, [Group(length, tuple(members))]
    return interval


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)
