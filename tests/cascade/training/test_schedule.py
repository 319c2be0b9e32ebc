"""The learning rate: up in a straight line, down along the wanted curve, never nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.config import Lora
from cascade.training.schedule import learning_rate_at

SHAPES = ("cosine", "linear", "constant")


def rates(total=100, **settings):
    wanted = Lora(learning_rate=2.0, **settings)
    return [learning_rate_at(i, total, wanted) / 2 for i in range(total)]


@pytest.mark.parametrize("schedule", SHAPES)
def test_it_warms_up_in_a_straight_line(schedule):
    found = rates(warmup_share=0.1, schedule=schedule)
    assert found[:11] == pytest.approx([*((i + 1) / 10 for i in range(10)), 1.0])


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "last"),
    [("cosine", 0.05 + 0.95 * 0.853553, 0.525, 0.0503), ("linear", 0.7625, 0.525, 0.0605), ("constant", 1, 1, 1)],
)
def test_each_schedule_falls_along_its_own_curve(schedule, quarter, half, last):
    found = rates(110, warmup_share=0.0909, schedule=schedule)
    assert (found[35], found[60], found[-1]) == pytest.approx((quarter, half, last), abs=1e-3)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_the_floor_is_a_share_of_the_highest_rate():
    assert rates(1000, schedule="linear", final_rate=0.3)[-1] == pytest.approx(0.3, abs=1e-3)
    assert rates(1000, schedule="cosine", final_rate=0.0)[-1] == pytest.approx(0.0, abs=1e-4)
    assert set(rates(10, warmup_share=0.0, schedule="cosine", final_rate=1.0)) == {1.0}


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from(SHAPES), st.floats(0, 1))
def test_no_step_is_without_a_rate(total, warmup, schedule, floor):
    found = rates(total, warmup_share=warmup, schedule=schedule, final_rate=floor)
    assert all(0 < rate <= 1 + 1e-12 for rate in found)
    assert max(found) == pytest.approx(1.0)
