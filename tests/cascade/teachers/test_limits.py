from __future__ import annotations

import asyncio
import heapq
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.teachers.limits import LimiterState, RateLimiter


def simulate(state: LimiterState, seconds: float, latency: float, tokens: int, workers: int) -> list[float]:
    """Start times of requests under a fake clock, with `workers` always wanting one."""
    now, starts, running, idle, count = 0.0, [], [], workers, 0
    while now < seconds:
        while running and running[0][0] <= now:
            _, lease = heapq.heappop(running)
            state.release(now, lease, "ok", tokens)
            idle += 1
        wait = state.acquire(now, str(count), tokens) if idle else math.inf
        if wait == 0:
            starts.append(now)
            heapq.heappush(running, (now + latency, str(count)))
            idle, count = idle - 1, count + 1
            continue
        ahead = running[0][0] - now if running else math.inf
        now += max(1e-6, min(wait, ahead))
    return starts


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
    assert state.acquire(0, "a", 100) == 0
    state.release(1, "a", "ok", used_tokens=1000)
    assert state.acquire(1, "b", 100) > 5
    generous = LimiterState(10**6, 6000, max_concurrency=10)
    assert generous.acquire(0, "a", 300) == 0
    assert generous.acquire(0, "b", 100) > 0
    generous.release(0, "a", "ok", used_tokens=50)
    assert generous.acquire(0, "b", 100) == 0


def test_a_request_larger_than_a_minute_passes_and_leaves_a_debt() -> None:
    state = LimiterState(1000, 600, max_concurrency=2)
    assert state.acquire(0, "a", 5000) == 0
    assert state.acquire(100, "b", 1) > 100


def test_429_halves_once_for_a_burst_and_pauses_for_retry_after() -> None:
    state = LimiterState(10**6, 10**9, max_concurrency=32)
    for i in range(32):
        assert state.acquire(0, str(i), 1) == 0
    for i in range(10):
        state.release(1, str(i), "limited", 0, retry_after=7)
    assert state.concurrency == 16
    assert state.acquire(2, "x", 1) == pytest.approx(6)
    for i in range(10, 32):
        state.release(3, str(i), "ok", 1)
    assert 16 < state.concurrency < 18
    assert state.acquire(8.01, "x", 1) == 0
    state.release(9, "x", "limited", 0)
    assert state.concurrency < 9
    assert state.acquire(9, "y", 1) == pytest.approx(1.0)


def test_concurrency_grows_back_to_its_maximum_and_no_further() -> None:
    state = LimiterState(10**9, 10**12, max_concurrency=8)
    for lease in "abc":
        state.acquire(0, lease, 1)
        state.release(0, lease, "limited", 0, retry_after=0)
    assert state.concurrency == 1
    for i in range(200):
        assert state.acquire(1 + i, str(i), 1) == 0
        state.release(1 + i, str(i), "ok", 1)
    assert state.concurrency == 8


def test_an_endpoint_that_goes_on_refusing_is_asked_ever_more_rarely() -> None:
    state, now, waits = LimiterState(10**6, 10**9, max_concurrency=8), 0.0, []
    for lease in range(8):
        assert state.acquire(now, str(lease), 1) == 0
        state.release(now, str(lease), "limited", 0)
        waits.append(state.acquire(now, "x", 1))
        now += waits[-1]
    assert waits == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    assert state.acquire(now, "a", 1) == 0
    state.release(now, "a", "ok", 1)
    assert state.acquire(now, "b", 1) == 0
    state.release(now, "b", "limited", 0, retry_after=0)
    assert state.acquire(now, "c", 1) == pytest.approx(0.05)


def test_places_of_a_holder_that_died_come_back() -> None:
    state = LimiterState(10**6, 10**9, max_concurrency=2)
    assert state.acquire(0, "a", 1, "one") == state.acquire(0, "b", 1, "two") == 0
    assert state.acquire(50, "c", 1, "two") == math.inf
    assert state.drop("one") == 1
    assert state.acquire(50, "c", 1, "two") == 0
    state.release(102, "a", "ok", 1)
    assert state.in_flight == 2


async def test_several_get_what_is_free_at_once() -> None:
    limiter = RateLimiter(LimiterState(10**6, 10**9, max_concurrency=4))
    first = await limiter.acquire_some([1] * 3)
    assert len(first) == 3
    assert len(await limiter.acquire_some([1] * 3, "dead")) == 1
    waiting = asyncio.ensure_future(limiter.acquire_some([1] * 3))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert limiter.drop("dead") == 1
    assert len(await waiting) == 1


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
