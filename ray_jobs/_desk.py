"""The desk: one actor per run of a `generate_*` job, which keeps the budget and the limits for all teacher actors.

Teacher actors ask it for many requests at once (`_Line`) and tell it of what is done in passing, so that it costs a
fraction of a call per request. Its answer to that is how many requests the actor may have in flight; within this
number the actor starts its next one by itself as soon as one has ended. Each asks under a name of its own; when one
has not been heard of for 15 seconds it is dead, its places are free again, and what it had set aside counts as spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cascade.config import Config, Endpoint
from cascade.errors import CascadeError
from cascade.store import Store
from cascade.teachers.budget import LocalBudget, budget_state
from cascade.teachers.ledger import Ledger
from cascade.teachers.limits import Division, Gate, LimiterState, Permit, Places, Signal, limiter_key
from ray_jobs._metrics import TierMetrics

_DEAD_AFTER_S = 15.0
_HEARTBEAT_S = 3.0
_STARVING_S = 0.1
_GATHER_S = 0.01
_SHOW_S = 0.5
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Ended:
    """A request to an endpoint is over, see `LimiterState.ended`."""

    limiter: str
    signal: Signal
    seconds: float
    expected_tokens: int
    used_tokens: int
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class Unused:
    """A request was let through and not sent, see `LimiterState.unused`."""

    limiter: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What a request has cost, see `Budget.settle`."""

    lease: str
    usd: float


@dataclass(frozen=True, slots=True)
class Corrected:
    """By how much another amount was spent than was counted, see `Budget.correct`."""

    usd: float


@dataclass(frozen=True, slots=True)
class Done:
    """A task that has its verdict, for the display: see `TierMeter.add`."""

    passed: bool
    cost_usd: float
    paid_usd: float
    requests: int


News = Ended | Unused | Settled | Corrected | Done


class Demand(NamedTuple):
    """Of one teacher actor for one limiter: requests in flight, and those that would like to be."""

    in_flight: int
    waiting: int


class Share(NamedTuple):
    """What the desk says to that: how many may be in flight, and for how many seconds none may start."""

    places: int
    pause_s: float


class Desk:
    """The actor itself. `holder` is the name of a teacher actor."""

    def __init__(self, config: Config, store: Store, tier: int) -> None:
        """
        Args:
            store: of the run. The config's may be a relative path, which is another folder in the desk's process.
        """
        self.tier = tier
        self.budget = LocalBudget(budget_state(config, Ledger(store, config.domain)))
        self.gates = {key: Gate(state) for key, state in limiter_states(config, tier).items()}
        self.divisions = {key: Division() for key in self.gates}
        self.metrics = TierMetrics(config, tier)
        self.seen: dict[str, float] = {}
        self.watch: asyncio.Task[None] | None = None
        self.done: list[Done] = []
        self.shown = 0.0

    async def left_usd(self) -> float:
        """What is left of the tier's budget or the domain's, whichever is the less."""
        state = self.budget.state
        left = [state.domain_usd - state.total_spent()]
        left += [state.tier_usd[self.tier] - state.total_spent(self.tier)] if self.tier in state.tier_usd else []
        return min(left)

    async def take_done(self) -> list[Done]:
        """Tasks that have had their verdicts since this was last asked. Ray Data tells of whole blocks alone."""
        done, self.done = self.done, []
        return done

    async def start(self, holder: str, limiter: str, tokens: list[int]) -> int:
        """See `Gate.start_some`."""
        self._hear(holder)
        return await self.gates[limiter].start_some(tokens)

    async def reserve(self, holder: str, usd: list[float]) -> list[str]:
        """See `LocalBudget.reserve_some`."""
        self._hear(holder)
        return await self.budget.reserve_some(self.tier, usd, holder)

    async def note(self, holder: str, news: list[News], demands: dict[str, Demand]) -> dict[str, Share]:
        """Take in what is done and what is wanted; returns each limiter's share. Without any, it is a sign of life."""
        self._hear(holder)
        for item in news:
            if isinstance(item, Done):
                self.done.append(item)
            elif isinstance(item, Settled):
                await self.budget.settle(item.lease, item.usd)
            elif isinstance(item, Corrected):
                await self.budget.correct(self.tier, item.usd)
            elif isinstance(item, Unused):
                self.gates[item.limiter].unused(item.tokens)
            else:
                self.gates[item.limiter].ended(
                    item.signal, item.seconds, item.expected_tokens, item.used_tokens, item.retry_after
                )
                self.metrics.ended(item.limiter, item.signal, item.used_tokens)
        shares = {key: self._share(holder, key, demand) for key, demand in demands.items()}
        self._show()
        return shares

    def _show(self) -> None:
        """Set the metrics, not more often than somebody looks."""
        if (now := time.monotonic()) - self.shown < _SHOW_S:
            return
        self.shown = now
        self.metrics.show(
            self.budget.state, {k: (d.in_flight, self.gates[k].state.concurrency) for k, d in self.divisions.items()}
        )

    def _share(self, holder: str, limiter: str, demand: Demand) -> Share:
        gate = self.gates[limiter]
        return Share(self.divisions[limiter].share(holder, *demand, gate.state.places), gate.paused())

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
                    for division in self.divisions.values():
                        division.drop(holder)


