"""Hard budgets: a request starts only if its worst case still fits beside all that are in flight.

`BudgetState` is the logic, `LocalBudget` puts asyncio around it; where many processes spend from one budget, one
`LocalBudget` stands behind a service that offers the same two methods (`Budget`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
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

    async def correct(self, tier: int, usd: float) -> None:
        """Book by how much more (less: negative) a tier has spent than was counted before."""


def price_usd(teacher: Teacher, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """US dollars for one request, as the teacher is asked: live or in a batch.

    Args:
        cached_tokens: those of the prompt tokens that were cached.
    """
    cached_price = teacher.cached_input_usd_per_million
    cached_price = teacher.input_usd_per_million if cached_price is None else cached_price
    cached = min(cached_tokens, prompt_tokens)
    live = (
        (prompt_tokens - cached) * teacher.input_usd_per_million
        + cached * cached_price
        + completion_tokens * teacher.output_usd_per_million
    ) / 1e6
    return live * (teacher.batch_price_share if teacher.mode == "batch" else 1.0)


@dataclass(frozen=True)
class _Lease:
    tier: int
    usd: float
    holder: str


@dataclass
class BudgetState:
    """Limits, money spent and money set aside, in US dollars.

    Attributes:
        domain: name for messages.
        domain_usd: limit for all tiers together.
        tier_usd: limit of each tier that has one of its own.
        spent: what each tier has spent before.
    """

    domain: str
    domain_usd: float
    tier_usd: Mapping[int, float] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._spent: dict[int, float] = defaultdict(float, self.spent)
        self._spent[_DOMAIN] = sum(self.spent.values())
        self._reserved: dict[int, float] = defaultdict(float)
        self._leases: dict[str, _Lease] = {}
        self._lost: dict[str, _Lease] = {}

    def total_spent(self, tier: int | None = None) -> float:
        """Dollars spent by a tier, or by all."""
        return self._spent[tier or _DOMAIN]

    def total_reserved(self, tier: int | None = None) -> float:
        """Dollars set aside for a tier's requests in flight, or for all."""
        return self._reserved[tier or _DOMAIN]

    def reserve(self, lease: str, tier: int, usd: float, holder: str = "") -> bool:
        """Set `usd` aside for one of a holder's requests; False if it may fit once requests in flight are settled.

        Raises:
            BudgetExceeded: it will never fit.
        """
        limits = {_DOMAIN: self.domain_usd} | ({tier: self.tier_usd[tier]} if tier in self.tier_usd else {})
        for scope, limit in limits.items():
            if self._spent[scope] + usd > limit + _ROUNDING:
                raise BudgetExceeded(self._explain(scope, limit, usd))
        if any(self._spent[s] + self._reserved[s] + usd > limit + _ROUNDING for s, limit in limits.items()):
            return False
        self._leases[lease] = _Lease(tier, usd, holder)
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

    def correct(self, tier: int, usd: float) -> None:
        """See `Budget.correct`."""
        self._book(tier, usd)

    def write_off(self, holder: str) -> None:
        """Count all that a holder that died had set aside as spent, until somebody settles it after all.

        Nobody knows what its requests have cost.
        """
        for lease in [name for name, held in self._leases.items() if held.holder == holder]:
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

    def __init__(self, state: BudgetState) -> None:
        self.state = state
        self._line = asyncio.Lock()
        self._settled = asyncio.Event()

    @classmethod
    def of(cls, config: Config, ledger: Ledger) -> LocalBudget:
        """The budgets of a config, less what the ledger says was spent on its domain."""
        return cls(budget_state(config, ledger))

    async def reserve(self, tier: int, usd: float) -> str:
        """See `Budget.reserve`. Waits while requests in flight decide whether it fits."""
        return (await self.reserve_some(tier, [usd]))[0]

    async def reserve_some(self, tier: int, usd: Sequence[float], holder: str = "") -> list[str]:
        """Reserve for the first of several requests of a tier, waiting if need be, and for the next that fit then.

        Args:
            usd: the most that each request can cost, in the order in which they want to start; at least one.
            holder: who has to be alive to settle them, see `BudgetState.write_off`.

        Returns:
            Leases of the first requests, at least one.

        Raises:
            BudgetExceeded: the first will never fit.
        """
        async with self._line:
            leases = [uuid.uuid4().hex]
            while True:
                self._settled.clear()
                if self.state.reserve(leases[0], tier, usd[0], holder):
                    break
                await self._settled.wait()
            for amount in usd[1:]:
                lease = uuid.uuid4().hex
                try:
                    if not self.state.reserve(lease, tier, amount, holder):
                        break
                except BudgetExceeded:  # that request's own affair: it is told when it is the first
                    break
                leases.append(lease)
            return leases

    async def settle(self, lease: str, usd: float) -> None:
        """See `Budget.settle`."""
        self.state.settle(lease, usd)
        self._settled.set()

    async def correct(self, tier: int, usd: float) -> None:
        """See `Budget.correct`."""
        self.state.correct(tier, usd)
        self._settled.set()

    def write_off(self, holder: str) -> None:
        """See `BudgetState.write_off`."""
        self.state.write_off(holder)
        self._settled.set()


def budget_state(config: Config, ledger: Ledger) -> BudgetState:
    """The budgets of a config, less what its domain has cost by the ledger.

    A request that broke off, or that a killed process had in flight, counts with the most that it can have cost: a
    budget holds for the bill, not only for what is known of it.
    """
    return BudgetState(
        domain=config.domain,
        domain_usd=config.budget_usd,
        tier_usd={n: t.budget_usd for n, t in enumerate(config.tiers, 1) if t.budget_usd is not None},
        spent={n: ledger.spent_at_most(n, config.domain) for n in range(1, len(config.tiers) + 1)},
    )
