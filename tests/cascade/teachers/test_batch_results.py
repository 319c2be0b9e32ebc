"""What the rows of a batch say, and what of an earlier start's batches when the config has changed since."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_clients import opened
from mock_openai import MockOpenAI, Settings, error
from starlette.requests import Request
from starlette.responses import Response

from cascade.errors import BudgetExceeded, TeacherError
from cascade.store import Store
from cascade.teachers.batch_results import failure_of, read_rows
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.ledger import Ledger

pytestmark = pytest.mark.usefixtures("quick_batches")
Row = dict[str, Any]


def rewrite(mock: MockOpenAI, change: Callable[[Row], Row | str], times: int = 1000) -> None:
    """Have the server's first downloads of results say something else of each request."""
    download, left = mock.download, times

    async def changed(request: Request) -> Response:
        nonlocal left
        content, left = bytes((await download(request)).body), left - 1
        if left < 0:
            return Response(content)
        rows = [change(json.loads(line)) for line in content.splitlines()]
        return Response("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))

    mock.download = changed  # type: ignore[method-assign]


def answered_with(status: int) -> Callable[[Row], Row]:
    return lambda row: row | {"response": {"status_code": status, "body": {"error": {"message": "no temperature"}}}}


async def test_a_batch_of_which_every_request_is_refused_stops_the_run(serve_mock, make_task, tmp_path) -> None:
    mock = MockOpenAI(Settings(batch_s=0.1))
    rewrite(mock, answered_with(400))
    async with opened(tmp_path, serve_mock(mock)) as client:
        asked = (client.answer(make_task(n)) for n in range(30))
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
    assert all(isinstance(a, TeacherError) and "no temperature" in str(a) for a in answers)
    assert Ledger(Store(str(tmp_path))).spent_at_most() == 0


async def test_a_few_refused_requests_are_their_tasks_own_affair(serve_mock, make_task, tmp_path) -> None:
    mock = MockOpenAI(Settings(batch_s=0.1))
    rewrite(mock, answered_with(400))
    async with opened(tmp_path, serve_mock(mock)) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(3)))
    assert all("no temperature" in a.error for a in answers)


async def test_a_batch_of_which_every_request_breaks_stops_the_run(serve_mock, make_task, tmp_path) -> None:
    mock = MockOpenAI(Settings(batch_s=0.05))
    rewrite(mock, answered_with(500))
    async with opened(tmp_path, serve_mock(mock).model_copy(update={"retries": 1})) as client:
        asked = (client.answer(make_task(n)) for n in range(30))
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
    assert all(isinstance(a, TeacherError) for a in answers)


async def test_a_model_that_is_not_there_stops_the_run_whatever_the_number_of_requests(
    serve_mock, make_task, tmp_path
) -> None:
    mock = MockOpenAI(Settings(batch_s=0.1))
    rewrite(mock, answered_with(404))
    async with opened(tmp_path, serve_mock(mock)) as client:
        with pytest.raises(TeacherError, match="404"):
            await asyncio.wait_for(client.answer(make_task(1)), 20)


@pytest.mark.parametrize("spoiled", [1, 1000], ids=["once", "for good"])
async def test_a_line_that_cannot_be_read_holds_up_no_other(serve_mock, make_task, tmp_path, spoiled: int) -> None:
    mock, first = MockOpenAI(Settings(batch_s=0.1)), set()

    def spoil(row: Row) -> Row | str:
        first.add(row["custom_id"]) if not first else None
        return '{"custom_id": "' if row["custom_id"] in first else row

    rewrite(mock, spoil, spoiled)
    async with opened(tmp_path, serve_mock(mock)) as client:
        answers = await asyncio.wait_for(asyncio.gather(*(client.answer(make_task(n)) for n in range(5))), 20)
    assert sum(not a.ok for a in answers) == (spoiled > 1)


def test_rows_are_read_line_by_line() -> None:
    rows, unreadable = read_rows('{"custom_id": "a"}\n\n{"custom\n[1]\n{"custom_id": "b", "response": null}')
    assert (list(rows), unreadable) == (["a", "b"], 2)
    assert failure_of({"response": None, "error": {"code": "batch_expired"}}).kind == "broken"  # type: ignore[union-attr]


def _wait_for_a_batch(mock: MockOpenAI) -> None:
    while not mock.counts.batches:
        time.sleep(0.01)
    time.sleep(0.1)


async def _killed_while_waiting(mock: MockOpenAI, path: Path, teacher: Any, tasks: list[Any]) -> None:
    async with opened(path, teacher) as client:
        asked = [asyncio.ensure_future(client.answer(task)) for task in tasks]
        await asyncio.to_thread(_wait_for_a_batch, mock)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_what_is_in_a_batch_is_not_asked_live_as_well(serve_mock, make_task, tmp_path) -> None:
    mock = MockOpenAI(Settings(batch_s=0.5))
    teacher = serve_mock(mock)
    await _killed_while_waiting(mock, tmp_path, teacher, [make_task(1)])
    live = teacher.model_copy(update={"mode": "live"})
    with pytest.raises(TeacherError, match=r"a batch of 1 requests.*mode: batch.*delete .*batches/reasoning/"):
        async with opened(tmp_path, live):
            pass
    async with opened(tmp_path, teacher) as client:
        assert (await client.answer(make_task(1))).ok
    async with opened(tmp_path, live) as client:
        assert (await client.answer(make_task(1))).from_ledger
    assert mock.counts.arrived == 0


