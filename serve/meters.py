"""What serving counts; Prometheus gets it through Ray (`ray.util.metrics`), dashboards from `grafana.json`."""

from __future__ import annotations

from typing import Protocol

from ray.util.metrics import Counter, Histogram

from cascade.tasks import Route
from serve.events import Started

_MS = [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 30_000.0]
_SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]


class Meters(Protocol):
    """Told of everything that happens to requests."""

    def routed(self, route: Route) -> None:
        """A request has its route."""

    def started(self, started: Started) -> None:
        """Its answer is being made."""

    def finished(self, route: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Its answer is complete."""

    def failed(self, status: int) -> None:
        """It was refused, or broke off."""

    def rated(self, rating: str) -> None:
        """A user has said what the answer was worth."""


class _NoMeters:
    def routed(self, route: Route) -> None: ...
    def started(self, started: Started) -> None: ...
    def finished(self, route: str, prompt_tokens: int, completion_tokens: int) -> None: ...
    def failed(self, status: int) -> None: ...
    def rated(self, rating: str) -> None: ...


NO_METERS: Meters = _NoMeters()


class RayMeters:
    """Meters that Ray exports to Prometheus, with the prefix `ray_`."""

    def __init__(self) -> None:
        self._requests = Counter("cascade_requests", "requests routed", ("route", "reason"))
        self._confidence = Histogram(
            "cascade_route_confidence", "the router's confidence in its route", _SHARES, ("route",)
        )
        self._queue = Histogram("cascade_queue_ms", "from arrival until the first token is computed", _MS)
        self._tokens = Counter("cascade_tokens", "tokens", ("route", "kind"))
        self._failures = Counter("cascade_failures", "requests refused or broken off", ("status",))
        self._ratings = Counter("cascade_ratings", "what users said of answers", ("rating",))

    def routed(self, route: Route) -> None:
        self._requests.inc(1, {"route": route.choice, "reason": route.reason})
        self._confidence.observe(route.confidence, {"route": route.choice})

    def started(self, started: Started) -> None:
        self._queue.observe(started.queue_ms)

    def finished(self, route: str, prompt_tokens: int, completion_tokens: int) -> None:
        for kind, count in (("prompt", prompt_tokens), ("completion", completion_tokens)):
            if count:
                self._tokens.inc(count, {"route": route, "kind": kind})

    def failed(self, status: int) -> None:
        self._failures.inc(1, {"status": str(status)})

    def rated(self, rating: str) -> None:
        self._ratings.inc(1, {"rating": rating})


class SwapMeter:
    """An engine's swaps, each counted once, whoever comes in with it; exported by Ray as those of `RayMeters`."""

    def __init__(self) -> None:
        self._swaps = Histogram("cascade_swap_ms", "swaps of the modifier in the slot", _MS)

    def __call__(self, milliseconds: float) -> None:
        self._swaps.observe(milliseconds)
