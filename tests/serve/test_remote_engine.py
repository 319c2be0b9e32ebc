"""Engines that are lost at work: who is asked again, and what the client is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentResponseGenerator

from cascade.tasks import Message
from serve.events import Delta, Event, Failed, Finished, Started, Work
from serve.ingress import RemoteEngine

WORK = Work("sums", (Message("user", "hi"),))
STARTED, OTHER_VERSION = Started("v1", 3, 0.0, 0.0), Started("v2", 3, 0.0, 0.0)
ANSWER = (Delta("four"), Finished("stop", 4))
LOST = (ActorDiedError(), ActorUnavailableError("gone", b"0" * 16))


class Replica(DeploymentResponseGenerator):
    """A replica's answer by script: events, and perhaps an error."""

    def __init__(self, script: Sequence[Event | Exception]) -> None:
        self.script, self.cancelled = list(script), False

    def __aiter__(self) -> Replica:
        return self

    async def __anext__(self) -> Any:
        if not self.script:
            raise StopAsyncIteration
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Each request goes to the next replica."""

    def __init__(self, *scripts: Sequence[Event | Exception]) -> None:
        self.replicas = [Replica(script) for script in scripts]
        self.asked: list[Replica] = []
        self.stream = self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, work: Work) -> Replica:
        assert work == WORK
        self.asked.append(self.replicas.pop(0))
        return self.asked[-1]


async def told(*scripts: Sequence[Event | Exception]) -> tuple[list[Event], Handle]:
    """What the gateway is told, and who was asked."""
    handle = Handle(*scripts)
    events = [event async for event in RemoteEngine(handle).stream(WORK)]
    assert all(replica.cancelled for replica in handle.asked)
    return events, handle


@pytest.mark.parametrize("error", LOST, ids=repr)
@pytest.mark.parametrize("said", [(), (STARTED,)], ids=["nothing yet", "only begun"])
async def test_another_replica_answers_what_had_no_text_yet(error: Exception, said: tuple[Event, ...]) -> None:
    events, handle = await told((*said, error), (STARTED, *ANSWER))
    assert events == [STARTED, *ANSWER]
    assert len(handle.asked) == 2


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    events, handle = await told((STARTED, Delta("fo"), LOST[0]), (STARTED, *ANSWER))
    assert events[:2] == [STARTED, Delta("fo")]
    assert [(e.status, e.code, e.retry_after_s) for e in events[2:] if isinstance(e, Failed)] == [
        (503, "engine_lost", 1)
    ]
    assert len(handle.asked) == 1


async def test_a_second_loss_is_told() -> None:
    events, handle = await told((LOST[0],), (STARTED, LOST[0]), (STARTED, *ANSWER))
    assert events[0] == STARTED
    assert isinstance(events[1], Failed)
    assert (len(events), len(handle.asked)) == (2, 2)


async def test_no_answer_of_another_version_than_the_headers_say() -> None:
    events, _ = await told((STARTED, LOST[0]), (OTHER_VERSION, *ANSWER))
    assert events[0] == STARTED
    assert isinstance(events[1], Failed)
    assert len(events) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [(BackPressureError(num_queued_requests=9, max_queued_requests=9), 429), (ValueError("bug"), 503)],
)
async def test_what_is_no_loss_is_not_asked_again(error: Exception, status: int) -> None:
    events, handle = await told((error,), (STARTED, *ANSWER))
    assert [e.status for e in events if isinstance(e, Failed)] == [status]
    assert len(handle.asked) == 1