async def test_a_batch_is_found_again_when_its_teacher_has_become_another_tier(serve_mock, make_task, tmp_path) -> None:
    mock = MockOpenAI(Settings(batch_s=0.5))
    teacher = serve_mock(mock)
    await _killed_while_waiting(mock, tmp_path, teacher, [make_task(1)])
    ledger = Ledger(Store(str(tmp_path)))
    async with TeacherClient(teacher, 2, "reasoning", ledger, LocalBudget(BudgetState("reasoning", 100.0))) as client:
        assert (await client.answer(make_task(1))).ok
    assert mock.counts.batches == 1


async def test_a_batch_that_came_back_counts_with_what_it_cost(serve_mock, make_task, tmp_path) -> None:
    """Else the run would stop at a budget of which most is left."""
    mock = MockOpenAI(Settings(batch_s=0.5, completion_tokens=1, prices=[10.0, 10.0, 100.0]))
    teacher, tasks = serve_mock(mock), [make_task(n) for n in range(10)]
    await _killed_while_waiting(mock, tmp_path, teacher, tasks)
    ledger = Ledger(Store(str(tmp_path)))
    worst = ledger.spent_at_most()
    assert worst > 0
    budget = LocalBudget(BudgetState("reasoning", worst * 1.05, spent={1: worst}))
    async with TeacherClient(teacher, 1, "reasoning", ledger, budget) as client:
        with pytest.raises(BudgetExceeded):
            await budget.reserve(1, worst / 10)
        await asyncio.gather(*(client.answer(task) for task in tasks))
        assert budget.state.total_spent() == pytest.approx(mock.counts.charged_usd)
        assert (await client.answer(make_task(99))).ok


async def test_a_batch_of_which_nobody_knows_is_not_given_up_for_a_limit(serve_mock, make_task, tmp_path) -> None:
    """The first create goes through and its response is lost; then every look is refused for a while."""
    mock, lost = MockOpenAI(Settings(batch_s=0.1)), False
    create, listed = mock.create_batch, mock.list_batches

    async def lose(request: Request) -> Response:
        nonlocal lost
        await create(request)
        lost = True
        return error(500, "lost")

    async def refuse(request: Request) -> Response:
        return error(429, "slow down") if lost else await listed(request)

    mock.create_batch, mock.list_batches = lose, refuse  # type: ignore[method-assign]
    teacher = serve_mock(mock)
    async with opened(tmp_path, teacher) as client:
        with pytest.raises(TeacherError, match="could not be submitted"):
            await asyncio.wait_for(client.answer(make_task(1)), 20)
    lost = False
    async with opened(tmp_path, teacher) as client:
        assert (await asyncio.wait_for(client.answer(make_task(1)), 20)).ok
    assert mock.counts.batches == 1


async def test_a_row_that_was_written_before_a_kill_is_not_taken_off_the_budget_again(
    serve_mock, make_task, tmp_path, monkeypatch
) -> None:
    """It counts with its price already, though its batch is not noted as done."""
    mock = MockOpenAI(Settings(batch_s=0.1))
    rewrite(mock, answered_with(400), 1)
    teacher, store = serve_mock(mock), Store(str(tmp_path))
    async with opened(tmp_path, teacher) as client:
        assert "no temperature" in (await client.answer(make_task(1))).error
    (name,) = store.list("batches/reasoning")
    record = store.read_json(f"batches/reasoning/{name}")
    store.write_json(f"batches/reasoning/{name}", record | {"done": False})
    assert Ledger(store).spent_at_most() == 0
    async with opened(tmp_path, teacher) as client:
        assert (await client.answer(make_task(1))).ok
        assert client.seen.total_spent() == pytest.approx(0)


async def test_requests_that_are_all_refused_after_others_were_answered_are_their_tasks_own_affair(
    serve_mock, make_task, tmp_path
) -> None:
    mock = MockOpenAI(Settings(batch_s=0.05))
    flagged = {f"What is {n} + {n}?" for n in range(25)}

    def refuse(row: Row) -> Row:
        said = row["response"]["body"]["choices"][0]["message"]["content"]
        return answered_with(400)(row) if any(question in said for question in flagged) else row

    rewrite(mock, refuse)
    async with opened(tmp_path, serve_mock(mock)) as client:
        assert (await client.answer(make_task(99))).ok
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(25)))
        assert all("no temperature" in a.error for a in answers)
        assert (await client.answer(make_task(98))).ok
