from __future__ import annotations

import asyncio
import heapq
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.teachers.limits import Division, Gate, LimiterState, Places, RateLimiter


def simulate(state: LimiterState, seconds: float, latency: float, tokens: int, workers: int) -> list[float]:
    """Start times of requests under a fake clock, with `workers` always wanting one."""
    now, starts, running = 0.0, [], []
    while now < seconds:
        while running and running[0] <= now:
            heapq.heappop(running)
            state.ended(now, "ok", seconds=latency, expected_tokens=tokens, used_tokens=tokens)
        wait = state.start(now, tokens) if len(running) < min(workers, state.places) else math.inf
        if wait == 0:
            starts.append(now)
            heapq.heappush(running, now + latency)
            continue
        now += max(1e-6, min(wait, running[0] - now if running else math.inf))
    return starts


def end(state: LimiterState, now: float, signal: str, started: float, retry_after: float | None = None) -> None:
    state.ended(
        now,
        signal,
        seconds=now - started,
        expected_tokens=1,
        used_tokens=1,
        retry_after=retry_after,  # type: ignore[arg-type]
    )


def most_in_a_minute(starts: list[float]) -> int:
    first, most = 0, 0
    for last, at in enumerate(starts):
        while starts[first] <= at - 60:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.parametrize(("per_minute", "tokens_per_minute"), [(600, 10**9), (10**6, 60_000), (60, 10**9)])
def test_any_minute_stays_within_the_limit_and_uses_nine_tenths(per_minute: int, tokens_per_minute: int) -> None:
    state = LimiterState(per_minute, tokens_per_minute, max_concurrency=64)
    starts = simulate(state, seconds=300, latency=0.5, tokens=100, workers=64)
    allowed = min(per_minute, tokens_per_minute / 100)
    assert most_in_a_minute(starts) <= allowed
    assert len(starts) >= 0.9 * allowed * 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 20), st.integers(1, 20))
def test_the_limit_holds_for_any_rate_latency_and_crowd(per_minute: int, latency: float, workers: int) -> None:
    state = LimiterState(per_minute, 10**9, max_concurrency=workers)
    starts = simulate(state, seconds=150, latency=latency, tokens=1, workers=workers)
    assert most_in_a_minute(starts) <= max(per_minute, 2)


def test_tokens_used_beyond_the_estimate_are_paid_back_by_waiting() -> None:
    state = LimiterState(10**6, 6000, max_concurrency=10)
    assert state.start(0, 100) == 0
    state.ended(1, "ok", seconds=1, expected_tokens=100, used_tokens=1000)
    assert state.start(1, 100) > 5
    generous = LimiterState(10**6, 6000, max_concurrency=10)
    assert generous.start(0, 300) == 0
    assert generous.start(0, 100) > 0
    generous.ended(0, "ok", seconds=0, expected_tokens=300, used_tokens=50)
    assert generous.start(0, 100) == 0


def test_what_was_let_through_and_not_sent_costs_nothing() -> None:
    state = LimiterState(20, 6000, max_concurrency=10)
    assert state.start(0, 300) == 0
    assert state.start(0, 1) > 0
    state.unused(0, 300)
    assert state.start(0, 300) == 0


def test_a_request_larger_than_a_minute_passes_and_leaves_a_debt() -> None:
    state = LimiterState(1000, 600, max_concurrency=2)
    assert state.start(0, 5000) == 0
    assert state.start(100, 1) > 100


def test_429_halves_once_for_a_burst_and_pauses_for_retry_after() -> None:
    state = LimiterState(10**6, 10**9, max_concurrency=32)
    for _ in range(10):
        end(state, 1, "limited", started=0, retry_after=7)
    assert state.concurrency == state.places == 16
    assert state.start(2, 1) == state.paused(2) == pytest.approx(6)
    for _ in range(22):
        end(state, 3, "ok", started=0)
    assert 16 < state.concurrency < 18
    assert state.start(8.01, 1) == state.paused(8.01) == 0
    end(state, 9, "limited", started=8.01)
    assert state.concurrency < 9
    assert state.start(9, 1) == pytest.approx(1.0)


def test_concurrency_grows_back_to_its_maximum_and_no_further() -> None:
    state = LimiterState(10**9, 10**12, max_concurrency=8)
    for _ in "abc":
        end(state, 0, "limited", started=0, retry_after=0)
    assert state.concurrency == state.places == 1
    for i in range(200):
        assert state.start(1 + i, 1) == 0
        end(state, 1 + i, "ok", started=1 + i)
    assert state.concurrency == state.places == 8


def test_an_endpoint_that_goes_on_refusing_is_asked_ever_more_rarely() -> None:
    state, now, waits = LimiterState(10**6, 10**9, max_concurrency=8), 0.0, []
    for _ in range(8):
        assert state.start(now, 1) == 0
        end(state, now, "limited", started=now)
        waits.append(state.start(now, 1))
        now += waits[-1]
    assert waits == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    end(state, now, "ok", started=now)
    assert state.start(now, 1) == 0
    end(state, now, "limited", started=now, retry_after=0)
    assert state.start(now, 1) == pytest.approx(0.05)


