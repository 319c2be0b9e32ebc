"""What an engine answers, for its tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from serve.engine import Engine
from serve.events import Delta, Event, Work

CHOICES = ("base", "letters", "sums")


async def collect(engine: Engine, piece: Work) -> list[Event]:
    """All events of a piece of work."""
    return [event async for event in engine.stream(piece)]


async def until(reached: Callable[[], bool]) -> None:
    """Wait, two minutes at most."""
    end = time.perf_counter() + 120
    while not reached():
        assert time.perf_counter() < end
        await asyncio.sleep(0.002)


async def until_load(engine: Engine, wanted: tuple[int, int]) -> None:
    """Wait until so many rows run and jobs wait."""
    await until(lambda: engine.load == wanted)


@asynccontextmanager
async def crowded(engine: Engine, piece: Work, clients: int) -> AsyncIterator[None]:
    """So many clients ask the same again and again, one at least has its answer; their last ones are waited for."""
    stop = asyncio.Event()

    answered = 0

    async def client() -> None:
        nonlocal answered
        while not stop.is_set():
            await collect(engine, piece)
            answered += 1

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await until(lambda: answered > 0)
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def text_of(events: Sequence[Event]) -> str:
    """The text of an answer."""
    return "".join(e.text for e in events if isinstance(e, Delta))
