"""What a tier's teachers are doing, as Prometheus metrics on Ray's own metrics port; `grafana.json` shows them.

cascade_teacher_requests_total{domain, tier, endpoint, outcome}   outcome: ok, limited (429) or failed
cascade_teacher_tokens_total{domain, tier, endpoint}
cascade_teacher_spent_usd{domain, tier}                            by the budget's books, earlier runs included
cascade_teacher_reserved_usd{domain, tier}                         the most that requests in flight can cost
cascade_teacher_budget_usd{domain, tier}                           the tier's limit, or the domain's
cascade_teacher_in_flight{domain, tier, endpoint}
cascade_teacher_concurrency{domain, tier, endpoint}                what the adaptive limit allows now
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from cascade.config import Config
from cascade.teachers.budget import BudgetState
from cascade.teachers.limits import Signal, limiter_key

_TIER = ("domain", "tier")
_ENDPOINT = (*_TIER, "endpoint")


class TierMetrics:
    """The metrics of one tier of one domain, kept by its desk."""

    def __init__(self, config: Config, tier: int) -> None:
        teacher = config.tier(tier)
        self._tags = {"domain": config.domain, "tier": str(tier)}
        self._urls = {limiter_key(e): e.base_url for e in teacher.endpoints}
        self._requests = Counter("cascade_teacher_requests", "Requests that ended", (*_ENDPOINT, "outcome"))
        self._tokens = Counter("cascade_teacher_tokens", "Tokens in and out", _ENDPOINT)
        self._spent = Gauge("cascade_teacher_spent_usd", "US dollars spent", _TIER)
        self._reserved = Gauge("cascade_teacher_reserved_usd", "US dollars set aside for requests in flight", _TIER)
        self._in_flight = Gauge("cascade_teacher_in_flight", "Requests in flight", _ENDPOINT)
        self._concurrency = Gauge("cascade_teacher_concurrency", "Requests that may be in flight now", _ENDPOINT)
        limit = config.budget_usd if teacher.budget_usd is None else teacher.budget_usd
        Gauge("cascade_teacher_budget_usd", "US dollars that may be spent", _TIER).set(limit, self._tags)

    def ended(self, limiter: str, signal: Signal, tokens: int) -> None:
        """A request is over; `limiter` is its endpoint's `limiter_key`."""
        tags = self._tags | {"endpoint": self._urls.get(limiter, limiter)}
        self._requests.inc(1, tags | {"outcome": signal})
        if tokens > 0:
            self._tokens.inc(tokens, tags)

    def show(self, budget: BudgetState, limiters: Mapping[str, tuple[int, float]]) -> None:
        """The state of the books and of the endpoints: by `limiter_key` what is in flight and what may be."""
        tier = int(self._tags["tier"])
        self._spent.set(budget.total_spent(tier), self._tags)
        self._reserved.set(budget.total_reserved(tier), self._tags)
        for key, (in_flight, concurrency) in limiters.items():
            tags = self._tags | {"endpoint": self._urls.get(key, key)}
            self._in_flight.set(in_flight, tags)
            self._concurrency.set(concurrency, tags)
