from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from batch_clients import opened
from mock_openai import MockOpenAI, Settings, error
from starlette.requests import Request
from starlette.responses import Response

from cascade.config import Teacher
from cascade.errors import TeacherError
from cascade.store import Store
from cascade.tasks import Message
from cascade.teachers import batch
from cascade.teachers.batch_record import Record, Records
from cascade.teachers.budget import price_usd
from cascade.teachers.ledger import Ledger

Handler = Callable[[Request], Awaitable[Response]]
pytestmark = pytest.mark.usefixtures("quick_batches")


@pytest.fixture
def server(serve_app: Callable[..., str]) -> MockOpenAI:
    mock = MockOpenAI(Settings(batch_s=0.1, prices=[10.0, 10.0, 100.0]))
    mock.url = serve_app(mock.app())  # type: ignore[attr-defined]
    return mock


@pytest.fixture
def teacher(server: MockOpenAI, make_teacher: Callable[..., Teacher]) -> Teacher:
    return make_teacher(server.url, mode="batch", batch_price_share=0.5)  # type: ignore[attr-defined]


def _wait_for_a_batch(server: MockOpenAI, before: int = 0) -> None:
    while server.counts.batches <= before:
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


async def test_no_name_of_another_account_goes_with_a_batch(serve_mock, make_task, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "somebody")
    mock, seen = MockOpenAI(Settings(batch_s=0.1)), set()

    def handle(handler: Handler) -> Handler:
        async def look(request: Request) -> Response:
            seen.update(request.headers)
            return await handler(request)

        return look

    for name in ("upload", "create_batch", "show_batch", "download"):
        monkeypatch.setattr(mock, name, handle(getattr(mock, name)))
    async with opened(tmp_path, serve_mock(mock)) as client:
        assert (await client.answer(make_task(1))).ok
    assert "host" in seen
    assert "openai-organization" not in seen


async def test_an_answer_with_an_end_of_line_of_another_kind_is_read(server, teacher, make_task, tmp_path) -> None:
    task = replace(make_task(1), messages=(Message("user", "one\u2028two\x85three"),))
    async with opened(tmp_path, teacher) as client:
        assert (await asyncio.wait_for(client.answer(task), 20)).text == "answer to one\u2028two\x85three"


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
    record = Record("b1", 1, teacher.name, server.url, {identity["key"]: identity})
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


async def test_tokens_that_a_batch_does_not_report_are_estimated(
    server, teacher, make_task, tmp_path, monkeypatch
) -> None:
    charge = server.charge

    def silent(body: Any, completion: Any, share: float) -> None:
        charge(body, completion, share)
        completion["usage"] = None

    monkeypatch.setattr(server, "charge", silent)
    async with opened(tmp_path, teacher) as client:
        assert (await client.answer(make_task(1))).ok
    (row,) = Ledger(Store(str(tmp_path))).entries()
    assert row.prompt_tokens == server.counts.prompt_tokens > 0
    assert row.price_usd == pytest.approx(price_usd(teacher, row.prompt_tokens, row.completion_tokens))


def _answering(fault: Callable[[], Response | None], handler: Handler) -> Handler:
    async def answer(request: Request) -> Response:
        return fault() or await handler(request)

    return answer


async def test_a_batch_that_is_not_taken_stops_the_run(serve_mock, make_task, tmp_path) -> None:
    mock, why = MockOpenAI(Settings()), "line 1 is no request"
    failed = {"status": "failed", "errors": {"object": "list", "data": [{"code": "x", "message": why}]}}
    look = mock._look
    mock._look = lambda b: look(b) | failed  # type: ignore[method-assign]
    async with opened(tmp_path, serve_mock(mock)) as client:
        asked = (client.answer(make_task(n)) for n in range(2))
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
    assert all(isinstance(a, TeacherError) and why in str(a) for a in answers)
    assert Ledger(Store(str(tmp_path))).spent_at_most() == 0


async def test_what_can_not_be_submitted_stops_the_run_and_is_looked_for_in_the_next(
    serve_mock, make_task, tmp_path
) -> None:
    mock, faults = MockOpenAI(Settings(batch_s=0.1)), 8
    create = mock.create_batch

    async def broken(request: Request) -> Response:
        nonlocal faults
        faults -= 1
        if not faults:
            await create(request)  # the last one does arrive
        return error(500, "try later") if faults >= 0 else await create(request)

    mock.create_batch = broken  # type: ignore[method-assign]
    teacher = serve_mock(mock)
    async with opened(tmp_path, teacher) as client:
        with pytest.raises(TeacherError, match=r"could not be submitted.*run again"):
            await asyncio.wait_for(client.answer(make_task(1)), 20)
    async with opened(tmp_path, teacher) as client:
        assert (await asyncio.wait_for(client.answer(make_task(1)), 20)).ok
    assert mock.counts.batches == 1
    assert max(mock.counts.answered.values()) == 1


