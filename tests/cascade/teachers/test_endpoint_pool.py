"""Several endpoints or keys of one tier."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cascade.config import Teacher
from cascade.errors import TeacherError
from cascade.store import Store
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.endpoint import EndpointClient
from cascade.teachers.ledger import Ledger
from cascade.teachers.limits import limiter_key


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndpointClient, "backoff", lambda self, failures: 0.01)


@pytest.fixture
def open_client(tmp_path: Path) -> Callable[[Teacher], contextlib.AbstractAsyncContextManager[TeacherClient]]:
    @contextlib.asynccontextmanager
    async def open_it(teacher: Teacher) -> AsyncIterator[TeacherClient]:
        ledger, budget = Ledger(Store(str(tmp_path))), LocalBudget(BudgetState("reasoning", 100.0))
        async with TeacherClient(teacher, 1, "reasoning", ledger, budget) as client:
            yield client

    return open_it


async def test_the_places_of_two_endpoints_add_up(fake_server, make_teacher, make_task, open_client) -> None:
    first, second = fake_server(), fake_server()
    first.delay = second.delay = 0.5
    async with open_client(make_teacher(first.url, second.url, max_concurrency=16)) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(32)))
    assert all(a.ok for a in answers)
    assert (first.most_in_flight, second.most_in_flight) == (16, 16)


async def test_two_keys_of_one_endpoint_add_up_and_name_the_same_request(
    fake_server, make_teacher, make_task, open_client, monkeypatch
) -> None:
    server = fake_server()
    server.delay = 0.5
    both = [{"base_url": server.url, "api_key_env": name, "max_concurrency": 16} for name in ("KEY_ONE", "KEY_TWO")]
    monkeypatch.setenv("KEY_ONE", "one")
    monkeypatch.setenv("KEY_TWO", "two")
    teacher = make_teacher(server.url, endpoints=both)
    assert len({limiter_key(e) for e in teacher.endpoints}) == 2
    async with open_client(teacher) as client:
        await asyncio.gather(*(client.answer(make_task(n)) for n in range(32)))
    assert server.most_in_flight == 32
    assert Counter(h["authorization"] for h in server.headers) == {"Bearer one": 16, "Bearer two": 16}
    one_left = make_teacher(server.url, endpoints=both[1:])
    async with open_client(one_left) as client:
        again = await asyncio.gather(*(client.answer(make_task(n)) for n in range(32)))
    assert all(a.from_ledger for a in again)


async def test_a_slow_endpoint_holds_few_requests_back(fake_server, make_teacher, make_task, open_client) -> None:
    slow, quick = fake_server(), fake_server()
    teacher = make_teacher(slow.url, quick.url, max_concurrency=16)
    slow_limits = teacher.endpoints[0].model_copy(update={"requests_per_minute": 120})  # 6 at once, then 1.9 a second
    teacher = teacher.model_copy(update={"endpoints": [slow_limits, teacher.endpoints[1]]})
    async with open_client(teacher) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(100)))
    assert all(a.ok for a in answers)
    assert 6 <= len(slow.calls) <= 13, "its burst, and those that it had waiting"
    assert len(slow.calls) + len(quick.calls) == 100


async def test_a_request_that_fails_at_one_endpoint_goes_to_another(
    fake_server, make_teacher, make_task, open_client
) -> None:
    first, second = fake_server(), fake_server()
    first.script.extend([500] * 5)
    async with open_client(make_teacher(first.url, second.url)) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(5)))
    assert all(a.ok for a in answers)
    failed = 5 - len(first.script)
    assert failed > 0
    assert len(first.calls) == failed
    assert len(second.calls) == 5


async def test_those_who_wait_are_told_when_every_endpoint_is_out(
    fake_server, make_teacher, make_task, open_client
) -> None:
    first, second = fake_server(), fake_server()
    for server in (first, second):
        server.delay = 0.05
        server.script.extend([401] * 200)
    async with open_client(make_teacher(first.url, second.url, max_concurrency=2)) as client:
        asked = asyncio.gather(*(client.answer(make_task(n)) for n in range(40)), return_exceptions=True)
        results = await asyncio.wait_for(asked, 20)
    assert all(isinstance(r, TeacherError) for r in results)
    assert "cannot be asked" in str(results[-1])