def test_places_are_divided_fairly_and_given_up_before_others_get_them() -> None:
    division = Division()
    assert division.share("one", 0, 100, places=10) == 10
    assert division.share("two", 0, 3, places=10) == 0  # one may be using all of them
    assert division.share("one", 5, 95, places=10) == 7
    assert division.share("two", 0, 3, places=10) == 0  # one may have filled them before it heard
    assert division.share("one", 7, 93, places=10) == 7
    assert division.share("two", 0, 3, places=10) == 3
    assert division.in_flight == 7
    assert division.share("two", 0, 0, places=10) == 0
    assert division.share("one", 7, 93, places=10) == 7
    assert division.share("two", 0, 0, places=10) == 0
    assert division.share("one", 7, 93, places=10) == 10


def test_places_of_a_holder_that_died_come_back() -> None:
    division = Division()
    assert division.share("dead", 0, 9, places=4) == 4
    assert division.share("alive", 0, 9, places=4) == 0
    assert division.drop("dead") == 4
    assert division.share("alive", 0, 9, places=4) == 4


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=60))
def test_whatever_holders_want_they_never_hold_more_than_there_is(places: int, turns: list[tuple[int, int]]) -> None:
    """Each fills the larger of its last two shares before it hears of the last, the worst that it may do."""
    division, shares, filled, wants = Division(), [0] * 5, [0] * 5, [0] * 5

    def speak(holder: int, wanted: int) -> None:
        in_flight = min(filled[holder], wanted)
        wants[holder] = wanted
        before, shares[holder] = shares[holder], division.share(str(holder), in_flight, wanted - in_flight, places)
        filled[holder] = min(wanted, max(before, shares[holder], in_flight))

    for holder, wanted in turns:
        speak(holder, wanted)
        assert sum(filled) <= places
        assert shares[holder] <= wanted
    for _ in range(3):  # those in flight end; when all have spoken, nothing wanted lies idle, and shares are even
        for holder, wanted in enumerate(wants):
            filled[holder] = shares[holder]
            speak(holder, wanted)
    assert sum(shares) == min(places, sum(wants))
    short = [got for got, wanted in zip(shares, wants, strict=True) if got < wanted]
    assert not short or max(shares) <= min(short) + 1


async def test_a_gate_lets_several_through_at_once() -> None:
    gate = Gate(LimiterState(100, 10**9, max_concurrency=4))
    assert await gate.start_some([1] * 3) == 3
    assert await gate.start_some([1] * 3) == 2
    waiting = asyncio.ensure_future(gate.start_some([1] * 3))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    gate.unused(1)
    assert await waiting == 1


async def test_places_can_become_fewer_and_pause_and_vanish() -> None:
    places = Places(2)
    await places.take()
    await places.take()
    third = asyncio.ensure_future(places.take())
    await asyncio.sleep(0)
    places.allow(1)
    places.free()
    await asyncio.sleep(0)
    assert not third.done()
    places.free()
    await third
    places.allow(5, pause_s=0.1)
    began = time.monotonic()
    await places.take()
    assert time.monotonic() - began >= 0.09
    places.allow(0)
    lost = asyncio.ensure_future(places.take())
    await asyncio.sleep(0)
    places.fail(RuntimeError("gone"))
    for waiting in (lost, places.take()):
        with pytest.raises(RuntimeError, match="gone"):
            await waiting


async def test_coroutines_never_exceed_the_concurrency_and_all_get_their_turn() -> None:
    limiter = RateLimiter(LimiterState(10**6, 10**9, max_concurrency=4))
    running = most = 0
    order: list[int] = []

    async def one(i: int) -> None:
        nonlocal running, most
        lease = await limiter.acquire(10)
        order.append(i)
        running += 1
        most = max(most, running)
        await asyncio.sleep(random.uniform(0, 0.005))
        running -= 1
        await limiter.release(lease, "ok", 10)

    await asyncio.gather(*(one(i) for i in range(50)))
    assert most == 4
    assert order == list(range(50))


async def test_a_cancelled_waiter_holds_nothing() -> None:
    limiter = RateLimiter(LimiterState(10**6, 10**9, max_concurrency=1))
    lease = await limiter.acquire(1)
    waiting = asyncio.create_task(limiter.acquire(1))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await limiter.release(lease, "ok", 1)
    await asyncio.wait_for(limiter.acquire(1), 1)


async def test_retry_after_is_waited_for() -> None:
    limiter = RateLimiter(LimiterState(10**6, 10**9, max_concurrency=4))
    await limiter.release(await limiter.acquire(1), "limited", 0, retry_after=0.2)
    began = time.monotonic()
    await limiter.acquire(1)
    assert time.monotonic() - began >= 0.19