def limiter_states(config: Config, tier: int) -> dict[str, LimiterState]:
    """One per endpoint and key that a tier or the judge asks. One that both ask, or that a tier names twice, is still
    one: the least of each limit holds, since the endpoint counts all requests together.
    """
    same: dict[str, list[Endpoint]] = defaultdict(list)
    for endpoint in (*config.tier(tier).endpoints, *(config.judge.model.endpoints if config.judge else ())):
        same[limiter_key(endpoint)].append(endpoint)
    return {key: LimiterState.of(*endpoints) for key, endpoints in same.items()}


def open_desk(config: Config, store: Store, tier: int) -> Any:
    """A desk on this node: it must live as long as the job does, not as long as some worker's machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(Desk)
    return remote.options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here).remote(config, store, tier)


class DeskClient:
    """A teacher actor's way to the desk."""

    def __init__(self, desk: Any) -> None:
        self.desk, self.holder = desk, uuid.uuid4().hex
        self._news: list[News] = []
        self._heard: list[Callable[[], None]] = []
        self._telling: asyncio.Task[None] | None = None
        self._to_tell = asyncio.Event()
        self._limiters: dict[str, SharedLimiter] = {}
        self._reservations = _Line(
            lambda usd: desk.reserve.remote(self.holder, usd), lambda _, lease: self.tell(Settled(lease, 0.0))
        )

    def limiter(self, endpoint: Endpoint) -> SharedLimiter:
        """The limiter of an endpoint and key, for all who ask this desk."""
        key = limiter_key(endpoint)
        return self._limiters.setdefault(key, SharedLimiter(self, key))

    async def reserve(self, tier: int, usd: float) -> str:
        """See `cascade.teachers.budget.Budget.reserve`. The desk knows its tier."""
        self._live()
        return str(await self._reservations.ask(usd))

    async def settle(self, lease: str, usd: float) -> None:
        """See `cascade.teachers.budget.Budget.settle`. The desk hears of it a moment later."""
        self.tell(Settled(lease, usd))

    async def correct(self, tier: int, usd: float) -> None:
        """See `cascade.teachers.budget.Budget.correct`."""
        self.tell(Corrected(usd))

    def tell(self, *news: News, heard: Callable[[], None] | None = None) -> None:
        """Send the desk news, and what is wanted of each limiter, together with what else there is by then.

        Args:
            heard: called when the desk has taken it in and its answer holds.
        """
        self._news += news
        self._heard += [heard] if heard else []
        self._to_tell.set()
        self._live()

    def _live(self) -> None:
        """Give signs of life from now on: a day may pass between what is set aside for a batch and its end."""
        self._telling = self._telling or asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        while True:
            starving = any(limiter.is_starving for limiter in self._limiters.values())
            with contextlib.suppress(TimeoutError):  # nothing new: a sign of life
                await asyncio.wait_for(self._to_tell.wait(), _STARVING_S if starving else _HEARTBEAT_S)
            self._to_tell.clear()
            (news, self._news), (heard, self._heard) = (self._news, []), (self._heard, [])
            demands = {key: limiter.demand() for key, limiter in self._limiters.items()}
            try:
                shares = await self.desk.note.remote(self.holder, news, demands)
            except RayError as error:  # the job is over; whoever waits for something is told so
                for limiter in self._limiters.values():
                    limiter.fail(error)
                return
            for key, share in shares.items():
                self._limiters[key].allow(share)
            for call in heard:
                call()
            await asyncio.sleep(_GATHER_S)


