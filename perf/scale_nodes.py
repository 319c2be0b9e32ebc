"""Virtual nodes for `scale.py`, many in one process: teacher actors in all but the endpoint, which sleeps; and students
that sleep. Nothing here imports torch."""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import pyarrow as pa

from cascade import benchmarks
from cascade.config import Config, Teacher, check_config
from cascade.store import Store
from cascade.tasks import Message, Task, Verdict, from_table, to_table
from cascade.teachers import pool
from cascade.teachers.client import TeacherClient
from cascade.teachers.endpoint import EndpointClient, Response
from cascade.teachers.ledger import Ledger
from ray_jobs._desk import DeskClient, Done

PLACES = 32
"""Requests that a virtual node has in flight."""
WAITING = 8
"""Tasks of a node that wait for a place."""
LATENCY_S = 5.0
"""Mean time to a response of some 300 tokens; each takes half to one and a half of it."""
TOKENS = (150, 300)


def config_for(storage: str, nodes: int) -> Config:
    """One endpoint that allows exactly what so many nodes can have in flight; nothing else binds."""
    endpoint = {"base_url": "http://sleeping/v1", "requests_per_minute": 10**9, "tokens_per_minute": 10**12}
    prices = {"input_usd_per_million": 1.0, "output_usd_per_million": 4.0}
    tier = {"name": "sleeper", "endpoints": [endpoint | {"max_concurrency": PLACES * nodes}], **prices}
    sources = {"sources": [{"benchmark": "jsonl"}]}
    raw = {"domain": "scale", "storage": storage, "base": {"model": "none"}, "budget_usd": 1e6, "tiers": [tier] * 3}
    return check_config(raw | {"tasks": dict.fromkeys(("train", "validation", "test"), sources)})


def question(node: int, number: int) -> Task:
    """A task that the sleeping teacher solves, as long as a word problem."""
    prompt = f"Node {node}, question {number}: " + "what follows from this? " * 20
    reference = {"kind": "exact", "answers": [f"answer to {prompt}"]}
    return Task(f"jsonl/{node}-{number}", "jsonl", "scale", "train", (Message("user", prompt),), reference)


class SleepingEndpoint(EndpointClient):
    """Answers after a while; there is no network."""

    async def complete(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Response:
        seconds = LATENCY_S * random.uniform(0.5, 1.5)
        await asyncio.sleep(seconds)
        return Response(f"answer to {messages[-1].content}", "answered", "stop", TOKENS[0], 0, TOKENS[1], seconds)


class Crowd:
    """The teacher actors of some virtual nodes: each has its own client, way to the desk and journal."""

    def __init__(self, config: Config, desk: Any, nodes: range) -> None:
        pool.EndpointClient = SleepingEndpoint  # type: ignore[misc, attr-defined]
        self.config, self.desk, self.nodes = config, desk, nodes
        self.answered = 0
        self.seconds = 0.0

    async def run(self) -> None:
        """Ask without end."""
        await asyncio.gather(*(self._node(n) for n in self.nodes))

    async def so_far(self) -> tuple[int, float, int]:
        """Requests that were answered, CPU seconds of this process, and its peak memory in bytes."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return self.answered, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024

    async def _node(self, node: int) -> None:
        shared, teacher = DeskClient(self.desk), self.config.tier(1)
        client = self._client(teacher, shared)
        numbers = count()
        await asyncio.gather(*(self._ask(client, shared, node, numbers) for _ in range(PLACES + WAITING)))

    def _client(self, teacher: Teacher, shared: DeskClient) -> TeacherClient:
        ledger = Ledger(Store(self.config.storage), self.config.domain)
        return TeacherClient(teacher, 1, self.config.domain, ledger, shared, limiter=shared.limiter)

    async def _ask(self, client: TeacherClient, shared: DeskClient, node: int, numbers: count[int]) -> None:
        for number in numbers:
            task = question(node, number)
            answer = await client.answer(task)
            passed = benchmarks.score(task, answer.completion()).passed
            self.answered += 1
            shared.tell(Done(passed, answer.cost_usd, answer.cost_usd, 1))


class SleepingStudent:
    """What a student actor is to the driver: a block of tasks in, a block of verdicts out."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def __call__(self, block: pa.Table) -> Any:
        await asyncio.sleep(self.seconds)
        yield to_table(Verdict, [Verdict(t.id, "base", "", "fail") for t in from_table(Task, block)])
