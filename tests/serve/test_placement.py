"""Which engine a request goes to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import PendingRequest

from cascade.tasks import Message
from serve.events import Work
from serve.placement import HoldersFirst, Placement, placed


class Router(HoldersFirst):
    """The router without what Ray Serve gives it."""

    def __init__(self, *names: str, loaded: int = 1) -> None:
        self.initialize_state(**placed(loaded).request_router_kwargs)
        self.replicas: Any = [SimpleNamespace(replica_id=name) for name in names]
        self.requests = 0

    def ask(self, choice: str | None) -> tuple[str, str]:
        """Give the best replica a request; None for one that is no question. Returns its name and the request's."""
        self.requests += 1
        metadata: Any = SimpleNamespace(internal_request_id=str(self.requests))
        args = [] if choice is None else [Work(choice, (Message("user", "hi"),))]
        request = PendingRequest(args, {}, metadata, future=None)  # type: ignore[arg-type]
        ranks: Any = asyncio.run(self.choose_replicas(self.replicas, request))
        assert sorted(r.replica_id for [r] in ranks) == sorted(r.replica_id for r in self.replicas)
        [best] = ranks[0]
        self.on_request_routed(request, best.replica_id, None)
        return str(best.replica_id), str(self.requests)

    def end(self, engine: Any, request: str) -> None:
        self.on_request_completed(engine, request)


def test_one_after_another_each_modifier_stays_where_it_is() -> None:
    router = Router("a", "b")
    seen: dict[str, set[str]] = {}
    for choice in ["code", "sums", "code", "sums", "sums", "code"]:
        engine, request = router.ask(choice)
        router.end(engine, request)
        seen.setdefault(choice, set()).add(engine)
    assert seen["code"] != seen["sums"]
    assert all(len(engines) == 1 for engines in seen.values())


@pytest.mark.parametrize(("loaded", "engine"), [(1, "b"), (2, "a")])
def test_a_modifier_stays_for_a_second_one_where_two_are_in_memory(loaded: int, engine: str) -> None:
    router = Router("a", loaded=loaded)
    for choice in ("code", "sums"):
        router.end(*router.ask(choice))
    router.replicas.append(SimpleNamespace(replica_id="b"))
    assert router.ask("code")[0] == engine


def test_a_crowd_for_one_modifier_takes_all_engines() -> None:
    router = Router("a", "b")
    engines = [router.ask("code")[0] for _ in range(40)]
    assert engines.count("a") == 20


def test_nobody_takes_turns_while_an_engine_is_free_of_others() -> None:
    router = Router("a", "b")
    assert [router.ask("code")[0], router.ask("sums")[0]] == ["a", "b"]
    assert [router.ask("code")[0] for _ in range(5)] == ["a"] * 5
    assert [router.ask("sums")[0] for _ in range(5)] == ["b"] * 5
    assert [router.ask("code")[0] for _ in range(20)].count("b") > 0, "a long queue outweighs taking turns"


def test_what_has_ended_or_is_lost_no_longer_counts() -> None:
    placement = Placement()
    placement.begin("1", "a", "code")
    assert (placement.cost("a", "code"), placement.cost("a", "sums")) == (1, 13)
    placement.end("1")
    placement.end("1")
    placement.end("never seen")
    assert (placement.cost("a", "code"), placement.cost("a", "sums")) == (0, 4)
    placement.begin("2", "a", "code")
    placement.lose("a")
    placement.end("2")
    assert (placement.cost("a", "code"), placement.cost("a", "sums")) == (0, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_other_calls_go_anywhere_and_leave_no_trace(count: int) -> None:
    router = Router(*"abc"[:count])
    router.ask(None)
    assert router.ask("code")[0] == "a"
    assert len(asyncio.run(router.choose_replicas(router.replicas))) == count
