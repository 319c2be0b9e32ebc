"""Hard budgets: a request starts only if its worst case still fits beside all that are in flight.

`BudgetState` is the logic, `LocalBudget` puts asyncio around it; where many processes spend from one budget, one
`LocalBudget` stands behind a service that offers the same two methods (`Budget`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cascade.config import Config, Teacher
from cascade.errors import BudgetExceeded
from cascade.teachers.ledger import Ledger

_DOMAIN = 0
_ROUNDING = 1e-9


class Budget(Protocol):
    """Says whether a request may be paid."""

    async def reserve(self, tier: int, usd: float) -> str:
        """Set aside the most that a request of a tier can cost; returns its lease.

        Raises:
            BudgetExceeded: it does not fit, nor will it when the requests in flight have cost less than feared.
        """

    async def settle(self, lease: str, usd: float) -> None:
        """Book what the request has cost in place of what was set aside."""


def price_usd(teacher: Teacher, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """US dollars for one request; `cached_tokens` are those of the prompt tokens that were cached."""
    cached_price = teacher.cached_input_usd_per_million
    cached_price = teacher.input_usd_per_million if cached_price is None else cached_price
    cached = min(cached_tokens, prompt_tokens)
    return (
        (prompt_tokens - cached) * teacher.input_usd_per_million
        + cached * cached_price
        + completion_tokens * teacher.output_usd_per_million
    ) / 1e6


@dataclass(frozen=True)
class _Lease:
    started: float
    tier: int
    usd: float


@dataclass
class BudgetState:
    """Limits, money spent and money set aside, in US dollars. Times are seconds of any one clock.

    Attributes:
        domain: name for messages.
        domain_usd: limit for all tiers together.
        tier_usd: limit of each tier that has one of its own.
        spent: what each tier has spent before.
        lease_s: what was set aside for so long belongs to a process that died. Nobody knows what its request has
            cost, so all of it counts as spent until somebody settles it after all.
    """

    domain: str
    domain_usd: float
    tier_usd: Mapping[int, float] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)
    lease_s: float = 3600.0

    def __post_init__(self) -> None:
        self._spent: dict[int, float] = defaultdict(float, self.spent)
        self._spent[_DOMAIN] = sum(self.spent.values())
        self._reserved: dict[int, float] = defaultdict(float)
        self._leases: dict[str, _Lease] = {}
        self._lost: dict[str, _Lease] = {}

    def total_spent(self, tier: int | None = None) -> float:
        """Dollars spent by a tier, or by all."""
        return self._spent[tier or _DOMAIN]

    def reserve(self, now: float, lease: str, tier: int, usd: float) -> bool:
        """Set `usd` aside; False if it may fit once requests in flight are settled.

        Raises:
            BudgetExceeded: it will never fit.
        """
        self._write_off(now)
        limits = {_DOMAIN: self.domain_usd} | ({tier: self.tier_usd[tier]} if tier in self.tier_usd else {})
        for scope, limit in limits.items():
            if self._spent[scope] + usd > limit + _ROUNDING:
                raise BudgetExceeded(self._explain(scope, limit, usd))
        if any(self._spent[s] + self._reserved[s] + usd > limit + _ROUNDING for s, limit in limits.items()):
            return False
        self._leases[lease] = _Lease(now, tier, usd)
        self._set_aside(tier, usd)
        return True

    def settle(self, lease: str, usd: float) -> None:
        """Book the real cost of a request in place of what was set aside for it."""
        if lease in self._lost:
            held = self._lost.pop(lease)
            usd -= held.usd
        else:
            held = self._leases.pop(lease)
            self._set_aside(held.tier, -held.usd)
        self._book(held.tier, usd)

    def _write_off(self, now: float) -> None:
        for lease in [name for name, held in self._leases.items() if now - held.started > self.lease_s]:
            held = self._lost[lease] = self._leases.pop(lease)
            self._set_aside(held.tier, -held.usd)
            self._book(held.tier, held.usd)

    def _set_aside(self, tier: int, usd: float) -> None:
        for scope in (_DOMAIN, tier):
            self._reserved[scope] = self._reserved[scope] + usd if self._leases else 0.0  # no rounding is left over

    def _book(self, tier: int, usd: float) -> None:
        for scope in (_DOMAIN, tier):
            self._spent[scope] += usd

    def _explain(self, scope: int, limit: float, usd: float) -> str:
        name, key = f"domain {self.domain}", "budget_usd"
        if scope != _DOMAIN:
            name, key = f"tier {scope} of {name}", f"tiers.{scope - 1}.budget_usd"
        return (
            f"the budget of {name} is reached: ${self._spent[scope]:.4f} of ${limit:.2f} are spent and the next "
            f"request may cost ${usd:.4f}. All answers bought so far are kept; raise {key} and run again to go on"
        )


class LocalBudget:
    """`BudgetState` for the coroutines of one event loop."""

    def __init__(self, state: BudgetState, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self._clock = clock
        self._line = asyncio.Lock()
        self._settled = asyncio.Event()

    @classmethod
    def of(cls, config: Config, ledger: Ledger) -> LocalBudget:
        """The budgets of a config, less what the ledger says was spent on its domain."""
        return cls(budget_state(config, ledger))

    async def reserve(self, tier: int, usd: float) -> str:
        """See `Budget.reserve`. Waits while requests in flight decide whether it fits."""
        lease = uuid.uuid4().hex
        async with self._line:
            while True:
                self._settled.clear()
                if self.state.reserve(self._clock(), lease, tier, usd):
                    return lease
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._settled.wait(), self.state.lease_s)

    async def settle(self, lease: str, usd: float) -> None:
        """See `Budget.settle`."""
        self.state.settle(lease, usd)
        self._settled.set()


def budget_state(config: Config, ledger: Ledger) -> BudgetState:
    """The budgets of a config, less what the ledger says was spent on its domain."""
    return BudgetState(
        domain=config.domain,
        domain_usd=config.budget_usd,
        tier_usd={n: t.budget_usd for n, t in enumerate(config.tiers, 1) if t.budget_usd is not None},
        spent={n: ledger.spent(n, config.domain) for n in range(1, len(config.tiers) + 1)},
    )
