"""A tier's endpoints and keys: their limits add up, and where one fails another takes over."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from cascade.config import Endpoint, Teacher
from cascade.errors import TeacherError
from cascade.teachers.endpoint import EndpointClient
from cascade.teachers.limits import Limiter, Permit, Signal

_LOOK_AGAIN_S = 1.0
"""After which a request that waits for room looks whether an endpoint has come back or gone."""


class EndpointPool:
    """Deals requests to the endpoints of one teacher, for the coroutines of one event loop.

    An endpoint has room as long as few of those dealt to it wait for a place at its limiter. A request goes where the
    fewest wait, and of those where most places are free: so each is used up to its limits, and a slow one never holds
    more than a few requests back.
    """

    def __init__(
        self,
        teacher: Teacher,
        endpoints: Sequence[Endpoint],
        urls: Mapping[str, str],
        limiter: Callable[[Endpoint], Limiter],
        tier: int,
    ) -> None:
        """
        Args:
            endpoints: those of the teacher that are asked.
            urls: base_url of the config -> real URL.
            limiter: makes or finds the limiter of an endpoint.
            tier: for messages.
        """
        self._who = f"tier {tier} ({teacher.name})"
        self._lines = [_Line(limiter(e), e.max_concurrency, self._wake) for e in endpoints]
        self.endpoints = [
            EndpointClient(e, urls[e.base_url], teacher, line) for e, line in zip(endpoints, self._lines, strict=True)
        ]
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def aclose(self) -> None:
        """Close the connections."""
        async with AsyncExitStack() as stack:
            for endpoint in self.endpoints:
                stack.push_async_callback(endpoint.aclose)

    @asynccontextmanager
    async def deal(self, failed: EndpointClient | None = None) -> AsyncIterator[EndpointClient]:
        """The endpoint for one try of a request, which may have to wait until one has room.

        Args:
            failed: where the request has just failed: another that works is preferred.

        Raises:
            TeacherError: all endpoints are out for good.
        """
        number = await self._choose(failed)
        line = self._lines[number]
        line.dealt += 1
        try:
            yield self.endpoints[number]
        finally:
            line.dealt -= 1
            self._wake()

    def check_anyone_answers(self, since: float = -math.inf) -> None:
        """
        Args:
            since: by the monotonic clock.

        Raises:
            TeacherError: every endpoint is out for good, down, or has answered nothing since then.
        """
        if all(e.refusal or e.is_down or e.answered_at < since for e in self.endpoints):
            reasons = "; ".join(e.refusal or e.trouble for e in self.endpoints)
            raise TeacherError(
                f"{self._who}: nobody answers any more: {reasons}. "
                "All answers bought so far are kept; run again when the endpoint is back"
            )

    async def _choose(self, failed: EndpointClient | None) -> int:
        while True:
            working = self._working()
            wanted = [n for n in working if self.endpoints[n] is not failed] or working
            number = min(wanted, key=lambda n: self._lines[n].load)
            if len(self.endpoints) == 1 or self._lines[number].has_room:
                return number
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            with suppress(TimeoutError):
                await asyncio.wait_for(turn, _LOOK_AGAIN_S)

    def _working(self) -> list[int]:
        """Numbers of the endpoints that can be asked; those that rest only if there are no others."""
        usable = [n for n, e in enumerate(self.endpoints) if not e.refusal]
        if not usable:
            reasons = "; ".join(e.refusal for e in self.endpoints)
            raise TeacherError(f"{self._who} cannot be asked: {reasons}. All answers bought so far are kept")
        return [n for n in usable if not self.endpoints[n].resting] or usable

    def _wake(self) -> None:
        """Let the next request look for room."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


class _Line:
    """A limiter that knows how many requests hold a place, of those that were dealt to it."""

    def __init__(self, limiter: Limiter, places: int, placed: Callable[[], None]) -> None:
        self._limiter, self._places, self._placed = limiter, places, placed
        self.dealt = self._holding = 0

    @property
    def load(self) -> tuple[int, float]:
        """How many wait, and which share of the places is taken."""
        return self.dealt - self._holding, self._holding / self._places

    @property
    def has_room(self) -> bool:
        return self.dealt - self._holding < max(4, self._places // 4)

    async def acquire(self, tokens: int) -> Permit:
        """See `Limiter.acquire`."""
        permit = await self._limiter.acquire(tokens)
        self._holding += 1
        self._placed()
        return permit

    async def release(self, permit: Permit, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """See `Limiter.release`."""
        self._holding -= 1
        await self._limiter.release(permit, signal, used_tokens, retry_after)
