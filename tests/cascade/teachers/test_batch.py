from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from mock_openai import MockOpenAI, Settings

from cascade.artifacts import Store
from cascade.config import Teacher
from cascade.teachers import batch
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.endpoint import EndpointClient
from cascade.teachers.ledger import Ledger


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "GATHER_S", 0.05)
    monkeypatch.setattr(batch, "POLL_S", 0.05)
    monkeypatch.setattr(EndpointClient, "backoff", lambda self, failures: 0.01)


@pytest.fixture
def server(serve_app: Callable[..., str]) -> MockOpenAI:
    mock = MockOpenAI(Settings(batch_s=0.1, prices=[10.0, 10.0, 100.0]))
    mock.url = serve_app(mock.app())  # type: ignore[attr-defined]
    return mock


@pytest.fixture
def teacher(server: MockOpenAI, make_teacher: Callable[..., Teacher]) -> Teacher:
    return make_teacher(server.url, mode="batch", batch_price_share=0.5)  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def opened(path: Path, teacher: Teacher) -> AsyncIterator[TeacherClient]:
    ledger = Ledger(Store(str(path)))
    budget = LocalBudget(BudgetState("reasoning", 100.0))
    async with TeacherClient(teacher, 1, "reasoning", ledger, budget) as client:
        client.seen = budget.state  # type: ignore[attr-defined]
        yield client
    ledger.close()


def _wait_for_a_batch(server: MockOpenAI) -> None:
    while not server.counts.batches:
        time.sleep(0.01)
    time.sleep(0.1)


async def test_all_questions_go_in_one_batch_at_half_price(server, teacher, make_task, tmp_path) -> None:
    async with opened(tmp_path, teacher) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(30)))
        assert client.seen.total_spent() == pytest.approx(server.counts.charged_usd)
        assert client.seen.total_reserved() == 0
    assert [a.text for a in answers] == [f"answer to What is {n} + {n}?" for n in range(30)]
    assert server.counts.batches == 1
    assert server.counts.arrived == 0, "no live request"
    ledger = Ledger(Store(str(tmp_path)))
    assert ledger.spent() == ledger.spent_at_most() == pytest.approx(server.counts.charged_usd)
    assert ledger.unsettled == 0
    async with opened(tmp_path, teacher) as client:
        assert (await client.answer(make_task(3))).from_ledger
        assert (await client.answer(make_task(99))).ok
    assert server.counts.batches == 2


@pytest.mark.parametrize("forgotten", [False, True], ids=["id known", "killed before the id was stored"])
async def test_a_batch_is_never_submitted_twice(server, teacher, make_task, tmp_path, forgotten: bool) -> None:
    server.settings.batch_s = 1.0
    async with opened(tmp_path, teacher) as client:
        first = [asyncio.ensure_future(client.answer(make_task(n))) for n in range(10)]
        await asyncio.to_thread(_wait_for_a_batch, server)
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
    store = Store(str(tmp_path))
    (name,) = store.list("batches/reasoning")
    record = store.read_json(f"batches/reasoning/{name}")
    assert record["remote"]
    assert Ledger(store).spent() == 0 < Ledger(store).spent_at_most()
    if forgotten:
        store.write_json(f"batches/reasoning/{name}", record | {"remote": ""})
    async with opened(tmp_path, teacher) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(10)))
    assert all(a.ok for a in answers)
    assert server.counts.batches == 1
    assert max(server.counts.answered.values()) == 1
    assert Ledger(store).spent() == Ledger(store).spent_at_most() == pytest.approx(server.counts.charged_usd)


async def test_killed_before_the_batch_existed_it_is_submitted_then(server, teacher, make_task, tmp_path) -> None:
    store = Store(str(tmp_path))
    async with opened(tmp_path, teacher) as client:
        request = client._request(make_task(1), 0)
        identity = client._identity(client._pool.endpoints[0], request)
    record = batch._Record("b1", 1, teacher.name, server.url, {identity["key"]: identity})
    store.write_json("batches/reasoning/b1.json", record.__dict__)
    Ledger(store).record(batch.Sent(identity["key"], "reasoning", 1, 5.0, "b1"))
    async with opened(tmp_path, teacher) as client:
        assert (await client.answer(make_task(1))).ok
    assert server.counts.batches == 1
    assert Ledger(store).unsettled == 0
    assert Ledger(store).spent_at_most() == pytest.approx(server.counts.charged_usd)


async def test_what_fails_within_a_batch_goes_into_the_next(server, teacher, make_task, tmp_path) -> None:
    server.settings.faults = 0.5
    async with opened(tmp_path, teacher.model_copy(update={"retries": 20})) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(20)))
    assert all(a.ok for a in answers)
    assert server.counts.batches > 1
    assert max(server.counts.answered.values()) == 1
    assert Ledger(Store(str(tmp_path))).spent_at_most() == pytest.approx(server.counts.charged_usd)
