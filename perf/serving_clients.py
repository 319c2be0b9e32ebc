"""Clients of perf/serving.py that are processes of their own, and what an engine does when one has gone."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import httpx
import psutil
from serving_setup import Answered, Ask, body_of

HERE = Path(__file__).parent


async def beside(script: str, url: str) -> asyncio.subprocess.Process:
    """A client in a process of its own, which is told things through a pipe and answers through one."""
    host, port = url.removeprefix("http://").split(":")
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, str(HERE / script), host, port, stdin=pipe, stdout=pipe)


async def at_once(url: str, asks: list[Ask]) -> list[Answered]:
    """What came of requests that perf/serving_burst.py sent together: statuses and seconds."""
    bodies = json.dumps([body_of(ask) for ask in asks]).encode()
    client = await beside("serving_burst.py", url)
    said, _ = await client.communicate(bodies)
    assert client.returncode == 0, "the burst was not sent"
    return [
        Answered(ask, status, seconds=seconds) for ask, (status, seconds) in zip(asks, json.loads(said), strict=True)
    ]


async def watched(url: str, work: Awaitable[list[Answered]]) -> tuple[list[Answered], list[float]]:
    """What came of the work, and how many seconds /health took while it was done, asked by a process of its own."""
    watchdog = await beside("serving_health.py", url)
    answers = await work
    said, _ = await watchdog.communicate(b"")  # which ends its input
    assert watchdog.returncode == 0, "/health failed"
    return answers, json.loads(said)


async def computed_on_ms(url: str, engine: int, ask: Ask) -> float:
    """For how long an engine computes after its only client has left a stream, seen by its processor time.

    Args:
        engine: its process.
    """
    process = psutil.Process(engine)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        async with http.stream("POST", "/v1/chat/completions", json=body_of(ask)) as response:
            await anext(response.aiter_lines())
            await asyncio.sleep(1)
        left = time.perf_counter()
        while time.perf_counter() - left < 10:
            start, used = time.perf_counter(), _cpu_seconds(process)
            await asyncio.sleep(0.05)
            if _cpu_seconds(process) - used < 0.4 * (time.perf_counter() - start):  # it has turned idle in here
                return (start - left) * 1e3 + 50
    return float("inf")


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
