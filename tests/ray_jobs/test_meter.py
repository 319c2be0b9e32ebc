"""How far a tier is: counts, money, pace and time left."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ray_jobs import _progress
from ray_jobs._meter import TierMeter, TierState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, **changes: object) -> TierMeter:
    settings = {"tier": 2, "teacher": "t", "total": 100, "done": 10, "verified": 4, "remaining_usd": 1.0}
    return TierMeter(**{**settings, **changes}, clock=clock)


def test_counts_and_money_go_on_where_an_earlier_start_stopped() -> None:
    clock = Clock()
    m = meter(clock, spent_usd=0.2)
    state = m.add(passed=True, cost_usd=0.1, paid_usd=0.1, requests=1)
    state = m.add(passed=False, cost_usd=0.3, paid_usd=0.0, requests=0)
    assert (state.done, state.verified, state.escalated) == (12, 5, 7)
    assert state.spent_usd == pytest.approx(0.6)
    assert state.remaining_usd == pytest.approx(0.9), "an answer from the ledger takes nothing from the budget"


def test_pace_is_that_of_the_last_minute() -> None:
    clock = Clock()
    m = meter(clock)
    assert m.state().seconds_left is None
    for _ in range(30):
        clock.now += 1
        state = m.add(passed=True, cost_usd=0, paid_usd=0, requests=2)
    assert state.requests_per_minute == pytest.approx(120)
    assert state.seconds_left == pytest.approx(60)
    assert state.eta == "1 min 00 s"
    clock.now += 59
    assert m.state().requests_per_minute == pytest.approx(2), "what is older than a minute no longer counts"
    clock.now += 2
    assert m.state().seconds_left is None


def test_nothing_is_left_to_do_or_to_spend() -> None:
    clock = Clock()
    m = meter(clock, total=11, remaining_usd=0.05)
    clock.now += 5
    state = m.add(passed=True, cost_usd=0.1, paid_usd=0.1, requests=1)
    assert state.remaining_usd == 0.0
    assert state.eta == ""


STATE = TierState(1, "cheap", 50, 200, 30, 0.0123, 1.5, 240.0, 37.0)


def test_a_terminal_shows_every_tier() -> None:
    display = _progress._LiveTable("run", ("generate_tier1", "generate_tier2"))
    display.started("generate_tier1")
    display.tier("generate_tier1", STATE)
    display.tier("generate_tier2", replace(STATE, tier=2, teacher="dear", seconds_left=4000.0))
    console = Console(file=io.StringIO(), width=140)
    console.print(display.render())
    text = console.file.getvalue()
    for shown in ("cheap", "dear", "50/200", "30", "20", "$0.0123", "$1.5000", "240", "37 s", "1 h 06 min"):
        assert shown in text


def test_a_log_gets_a_line_each_tenth() -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = _progress._Lines(console)
    for done in range(1, 201):
        lines.tier("generate_tier1", replace(STATE, done=done, verified=done // 2))
    printed = console.file.getvalue().splitlines()
    assert 10 <= len(printed) <= 12
    assert "20 of 200 asked, 10 verified, 10 escalated, $0.0123 spent, $1.5000 of the budget left" in printed[1]
    assert "240 requests/min, ETA 37 s" in printed[1]