class SharedLimiter:
    """`cascade.teachers.limits.Limiter`: the desk says how many may be in flight, and when the next may start.

    As many again as may be in flight have asked for their start already, so that a place that becomes free is taken
    at once.
    """

    def __init__(self, client: DeskClient, key: str) -> None:
        self._client, self._key = client, key
        self._places, self._doorway = Places(0), Places(1)
        self._starts = _Line(self._start_some, lambda tokens, _: client.tell(Unused(key, tokens)))
        self._waiting = self._told = 0

    async def acquire(self, tokens: int) -> Permit:
        """See `Limiter.acquire`."""
        self._waiting += 1
        self._tell_if_more()
        try:
            await self._doorway.take()
            try:
                await self._starts.ask(tokens)
                await self._take_place(tokens)
            finally:
                self._doorway.free()
        finally:
            self._waiting -= 1
        return Permit(tokens)

    async def release(self, permit: Permit, signal: Signal, used_tokens: int, retry_after: float | None = None) -> None:
        """See `Limiter.release`. After a 429 the place is free when the desk has said how many are left."""
        ended = Ended(self._key, signal, time.monotonic() - permit.started, permit.tokens, used_tokens, retry_after)
        if signal == "limited":
            self._client.tell(ended, heard=self._places.free)
        else:
            self._places.free()
            self._client.tell(ended)

    def demand(self) -> Demand:
        """What is wanted now; the desk is told so."""
        self._told = self._places.in_flight + self._waiting
        return Demand(self._places.in_flight, self._waiting)

    def allow(self, share: Share) -> None:
        """The desk's answer to the last demand."""
        self._places.allow(*share)
        self._doorway.allow(max(1, share.places))
        self._tell_if_more()

    def fail(self, error: Exception) -> None:
        """The desk is gone."""
        self._places.fail(error)
        self._doorway.fail(error)

    @property
    def is_starving(self) -> bool:
        """Whether requests wait for a place and none is in flight whose end could be told."""
        return self._waiting > 0 and not self._places.in_flight

    def _tell_if_more(self) -> None:
        """Tell the desk of a larger demand, unless it could not even meet the one before."""
        if self._places.in_flight + self._waiting > self._told and self._told <= self._places.limit:
            self._client.tell()

    async def _take_place(self, tokens: int) -> None:
        try:
            await self._places.take()
        except BaseException:
            self._client.tell(Unused(self._key, tokens))
            raise

    async def _start_some(self, tokens: list[int]) -> list[None]:
        return [None] * int(await self._client.desk.start.remote(self._client.holder, self._key, tokens))


@dataclass
class _Line:
    """Coroutines that wait for something of the desk's: while one call is under way, the next ones gather.

    Attributes:
        call: asks for several at once; it grants the first of them, at least one.
        give_back: for what was asked by, and granted to, a coroutine that is gone by then.
    """

    call: Callable[[list[Any]], Awaitable[list[Any]]]
    give_back: Callable[[Any, Any], None]
    _waiting: deque[tuple[Any, asyncio.Future[Any]]] = field(default_factory=deque)
    _asking: asyncio.Task[None] | None = None

    async def ask(self, amount: Any) -> Any:
        """Wait for one's own."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, future))
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
        return await future

    async def _ask(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_S)
            try:
                granted = await self.call([amount for amount, _ in islice(self._waiting, _AT_ONCE)])
            except Exception as error:  # it concerns the first: he is told, the next ones go on asking
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(own_error(error))
                continue
            for grant in granted:
                amount, future = self._waiting.popleft()
                if future.done():
                    self.give_back(amount, grant)
                else:
                    future.set_result(grant)
        self._asking = None


def own_error(error: Exception) -> Exception:
    """An error from another actor as it was raised there, if it is one that a user is meant to read."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CascadeError) else error
