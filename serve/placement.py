"""Which engine a request goes to: one that holds its modifier already, unless that one has too much to do.

A swap is cheap beside an answer, but requests for different modifiers cannot be computed together: they take turns on
an engine. So it is worth waiting beside a few others for the same modifier, and worth more to stay away from an engine
that is at work for another one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.events import Work

_SWAP, _TURNS = 4, 12
"""What a swap on an idle engine, and taking turns with others, are worth: so many more requests in the same batch."""


_engines: set[ReplicaID] = set()


def count_engines() -> int:
    """Engines that requests of this process go to now; one where none is up, or none was asked for anything yet."""
    return max(len(_engines), 1)


@dataclass
class Placement:
    """What engines were given to do, as far as one process gave it to them.

    Attributes:
        loaded: modifiers that an engine keeps in memory (`Limits.max_loaded_modifiers`).
    """

    loaded: int = 1
    _given: dict[str, tuple[Hashable, str]] = field(default_factory=dict)
    _at_work: dict[Hashable, Counter[str]] = field(default_factory=dict)
    _last: dict[Hashable, deque[str]] = field(default_factory=dict)
    """Engine -> the modifiers that it was asked for last, the latest at the end."""

    def cost(self, engine: Hashable, modifier: str) -> int:
        """How much speaks against an engine for a modifier's request, in requests that it has already."""
        others = +self._at_work.get(engine, Counter())
        count = others.total()
        if others.pop(modifier, 0) and not others:
            return count
        if others:
            return count + _TURNS
        return count if modifier in self._last.get(engine, (modifier,)) else count + _SWAP

    def begin(self, request: str, engine: Hashable, modifier: str) -> None:
        """An engine was given a request."""
        self._given[request] = engine, modifier
        self._at_work.setdefault(engine, Counter())[modifier] += 1
        last = self._last.setdefault(engine, deque(maxlen=self.loaded))
        if modifier in last:
            last.remove(modifier)
        last.append(modifier)

    def end(self, request: str) -> None:
        """A request is over, however it ended; unknown ones are ignored."""
        engine, modifier = self._given.pop(request, (None, ""))
        if engine in self._at_work:
            self._at_work[engine][modifier] -= 1

    def lose(self, engine: Hashable) -> None:
        """Forget an engine."""
        self._at_work.pop(engine, None)
        self._last.pop(engine, None)


class HoldersFirst(RequestRouter):
    """Ray Serve's choice among the engine's replicas, by `Placement`."""

    def initialize_state(self, loaded: int = 1, **options: Any) -> None:
        """Called once by Ray Serve, with what `placed` says."""
        self._placement = Placement(loaded)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve with all replicas whenever there are others than before."""
        super().update_replicas(replicas)
        _engines.clear()
        _engines.update(replica.replica_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, each a rank of its own, the best first: Serve takes the first that has room."""
        modifier = _modifier(pending_request)
        ranked = sorted(candidate_replicas, key=lambda replica: self._placement.cost(replica.replica_id, modifier))
        return [[replica] for replica in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray Serve when a replica has been given a request."""
        if modifier := _modifier(pending_request):
            self._placement.begin(pending_request.metadata.internal_request_id, replica_id, modifier)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray Serve when a request has ended."""
        self._placement.end(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray Serve when a replica is lost."""
        super().on_replica_actor_died(replica_id)
        self._placement.lose(replica_id)


def placed(loaded: int) -> RequestRouterConfig:
    """How a deployment says that `HoldersFirst` chooses among its engines, which keep so many modifiers in memory."""
    kwargs = {"loaded": loaded}
    return RequestRouterConfig(request_router_class=HoldersFirst, request_router_kwargs=kwargs)  # type: ignore[arg-type]


def _modifier(request: PendingRequest | None) -> str:
    """Of a request for an answer; "" for others, which any engine may have."""
    work = request.args[0] if request is not None and request.args else None
    return f"{work.choice}/{work.variant}" if isinstance(work, Work) else ""
