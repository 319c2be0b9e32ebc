"""The desk: one actor per run of a `generate_*` job, which keeps the budget and the limits for all teacher actors.

Teacher actors ask it for many requests at once (`_Line`) and tell it of what is done in passing, so that it costs a
fraction of a call per request. Each asks under a name of its own; when one has not been heard of for 15 seconds it is
dead, its places are free again, and what it had set aside counts as spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cascade.artifacts import Store
from cascade.config import Config, Endpoint
from cascade.errors import CascadeError
from cascade.teachers.budget import LocalBudget, budget_state
from cascade.teachers.ledger import Ledger
from cascade.teachers.limits import RateLimiter, Signal, limiter_key
from ray_jobs._metrics import TierMetrics

_DEAD_AFTER_S = 15.0
_HEARTBEAT_S = 3.0
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Returned:
    """A place at an endpoint that is free again, see `Limiter.release`."""

    endpoint: Endpoint
    lease: str
    signal: Signal
    used_tokens: int
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class Settled:
    """What a request has cost, see `Budget.settle`."""

    lease: str
    usd: float


@dataclass(frozen=True, slots=True)
class Done:
    """A task that has its verdict, for the display: see `TierMeter.add`."""

    passed: bool
    cost_usd: float
    paid_usd: float
    requests: int


News = Returned | Settled | Done


class Desk:
    """The actor itself. `holder` is the name of a teacher actor."""

    def __init__(self, config: Config, tier: int) -> None:
        self.tier = tier
        self.budget = LocalBudget(budget_state(config, Ledger(Store(config.storage), config.domain)))
        self.limiters: dict[str, RateLimiter] = {}
        self.metrics = TierMetrics(config, tier)
        self.seen: dict[str, float] = {}
        self.watch: asyncio.Task[None] | None = None
        self.done: list[Done] = []

    async def take_done(self) -> list[Done]:
        """Tasks that have had their verdicts since this was last asked. Ray Data tells of whole blocks alone."""
        done, self.done = self.done, []
        return done

    async def acquire(self, holder: str, endpoint: Endpoint, tokens: list[int]) -> list[str]:
        """See `RateLimiter.acquire_some`."""
        self._hear(holder)
        return await self._limiter(endpoint).acquire_some(tokens, holder)

    async def reserve(self, holder: str, usd: list[float]) -> list[str]:
        """See `LocalBudget.reserve_some`."""
        self._hear(holder)
        return await self.budget.reserve_some(self.tier, usd, holder)

    async def note(self, holder: str, news: list[News]) -> None:
        """Take back places and book costs; without any news, a sign of life."""
        self._hear(holder)
        for item in news:
            if isinstance(item, Done):
                self.done.append(item)
            elif isinstance(item, Settled):
                await self.budget.settle(item.lease, item.usd)
            else:
                limiter = self._limiter(item.endpoint)
                await limiter.release(item.lease, item.signal, item.used_tokens, item.retry_after)
                self.metrics.ended(item.endpoint, item.signal, item.used_tokens)
        self.metrics.show(self.budget.state, {k: limiter.state for k, limiter in self.limiters.items()})

    def _limiter(self, endpoint: Endpoint) -> RateLimiter:
        return self.limiters.setdefault(limiter_key(endpoint), RateLimiter.of(endpoint))

    def _hear(self, holder: str) -> None:
        self.seen[holder] = time.monotonic()
        self.watch = self.watch or asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        """Take back what the dead hold, also what they are given after their death."""
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            for holder, seen in self.seen.items():
                if time.monotonic() - seen > _DEAD_AFTER_S:
                    self.budget.write_off(holder)
                    for limiter in self.limiters.values():
                        limiter.drop(holder)


def open_desk(config: Config, tier: int) -> Any:
    """A desk on this node: it must live as long as the job does, not as long as some worker's machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(Desk)
    return remote.options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here).remote(config, tier)


class DeskClient:
    """A teacher actor's way to the desk."""

    def __init__(self, desk: Any) -> None:
        self.desk, self.holder = desk, uuid.uuid4().hex
        self._news: list[News] = []
        self._telling: asyncio.Task[None] | None = None
        self._reservations = _Line(lambda usd: desk.reserve.remote(self.holder, usd), self._give_back_money)
        self._has_news = asyncio.Event()

    def limiter(self, endpoint: Endpoint) -> SharedLimiter:
        """The limiter of an endpoint and key, for all who ask this desk."""
        return SharedLimiter(self, endpoint)

    async def reserve(self, tier: int, usd: float) -> str:
        """See `cascade.teachers.budget.Budget.reserve`. The desk knows its tier."""
        return await self._reservations.ask(usd)

    async def settle(self, lease: str, usd: float) -> None:
        """See `cascade.teachers.budget.Budget.settle`. The desk hears of it a moment later."""
        self.tell(Settled(lease, usd))

    def tell(self, item: News) -> None:
        """Send the desk news, together with what else there is by then."""
        self._news.append(item)
        self._has_news.set()
        self._telling = self._telling or asyncio.ensure_future(self._tell())

    def _give_back_money(self, lease: str) -> None:
        self.tell(Settled(lease, 0.0))

    async def _tell(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):  # nothing new: a sign of life
                await asyncio.wait_for(self._has_news.wait(), _HEARTBEAT_S)
            self._has_news.clear()
            news, self._news = self._news, []
            try:
                await self.desk.note.remote(self.holder, news)
            except RayError:
                return  # the job is over; whoever asks for something is told so


class SharedLimiter:
    """`cascade.teachers.limits.Limiter`, kept by the desk."""

    def __init__(self, client: DeskClient, endpoint: Endpoint) -> None:
        self._client, self._endpoint = client, endpoint
        self._places = _Line(
            lambda tokens: client.desk.acquire.remote(client.holder, endpoint, tokens),
            lambda lease: client.tell(Returned(endpoint, lease, "failed", 0, None)),
        )

    async def acquire(self, tokens: int) -> str:
        """See `Limiter.acquire`."""
        return await self._places.ask(tokens)

    async def release(self, lease: str, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """See `Limiter.release`. The desk hears of it a moment later."""
        self._client.tell(Returned(self._endpoint, lease, signal, used_tokens, retry_after))


@dataclass
class _Line:
    """Coroutines that wait for something of the desk's: while one call is under way, the next ones gather.

    Attributes:
        call: asks for several at once; it grants the first of them, at least one.
        give_back: for what was granted to a coroutine that is gone by then.
    """

    call: Callable[[list[Any]], Awaitable[list[str]]]
    give_back: Callable[[str], None]
    _waiting: deque[tuple[Any, asyncio.Future[str]]] = field(default_factory=deque)
    _asking: asyncio.Task[None] | None = None

    async def ask(self, amount: Any) -> str:
        """Wait for one's own."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, future))
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
        return await future

    async def _ask(self) -> None:
        while self._waiting:
            try:
                granted = await self.call([amount for amount, _ in islice(self._waiting, _AT_ONCE)])
            except Exception as error:  # it concerns the first: he is told, the next ones go on asking
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(own_error(error))
                continue
            for lease in granted:
                _, future = self._waiting.popleft()
                if future.done():
                    self.give_back(lease)
                else:
                    future.set_result(lease)
        self._asking = None


def own_error(error: Exception) -> Exception:
    """An error from another actor as it was raised there, if it is one that a user is meant to read."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CascadeError) else error
