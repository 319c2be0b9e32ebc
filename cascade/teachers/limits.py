"""Limits of one endpoint and key: requests and tokens per minute, and how many requests are in flight.

`LimiterState` (what the endpoint allows) and `Division` (who gets how many of its places) are the whole logic, pure
and with the clock passed in. Around them, for the coroutines of one event loop: `Gate` lets requests through at the
allowed rate, `Places` holds those in flight to a number. `RateLimiter` is both together. Where many processes share
one key, gate and division stand behind a service, and each process keeps places of its own: so the next request takes
the place of one that has ended at once, without asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cascade.config import Endpoint

Signal = Literal["ok", "limited", "failed"]
"""What the endpoint did with a request: answered it, refused it with 429, or anything else."""

_BURST = 0.05
_GROWTH = 1.0
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_SHORTEST_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Permit:
    """That a request may be in flight.

    Attributes:
        tokens: in and out, as was expected.
        started: by the clock of the process that asks.
    """

    tokens: int
    started: float = field(default_factory=time.monotonic)


class Limiter(Protocol):
    """Holds requests to one endpoint and key back."""

    async def acquire(self, tokens: int) -> Permit:
        """Wait until a request of about `tokens` tokens (in and out) may start."""

    async def release(self, permit: Permit, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """The request is over: the tokens that were really used, and the endpoint's Retry-After in seconds."""


def limiter_key(endpoint: Endpoint) -> str:
    """The name under which everybody who uses the same endpoint and key shares one limiter."""
    return f"{endpoint.base_url}|{endpoint.api_key_env or ''}"


@dataclass
class _Bucket:
    """A token bucket that lets at most `per_minute` through in any 60 seconds, after a small burst evenly.

    It starts with the burst and fills at the rate that burst and rate together make one minute's worth. What is
    larger than the bucket passes when it is full and leaves a debt.
    """

    per_minute: float
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.capacity = max(1.0, self.per_minute * _BURST)
        self.rate = max(self.per_minute - self.capacity, self.per_minute / 2) / 60
        self.level = self.capacity

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be taken."""
        self._fill(now)
        return max(0.0, min(amount, self.capacity) - self.level) / self.rate

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, or give it back if it is negative."""
        self._fill(now)
        self.level = min(self.capacity, self.level - amount)

    def _fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + max(0.0, now - self.at) * self.rate)
        self.at = max(self.at, now)


@dataclass
class LimiterState:
    """What one endpoint and key allow now. Times are seconds of any one clock.

    The concurrency starts at its maximum, halves when the endpoint answers 429 (once for all requests that were
    already under way then) and grows by one for every round of successes. After a 429 nothing starts before the
    time that the endpoint asked for; if it did not say, the pause doubles until something succeeds.
    """

    requests_per_minute: float
    tokens_per_minute: float
    max_concurrency: int
    concurrency: float = field(init=False)

    def __post_init__(self) -> None:
        self.concurrency = float(self.max_concurrency)
        self._requests, self._tokens = _Bucket(self.requests_per_minute), _Bucket(self.tokens_per_minute)
        self._paused_until = self._cut_at = -math.inf
        self._pause = _PAUSE_S

    @classmethod
    def of(cls, *endpoints: Endpoint) -> LimiterState:
        """With the limits that the config gives an endpoint; where it names one several times, the least of each."""
        return cls(
            min(e.requests_per_minute for e in endpoints),
            min(e.tokens_per_minute for e in endpoints),
            max_concurrency=min(e.max_concurrency for e in endpoints),
        )

    @property
    def places(self) -> int:
        """How many requests may be in flight."""
        return max(1, int(self.concurrency))

    def paused(self, now: float) -> float:
        """Seconds for which nothing may start."""
        return max(0.0, self._paused_until - now)

    def start(self, now: float, tokens: int) -> float:
        """Let a request through.

        Returns:
            0 if it may start; else the seconds after which to ask again.
        """
        wait = max(self.paused(now), self._requests.wait(now, 1), self._tokens.wait(now, tokens))
        if wait > 1e-9:
            return wait
        self._requests.take(now, 1)
        self._tokens.take(now, tokens)
        return 0.0

    def unused(self, now: float, tokens: int) -> None:
        """A request that was let through was not sent."""
        self._requests.take(now, -1)
        self._tokens.take(now, -tokens)

    def ended(
        self,
        now: float,
        signal: Signal,
        *,
        seconds: float,
        expected_tokens: int,
        used_tokens: int,
        retry_after: float | None = None,
    ) -> None:
        """A request that took `seconds` is over."""
        self._tokens.take(now, used_tokens - expected_tokens)
        if signal == "limited":
            pause = self._pause if retry_after is None else max(retry_after, _SHORTEST_PAUSE_S)
            self._paused_until = max(self._paused_until, now + pause)
            if now - seconds >= self._cut_at:
                self.concurrency = max(1.0, self.concurrency / 2)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
                self._cut_at = now
        elif signal == "ok":
            self._pause = _PAUSE_S
            grown = self.concurrency + _GROWTH / max(1.0, self.concurrency)
            self.concurrency = min(float(self.max_concurrency), grown)


