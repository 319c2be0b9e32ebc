"""Limits of one endpoint and key: requests and tokens per minute, and how many requests are in flight.

`LimiterState` is the whole logic, pure and with the clock passed in. `RateLimiter` puts asyncio around it. Where many
processes share one key, one `RateLimiter` stands behind a service that offers the same two methods (`Limiter`), and
each process is a holder of leases that are taken back when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
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


class Limiter(Protocol):
    """Holds requests to one endpoint and key back."""

    async def acquire(self, tokens: int) -> str:
        """Wait for a place for a request of about `tokens` tokens (in and out); returns its lease."""

    async def release(self, lease: str, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """Give a place back, with the tokens that were really used and the endpoint's Retry-After in seconds."""


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
class _Lease:
    started: float
    tokens: int
    holder: str


@dataclass
class LimiterState:
    """The state machine of one endpoint's limits. Times are seconds of any one clock.

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
        self._leases: dict[str, _Lease] = {}
        self._paused_until = self._cut_at = -math.inf
        self._pause = _PAUSE_S

    @property
    def in_flight(self) -> int:
        """Requests that have a place now."""
        return len(self._leases)

    def acquire(self, now: float, lease: str, tokens: int, holder: str = "") -> float:
        """Ask for a place for one of a holder's requests.

        Returns:
            0 if it is granted; else the seconds after which to ask again, infinite if only a release can help.
        """
        wait = max(self._paused_until - now, self._requests.wait(now, 1), self._tokens.wait(now, tokens))
        if wait > 1e-9:
            return wait
        if self.in_flight >= max(1, int(self.concurrency)):
            return math.inf
        self._requests.take(now, 1)
        self._tokens.take(now, tokens)
        self._leases[lease] = _Lease(now, tokens, holder)
        return 0.0

    def release(
        self, now: float, lease: str, signal: Signal, used_tokens: int, retry_after: float | None = None
    ) -> None:
        """Give a place back. An unknown lease (lost and dropped before) only passes its signal on."""
        held = self._leases.pop(lease, None)
        if held is not None:
            self._tokens.take(now, used_tokens - held.tokens)
        if signal == "limited":
            pause = self._pause if retry_after is None else max(retry_after, _SHORTEST_PAUSE_S)
            self._paused_until = max(self._paused_until, now + pause)
            if held is None or held.started >= self._cut_at:
                self.concurrency = max(1.0, self.concurrency / 2)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
                self._cut_at = now
        elif signal == "ok":
            self._pause = _PAUSE_S
            grown = self.concurrency + _GROWTH / max(1.0, self.concurrency)
            self.concurrency = min(float(self.max_concurrency), grown)

    def drop(self, holder: str) -> int:
        """Take back the places of a holder that died; returns how many there were."""
        lost = [name for name, held in self._leases.items() if held.holder == holder]
        for lease in lost:
            del self._leases[lease]
        return len(lost)


class RateLimiter:
    """`LimiterState` for the coroutines of one event loop, first come first served."""

    def __init__(self, state: LimiterState, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self._clock = clock
        self._line = asyncio.Lock()
        self._released = asyncio.Event()

    @classmethod
    def of(cls, endpoint: Endpoint) -> RateLimiter:
        """A limiter with the limits that the config gives an endpoint."""
        return cls(
            LimiterState(
                endpoint.requests_per_minute, endpoint.tokens_per_minute, max_concurrency=endpoint.max_concurrency
            )
        )

    async def acquire(self, tokens: int) -> str:
        """See `Limiter.acquire`."""
        return (await self.acquire_some([tokens]))[0]

    async def acquire_some(self, tokens: Sequence[int], holder: str = "") -> list[str]:
        """Wait for a place for the first of several requests, and take those for the next that are free then.

        Args:
            tokens: of each request, in the order in which they want to start; at least one.
            holder: who has to be alive for the places to stay taken, see `drop`.

        Returns:
            Leases of the first requests, at least one.
        """
        async with self._line:
            leases = [uuid.uuid4().hex]
            while True:
                self._released.clear()
                wait = self.state.acquire(self._clock(), leases[0], tokens[0], holder)
                if wait == 0:
                    break
                await self._pause(wait)
            for amount in tokens[1:]:
                lease = uuid.uuid4().hex
                if self.state.acquire(self._clock(), lease, amount, holder):
                    break
                leases.append(lease)
            return leases

    async def release(self, lease: str, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """See `Limiter.release`."""
        self.state.release(self._clock(), lease, signal, used_tokens, retry_after)
        self._released.set()

    def drop(self, holder: str) -> int:
        """See `LimiterState.drop`."""
        dropped = self.state.drop(holder)
        self._released.set()
        return dropped

    async def _pause(self, seconds: float) -> None:
        """Sleep until the time is up or a place was given back."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._released.wait(), None if math.isinf(seconds) else seconds)
