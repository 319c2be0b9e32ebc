"""Batches and the limits of the API: requests and bytes of a file, and the tokens in the endpoint's queue."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_clients import opened
from mock_openai import MockOpenAI, Settings, error, queue_full
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from cascade.config import Teacher
from cascade.errors import TeacherError
from cascade.store import Store
from cascade.tasks import Message, Task
from cascade.teachers import batch, batch_limits
from cascade.teachers.batch_limits import stated_limit
from cascade.teachers.client import Answer
from cascade.teachers.conversation import estimate_prompt_tokens
from cascade.teachers.ledger import Ledger

pytestmark = pytest.mark.usefixtures("quick_batches")
TOKENS = 8
"""Of each question, as the mock counts them."""


def a_mock(**settings: Any) -> MockOpenAI:
    return MockOpenAI(Settings(**{"batch_s": 0.02, "prices": [10.0, 10.0, 100.0]} | settings))


@pytest.fixture
def ask(make_task: Callable[..., Task], tmp_path: Path) -> Callable[..., Any]:
    async def ask(teacher: Teacher, count: int = 30, *more: Task, path: Path = tmp_path) -> list[Answer]:
        """Answers to so many questions, and more. An error is raised when all have come to their end."""
        async with opened(path, teacher) as client:
            asked = (client.answer(task) for task in (*map(make_task, range(10, 10 + count)), *more))
            async with asyncio.timeout(60):
                answers = await asyncio.gather(*asked, return_exceptions=True)
            assert client.seen.total_reserved() == 0  # type: ignore[attr-defined]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]

    return ask


def check_the_bill(mock: MockOpenAI, path: Path) -> None:
    assert all(mock._look(b)["status"] in ("completed", "failed") for b in mock.batches.values()), "one is forgotten"
    assert max(mock.counts.answered.values()) == 1, "nothing is paid twice"
    ledger = Ledger(Store(str(path)))
    assert ledger.spent() == ledger.spent_at_most() == pytest.approx(mock.counts.charged_usd)
    assert ledger.unsettled == 0


def sizes(mock: MockOpenAI, status: str) -> list[int]:
    """Requests of the batches of a status, in the order of their creation."""
    return [len(mock.files[b["input_file_id"]].splitlines()) for b in mock.batches.values() if b["status"] == status]


def busy_until_refused(mock: MockOpenAI, more_s: float) -> MockOpenAI:
    """Let batches be in progress until another is refused for them, and some seconds more."""
    validate, mock.settings.batch_s = mock._validate, 1e9

    def look(batch: dict[str, Any]) -> None:
        validate(batch)
        others = [b for b in mock.batches.values() if b["status"] == "in_progress"]
        if batch["status"] == "failed" and others:
            mock.settings.batch_s = 0.02
            for other in others:
                other["ready"] = min(other["ready"], time.monotonic() + more_s)

    mock._validate = look  # type: ignore[method-assign]
    return mock


@pytest.mark.parametrize("limit", [12 * TOKENS, 29 * TOKENS, TOKENS], ids=["12 fit", "all but one fit", "one fits"])
async def test_more_than_the_queue_holds_goes_in_one_batch_after_another(serve_mock, ask, tmp_path, limit):
    mock = a_mock(enqueued_tokens=limit)
    count = 30 if limit > TOKENS else 5
    answers = await ask(serve_mock(mock), count)
    assert [a.text for a in answers] == [f"answer to What is {n} + {n}?" for n in range(10, 10 + count)]
    check_the_bill(mock, tmp_path)
    each = limit // TOKENS
    assert sizes(mock, "completed") == [min(each, count - n) for n in range(0, count, each)]
    assert sizes(mock, "failed")[0] == count, "what fits was not known before"
    assert all(size <= each for size in sizes(mock, "failed")[1:]), "once it is known nothing larger is submitted"


async def test_a_batch_waits_for_one_of_ours_and_nothing_is_cut_that_fits(serve_mock, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_limits, "MOST_REQUESTS", 10)
    mock = busy_until_refused(a_mock(enqueued_tokens=20 * TOKENS), 0.2)
    answers = await ask(serve_mock(mock))
    assert all(a.ok for a in answers)
    check_the_bill(mock, tmp_path)
    assert sizes(mock, "completed") == [10, 10, 10]
    assert sizes(mock, "failed") == [10], "it is not submitted again before another has ended"
    assert len(mock.files) == 3 + 3, "and not uploaded again"


def occupied(mock: MockOpenAI, looks: int, refuse: Callable[[], Response] | None = None) -> None:
    """Let batches of others fill the queue while the first so many of ours are submitted."""
    create, validate = mock.create_batch, mock._validate
    full = {"status": "failed", "errors": {"data": [{"code": "token_limit_exceeded", "message": queue_full(1e6)}]}}
    left = looks

    def taken() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    async def refusing(request: Request) -> Response:
        return refuse() if refuse and taken() else await create(request)

    mock.create_batch = refusing  # type: ignore[method-assign]
    if refuse is None:
        mock._validate = lambda b: b.update(full) if taken() else validate(b)  # type: ignore[method-assign]


def a_429() -> Response:
    problem = {"message": "surpassed the configured limit of 30K for it", "code": "token_limit_exceeded"}
    return JSONResponse({"error": problem}, 429)


@pytest.mark.parametrize("refuse", [None, a_429], ids=["failed when validated", "refused when created"])
async def test_when_others_fill_the_queue_the_same_batch_is_submitted_later(serve_mock, ask, tmp_path, refuse):
    mock = a_mock()
    occupied(mock, 5, refuse)
    assert all(a.ok for a in await ask(serve_mock(mock)))
    check_the_bill(mock, tmp_path)
    assert sizes(mock, "completed") == [30]
    assert sizes(mock, "failed") == ([] if refuse else [30] * 5)
    assert len(mock.files) == 2


async def test_a_queue_that_stays_full_stops_the_run_and_the_next_run_goes_on(serve_mock, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_TRIES_ALONE", 3)
    monkeypatch.setattr(batch_limits, "MOST_REQUESTS", 10)
    mock = a_mock()
    occupied(mock, 3)
    teacher = serve_mock(mock)
    with pytest.raises(TeacherError, match=r"no room for a batch.*Limit: 1,000,000.*are kept"):
        await ask(teacher)
    assert mock.counts.batches == 3, "the batches behind it are not submitted any more"
    assert Ledger(Store(str(tmp_path))).spent_at_most() == 0
    assert all(a.ok for a in await ask(teacher))


async def test_a_request_beyond_the_limit_fails_alone(serve_mock, ask, make_task, tmp_path):
    mock = a_mock(enqueued_tokens=200)
    long = replace(make_task(1), messages=(Message("user", "long " * 200),))
    *answers, failed = await ask(serve_mock(mock), 10, long)
    assert all(a.ok for a in answers)
    assert "254 tokens are too many for batches; set mode: live" in failed.error
    assert "Limit: 200 enqueued tokens" in failed.error
    assert sizes(mock, "failed")[-1] == 1
    check_the_bill(mock, tmp_path)


async def test_where_tokens_are_more_than_estimated_batches_are_cut_in_half(serve_mock, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_limits, "estimate_prompt_tokens", lambda messages: estimate_prompt_tokens(messages) // 3)
    mock = a_mock(enqueued_tokens=10 * TOKENS)
    assert all(a.ok for a in await ask(serve_mock(mock), 20))
    check_the_bill(mock, tmp_path)
    assert sizes(mock, "completed") == [10, 10]
    assert sizes(mock, "failed")[:3] == [20] * 3, "first it is seen whether it is others that fill the queue"


async def test_batches_are_cut_to_the_api_s_requests_and_bytes(serve_mock, ask, make_task, monkeypatch):
    monkeypatch.setattr(batch_limits, "MOST_REQUESTS", 8)
    monkeypatch.setattr(batch_limits, "MOST_BYTES", 2000)
    mock = a_mock()
    wide = [replace(make_task(n), messages=(Message("user", f"{n}" + "x" * 700),)) for n in range(3)]
    huge = replace(make_task(4), messages=(Message("user", "x" * 2000),))
    *answers, failed = await ask(serve_mock(mock), 20, *wide, huge)
    assert all(a.ok for a in answers)
    assert "no batch takes a request of 2," in failed.error
    assert sum(sizes(mock, "completed")) == 23
    assert all(len(mock.files[b["input_file_id"]]) <= 2000 for b in mock.batches.values())
    assert max(sizes(mock, "completed")) <= 8


class Cut:
    """Puts itself before an application: from its n-th request on nothing comes back."""

    def __init__(self, app: ASGIApp, at: int, after: bool) -> None:
        """
        Args:
            after: whether that request is still worked on.
        """
        self.app, self.at, self.after = app, at, after
        self.seen, self.is_cut = 0, False
        self.over, self.is_back = threading.Event(), threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen += scope["type"] == "http" and "/batches/" not in scope["path"]  # a look changes nothing
        if scope["type"] != "http" or self.seen < self.at or self.is_back.is_set():
            await self.app(scope, receive, send)
            return
        if self.seen == self.at and self.after:
            await self.app(scope, receive, self._lose)
        self.is_cut = True
        self.over.set()
        await asyncio.to_thread(self.is_back.wait, 30)
        await error(503, "the client is gone")(scope, receive, send)

    async def _lose(self, message: ASGIMessage) -> None:
        pass


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "response lost"])
async def test_killed_at_any_request_nothing_is_lost_or_paid_twice(serve_app, make_teacher, ask, tmp_path, after):
    for at in itertools.count(1):
        mock, path = busy_until_refused(a_mock(enqueued_tokens=2 * TOKENS), 0.02), tmp_path / str(at)
        cut = Cut(mock.app(), at, after)
        teacher = make_teacher(serve_app(cut), mode="batch", batch_price_share=0.5)
        first = asyncio.ensure_future(ask(teacher, 4, path=path))
        first.add_done_callback(lambda _, over=cut.over: over.set())
        await asyncio.to_thread(cut.over.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        cut.is_back.set()
        assert all(a.ok for a in await ask(teacher, 4, path=path))
        check_the_bill(mock, path)
        assert sizes(mock, "completed") == [2, 2] or cut.is_cut
        if not cut.is_cut:
            break
    assert sizes(mock, "failed") == [4, 2], "one was submitted again"


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        (queue_full(90_000), 90_000),
        ("The number of enqueued tokens has surpassed the configured limit of 30K for the deployment", 30_000),
        ("limit of 1.5M tokens", 1_500_000),
        ("Enqueued token limit reached. Try again", float("inf")),
    ],
)
def test_the_limit_is_read_from_what_the_endpoint_says(said: str, limit: float) -> None:
    assert stated_limit(said) == limit
