"""How far a tier's teacher is: counts, money, pace and the time that is left, for people and for Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ray.util.metrics import Gauge

WINDOW_S = 60.0
"""Pace is measured over this much of the past."""
_FROM_S = 1.0
"""Before so much time has passed there is no pace to speak of."""


@dataclass(frozen=True, slots=True)
class TierState:
    """A tier at one moment.

    Attributes:
        done: tasks with a verdict, of `total` that the tier is asked.
        spent_usd: by this tier on these tasks.
        remaining_usd: of the tier's budget or the domain's, whichever is the less.
        requests_per_minute: over the last minute; 0 if nothing was asked.
        seconds_left: at the present pace; None if there is none.
    """

    tier: int
    teacher: str
    done: int
    total: int
    verified: int
    spent_usd: float
    remaining_usd: float
    requests_per_minute: float
    seconds_left: float | None

    @property
    def escalated(self) -> int:
        """Tasks that this tier did not solve: the next one is asked."""
        return self.done - self.verified

    @property
    def eta(self) -> str:
        """The time that is left in words, "" if it is not known."""
        if self.seconds_left is None:
            return ""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
        )

    @property
    def note(self) -> str:
        """Everything but the count in one line."""
        parts = [f"asked, {self.verified} verified", f"{self.escalated} escalated", f"${self.spent_usd:.4f} spent"]
        parts.append(f"${self.remaining_usd:.4f} of the budget left")
        if self.requests_per_minute:
            parts.append(f"{self.requests_per_minute:.0f} requests/min")
        return ", ".join([*parts, f"ETA {self.eta}"] if self.eta else parts)


@dataclass
class TierMeter:
    """Counts what a tier does. Times are seconds of any one clock.

    Attributes:
        done: tasks that had a verdict before, as `verified`.
        remaining_usd: of the budget, before anything more is spent.
    """

    tier: int
    teacher: str
    total: int
    done: int
    verified: int
    remaining_usd: float
    clock: Callable[[], float] = time.monotonic
    spent_usd: float = 0.0
    paid_usd: float = 0.0
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _requests: int = 0  # of the recent ones
    _began: float = 0.0

    def __post_init__(self) -> None:
        self._began = self.clock()

    def add(self, passed: bool, cost_usd: float, paid_usd: float, requests: int) -> TierState:
        """One more task has its verdict.

        Args:
            cost_usd: what its answers cost, whenever they were paid.
            paid_usd: of that, what was paid now.
            requests: sent now; answers from the ledger are none.
        """
        self.done, self.verified = min(self.total, self.done + 1), self.verified + passed
        self.spent_usd, self.paid_usd = self.spent_usd + cost_usd, self.paid_usd + paid_usd
        self._recent.append((self.clock(), requests))
        self._requests += requests
        return self.state()

    def state(self) -> TierState:
        """The tier now."""
        now = self.clock()
        while self._recent and self._recent[0][0] <= now - WINDOW_S:
            self._requests -= self._recent.popleft()[1]
        span = min(WINDOW_S, now - self._began)
        known = span >= _FROM_S and bool(self._recent)
        left = self.total - self.done
        return TierState(
            tier=self.tier,
            teacher=self.teacher,
            done=self.done,
            total=self.total,
            verified=self.verified,
            spent_usd=self.spent_usd,
            remaining_usd=max(0.0, self.remaining_usd - self.paid_usd),
            requests_per_minute=60 * self._requests / span if known else 0.0,
            seconds_left=left * span / len(self._recent) if known and left else None,
        )


_HELP = {
    "tasks": "tasks that the tier is asked",
    "done": "tasks with a verdict",
    "verified": "tasks with a verified answer",
    "escalated": "tasks that the tier did not solve",
    "spent_usd": "US dollars spent by the tier on these tasks",
    "budget_left_usd": "US dollars that may still be spent",
    "requests_per_minute": "requests sent, over the last minute",
    "seconds_left": "seconds to the end at the present pace, -1 if unknown",
}


class TierGauges:
    """The same figures as Prometheus metrics, `ray_cascade_tier_…` on Ray's metrics port."""

    def __init__(self, domain: str) -> None:
        tags = ("domain", "tier")
        self._gauges = {n: Gauge(f"cascade_tier_{n}", description=d, tag_keys=tags) for n, d in _HELP.items()}
        self._domain = domain

    def show(self, state: TierState) -> None:
        """Publish a tier's figures."""
        values = {
            "tasks": state.total,
            "done": state.done,
            "verified": state.verified,
            "escalated": state.escalated,
            "spent_usd": state.spent_usd,
            "budget_left_usd": state.remaining_usd,
            "requests_per_minute": state.requests_per_minute,
            "seconds_left": -1.0 if state.seconds_left is None else state.seconds_left,
        }
        for name, value in values.items():
            self._gauges[name].set(value, tags={"domain": self._domain, "tier": str(state.tier)})
