"""A scripted OpenAI-compatible server, tasks with a known answer, and teachers to ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from mock_openai import MockOpenAI
from served import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from three_tiers import PRICES

from cascade import benchmarks
from cascade.config import Teacher
from cascade.tasks import Completion, Message, Task, Verdict
from cascade.teachers import batch
from cascade.teachers.endpoint import EndpointClient


class SumBenchmark:
    """Sums, whose reference is the number."""

    name = "sums"

    def score(self, task: Task, completion: Completion) -> Verdict:
        outcome = "pass" if completion.text == str(task.reference) else "fail"
        return Verdict(task.id, completion.model, completion.modifier, outcome)

    def reference_answer(self, task: Task) -> str:
        return str(task.reference)


@pytest.fixture(autouse=True)
def _sums(monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmarks.get
    monkeypatch.setattr(benchmarks, "get", lambda name: SumBenchmark() if name == "sums" else real(name))


def _task(number: int, difficulty: int = 1) -> Task:
    return Task(
        id=f"sums/{number}",
        benchmark="sums",
        domain="reasoning",
        split="train",
        messages=(Message("user", f"What is {number} + {number}?"),),
        reference=2 * number,
        difficulty=difficulty,
    )


@pytest.fixture
def make_task() -> Callable[..., Task]:
    return _task


@pytest.fixture
def make_teacher() -> Callable[..., Teacher]:
    def make(*urls: str, **changes: Any) -> Teacher:
        limits = {k: changes.pop(k) for k in list(changes) if k.endswith("_per_minute") or k == "max_concurrency"}
        limits = {"requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000} | limits
        key = changes.pop("api_key_env", None)
        settings: dict[str, Any] = {
            "name": "model-a",
            "endpoints": [{"base_url": u, "api_key_env": key, **limits} for u in urls],
            "input_usd_per_million": 10.0,
            "output_usd_per_million": 100.0,
            "max_tokens": 50,
            "timeout_s": 5.0,
            "retries": 3,
        }
        return Teacher.model_validate(settings | changes)

    return make


@pytest.fixture
def tiers(make_teacher: Callable[..., Teacher]) -> list[Teacher]:
    """t1, t2 and t3, at `three_tiers.PRICES`."""
    return [
        make_teacher(f"http://t{n}/v1", name=f"t{n}", input_usd_per_million=i, output_usd_per_million=o)
        for n, (i, o) in enumerate(PRICES, 1)
    ]


@dataclass
class FakeServer:
    """Answers every prompt with "answer to <prompt>"; faults from `script` come first.

    A fault is a status, a dict merged over the completion, a raw body, a number of seconds as ("sleep", s), or a
    Response.
    """

    url: str = ""
    script: deque[Any] = field(default_factory=deque)
    delay: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.calls.append(body)
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            fault = self.script.popleft() if self.script else None
            await asyncio.sleep(self.delay)
            return await self._respond(body, fault)
        finally:
            self.in_flight -= 1

    async def _respond(self, body: dict[str, Any], fault: Any) -> Response:
        if isinstance(fault, int):
            return JSONResponse({"error": {"message": f"fault {fault}", "code": None}}, fault)
        if isinstance(fault, str):
            return Response(fault, media_type="application/json")
        if isinstance(fault, Response):
            return fault
        if isinstance(fault, tuple):
            await asyncio.sleep(fault[1])
        completion = {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": f"answer to {body['messages'][-1]['content']}"},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        return JSONResponse(completion | (fault if isinstance(fault, dict) else {}))


@pytest.fixture
def serve_app() -> Iterator[Callable[[Starlette], str]]:
    """Serves an application until the test ends; returns its URL."""
    with contextlib.ExitStack() as stack:

        def start(app: Starlette) -> str:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
            return f"{stack.enter_context(served(server))}/v1"

        yield start


@pytest.fixture
def quick_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are put together and looked at without long waits."""
    monkeypatch.setattr(batch, "GATHER_S", 0.05)
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    monkeypatch.setattr(EndpointClient, "backoff", lambda self, failures: 0.01)


@pytest.fixture
def serve_mock(serve_app, make_teacher: Callable[..., Teacher]) -> Callable[[MockOpenAI], Teacher]:
    """Serves a mock; returns a teacher that asks it in batches."""
    return lambda mock: make_teacher(serve_app(mock.app()), mode="batch", batch_price_share=0.5)


@pytest.fixture
def fake_server(serve_app) -> Callable[[], FakeServer]:
    def start() -> FakeServer:
        fake = FakeServer()
        fake.url = serve_app(Starlette(routes=[Route("/v1/chat/completions", fake.chat, methods=["POST"])]))
        return fake

    return start


def choice(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A completion's choices, to be merged over the server's own."""
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


@pytest.fixture
def choices() -> Callable[..., dict[str, Any]]:
    return choice


@pytest.fixture
def get_json() -> Callable[[str], Any]:
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(url: str) -> Any:
        with opener.open(url, timeout=5) as response:
            return json.load(response)

    return get