async def test_results_that_are_gone_stop_the_run_and_are_not_paid_again(serve_mock, make_task, tmp_path) -> None:
    mock = MockOpenAI(Settings(batch_s=0.1))
    mock.download = _answering(lambda: error(404, "no such file"), mock.download)  # type: ignore[method-assign]
    teacher = serve_mock(mock)
    for _ in range(2):
        async with opened(tmp_path, teacher) as client:
            for _ in range(2):
                with pytest.raises(
                    TeacherError, match=r"cannot be fetched.*no such file.*delete .*/batches/reasoning/"
                ):
                    await asyncio.wait_for(client.answer(make_task(1)), 20)
    assert mock.counts.batches == 1
    assert Ledger(Store(str(tmp_path))).spent_at_most() > 0


async def test_a_full_disk_is_told_to_those_who_wait(server, teacher, make_task, tmp_path, monkeypatch) -> None:
    async def full(row: object) -> None:
        raise OSError("no space left")

    async with opened(tmp_path, teacher) as client:
        monkeypatch.setattr(client._ledger, "arecord", full)
        with pytest.raises(OSError, match="no space left"):
            await asyncio.wait_for(client.answer(make_task(1)), 20)


async def test_batches_are_counted_once_though_looking_for_them_failed_half_way(
    serve_mock, make_task, tmp_path
) -> None:
    mock, looks = MockOpenAI(Settings(batch_s=600, prices=[10.0, 10.0, 100.0])), 0

    def second() -> Response | None:
        nonlocal looks
        looks += 1
        return error(500, "try later") if looks == 2 else None

    teacher = serve_mock(mock)
    for number in range(2):
        async with opened(tmp_path, teacher) as client:
            asked = asyncio.ensure_future(client.answer(make_task(number)))
            await asyncio.to_thread(_wait_for_a_batch, mock, number)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
    mock.settings.batch_s = 0.5
    for submitted in mock.batches.values():
        submitted["ready"] = time.monotonic() + 0.5
    mock.show_batch = _answering(second, mock.show_batch)  # type: ignore[method-assign]
    moved = serve_mock(mock).endpoints[0].base_url
    async with opened(tmp_path, teacher, resolve={teacher.endpoints[0].base_url: moved}) as client:
        with pytest.raises(TeacherError, match="nothing is submitted"):
            await client.answer(make_task(0))
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(2)))
    assert all(a.ok for a in answers)
    ledger = Ledger(Store(str(tmp_path)))
    assert ledger.spent() == ledger.spent_at_most() == pytest.approx(mock.counts.charged_usd)


async def test_rows_that_were_written_before_a_kill_are_not_written_again(server, teacher, make_task, tmp_path) -> None:
    store = Store(str(tmp_path))
    async with opened(tmp_path, teacher) as client:
        await client.answer(make_task(1))
    (name,) = store.list("batches/reasoning")
    record = store.read_json(f"batches/reasoning/{name}")
    store.write_json(f"batches/reasoning/{name}", record | {"done": False})
    async with opened(tmp_path, teacher) as client:
        await client.answer(make_task(2))
    assert [store.read_json(f"batches/reasoning/{n}")["done"] for n in store.list("batches/reasoning")] == [True] * 2
    assert Ledger(store).spent() == pytest.approx(server.counts.charged_usd)


async def test_a_batch_that_comes_back_while_others_are_looked_for_is_not_submitted_again(
    server, teacher, make_task, tmp_path, monkeypatch
) -> None:
    store, keep = Store(str(tmp_path)), Records.keep
    async with opened(tmp_path, teacher) as client:
        first = asyncio.ensure_future(client.answer(make_task(1)))
        await asyncio.to_thread(_wait_for_a_batch, server)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    (name,) = store.list("batches/reasoning")
    Records(store, "reasoning").keep(Record("zz-never-created", 1, teacher.name, teacher.endpoints[0].base_url, {}))

    def slow(self: Records, record: Record) -> None:
        while record.id.startswith("zz") and not store.read_json(f"batches/reasoning/{name}")["done"]:
            time.sleep(0.01)
        keep(self, record)

    monkeypatch.setattr(Records, "keep", slow)
    async with opened(tmp_path, teacher) as client:
        assert (await asyncio.wait_for(client.answer(make_task(1)), 20)).ok
    assert server.counts.batches == 1
