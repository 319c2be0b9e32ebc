"""The Pareto front of a search with two things to make small, and how much of the plane it covers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from cascade.scoring.statistics import surely_lost

Item = TypeVar("Item")
Point = tuple[float, float]


def front(items: Sequence[Item], key: Callable[[Item], Point]) -> list[Item]:
    """The items that no other one beats in one value without losing in the other, by the first value rising.

    Of items with equal values the first one counts. Values that are not numbers (NaN) are never on the front.
    """
    best: list[Item] = []
    lowest = float("inf")
    for item in sorted(items, key=key):
        second = key(item)[1]
        if second < lowest:
            best.append(item)
            lowest = second
    return best


def leaders(items: Sequence[Item], key: Callable[[Item], Point], share: float) -> list[Item]:
    """The best share of some items by non-dominated sorting: whole fronts, until there are that many.

    An item whose values are not numbers is never among them.
    """
    rest, best = [i for i in items if not any(map(math.isnan, key(i)))], list[Item]()
    while rest and len(best) < share * len(items):
        foremost = front(rest, key)
        best += foremost
        rest = [i for i in rest if not any(i is f for f in foremost)]
    return best


def best_of(drift: Sequence[float], passed: Sequence[Sequence[bool]]) -> int:
    """Of some candidates, the nearest to the uncompressed adapter, unless another is surely more accurate.

    Args:
        drift: of each, how far it is from the uncompressed adapter.
        passed: of each, whether it passed each of the same tasks.

    Returns:
        Its place.
    """
    most = max(passed, key=sum)
    level = [place for place, tasks in enumerate(passed) if not surely_lost(most, tasks)]
    return min(level, key=drift.__getitem__)


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area between a reference point and the front, what lies beyond the reference cut off (Zitzler 1999)."""
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    area, ceiling = 0.0, reference[1]
    for first, second in front(inside, lambda p: p):
        area += (reference[0] - first) * (ceiling - second)
        ceiling = second
    return area