@dataclass
class Division:
    """Divides an endpoint's places fairly among the processes ("holders") that ask it.

    While a smaller share is on its way to a holder, it may still fill the one that it had. So others get a place only
    when its holder has spoken again.
    """

    _wanted: dict[str, int] = field(default_factory=dict)
    _in_flight: dict[str, int] = field(default_factory=dict)
    _shares: dict[str, int] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        """Requests in flight, as last heard."""
        return sum(self._in_flight.values())

    def share(self, holder: str, in_flight: int, waiting: int, places: int) -> int:
        """How many of all `places` a holder may use from now on, which has so many requests in flight and waiting."""
        self._in_flight[holder], self._wanted[holder] = in_flight, in_flight + waiting
        left = places - sum(held for other, held in self._held.items() if other != holder)
        share = max(0, min(left, self._fair(places)[holder]))
        self._held[holder] = max(share, self._shares.get(holder, 0), in_flight)
        self._shares[holder] = share
        return share

    def _fair(self, places: int) -> dict[str, int]:
        """So that nobody has more while another who wants it has less."""
        fair: dict[str, int] = {}
        behind = len(self._wanted)
        for holder, wanted in sorted(self._wanted.items(), key=lambda item: (item[1], item[0])):
            fair[holder] = min(wanted, places // behind)
            places, behind = places - fair[holder], behind - 1
        return fair

    def drop(self, holder: str) -> int:
        """Take back the places of a holder that died; returns how many there were."""
        self._wanted.pop(holder, None)
        self._in_flight.pop(holder, None)
        self._shares.pop(holder, None)
        return self._held.pop(holder, 0)


class Gate:
    """Lets the requests of one event loop through at the rate that a `LimiterState` allows, first come first served."""

    def __init__(self, state: LimiterState, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self._clock = clock
        self._line = asyncio.Lock()
        self._changed = asyncio.Event()

    async def start_some(self, tokens: Sequence[int]) -> int:
        """Wait until the first of several requests may start; returns how many of them may, at least one.

        Args:
            tokens: of each request, in the order in which they want to start; at least one.
        """
        async with self._line:
            while True:
                self._changed.clear()
                if not (wait := self.state.start(self._clock(), tokens[0])):
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)
            through = 1
            while through < len(tokens) and not self.state.start(self._clock(), tokens[through]):
                through += 1
            return through

    def unused(self, tokens: int) -> None:
        """See `LimiterState.unused`."""
        self.state.unused(self._clock(), tokens)
        self._changed.set()

    def ended(
        self, signal: Signal, seconds: float, expected_tokens: int, used_tokens: int, retry_after: float | None
    ) -> None:
        """See `LimiterState.ended`."""
        self.state.ended(
            self._clock(),
            signal,
            seconds=seconds,
            expected_tokens=expected_tokens,
            used_tokens=used_tokens,
            retry_after=retry_after,
        )
        self._changed.set()

    def paused(self) -> float:
        """See `LimiterState.paused`."""
        return self.state.paused(self._clock())


class Places:
    """Holds the requests in flight of one event loop to a number, which may change at any time; first come first
    served.

    Attributes:
        in_flight: places that are taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.in_flight = limit, 0
        self._line: deque[asyncio.Future[None]] = deque()
        self._paused_until = -math.inf
        self._error: Exception | None = None

    async def take(self) -> None:
        """Wait for a place."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(future)
        self._admit()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                self.free()
            raise

    def free(self) -> None:
        """Give a place back; the next in line has it at once."""
        self.in_flight -= 1
        self._admit()

    def allow(self, limit: int, pause_s: float = 0.0) -> None:
        """Let so many in at once from now on, and none for the next `pause_s` seconds."""
        self.limit = limit
        if pause_s > 0:
            loop = asyncio.get_running_loop()
            self._paused_until = max(self._paused_until, loop.time() + pause_s)
            loop.call_later(pause_s, self._admit)
        self._admit()

    def fail(self, error: Exception) -> None:
        """There are no places any more: whoever waits, or will, is told why."""
        self._error = error
        self._admit()

    def _admit(self) -> None:
        while self._line and (self._error or self._is_free()):
            future = self._line.popleft()
            if future.done():
                continue
            if self._error:
                future.set_exception(self._error)
            else:
                self.in_flight += 1
                future.set_result(None)

    def _is_free(self) -> bool:
        return self.in_flight < self.limit and asyncio.get_running_loop().time() >= self._paused_until - 1e-3


class RateLimiter:
    """`Limiter` for one event loop that has the endpoint and key to itself."""

    def __init__(self, state: LimiterState, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self._clock = clock
        self._gate, self._places = Gate(state, clock), Places(state.places)

    @classmethod
    def of(cls, endpoint: Endpoint) -> RateLimiter:
        """A limiter with the limits that the config gives an endpoint."""
        return cls(LimiterState.of(endpoint))

    async def acquire(self, tokens: int) -> Permit:
        """See `Limiter.acquire`."""
        await self._places.take()
        try:
            await self._gate.start_some([tokens])
        except BaseException:
            self._places.free()
            raise
        return Permit(tokens, self._clock())

    async def release(self, permit: Permit, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """See `Limiter.release`."""
        self._gate.ended(signal, self._clock() - permit.started, permit.tokens, used_tokens, retry_after)
        self._places.allow(self.state.places)
        self._places.free()
