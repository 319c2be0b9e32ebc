"""The front and its area, against the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.compression.pareto import front, hypervolume, leaders

POINTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30)


@given(POINTS)
def test_front_is_what_nothing_beats(points):
    found = front(points, lambda p: p)
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert found == sorted(set(points) - beaten)


@given(POINTS)
def test_hypervolume_counts_the_covered_cells(points):
    cells = np.zeros((10, 10), bool)
    for x, y in points:
        cells[x:, y:] = True
    assert hypervolume(points, (10.0, 10.0)) == cells.sum()


def test_values_that_are_no_numbers_are_never_on_the_front():
    assert front([(1.0, math.nan), (2.0, 3.0)], lambda p: p) == [(2.0, 3.0)]
    assert hypervolume([(0.5, math.nan), (math.nan, 0.5)], (1.0, 1.0)) == 0
    assert hypervolume([(0.5, 0.5)], (1.0, 1.0)) == pytest.approx(0.25)


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20), st.floats(0, 1))
def test_leaders_are_whole_fronts_until_there_are_enough(points, share):
    rest, expected = set(points), set()
    while rest and len(expected) < share * len(points):
        layer = {p for p in rest if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in rest)}
        expected |= layer
        rest -= layer
    found = leaders(sorted(points), lambda p: p, share)
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_what_is_no_number_never_leads():
    assert leaders([(1.0, math.nan), (2.0, 2.0), (1.0, 3.0)], lambda p: p, 1.0) == [(1.0, 3.0), (2.0, 2.0)]
