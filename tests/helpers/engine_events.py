"""What an engine answers, for its tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from serve.engine import Engine
from serve.events import Delta, Event, Work

CHOICES = ("base", "letters", "sums")


async def collect(engine: Engine, piece: Work) -> list[Event]:
    """All events of a piece of work."""
    return [event async for event in engine.stream(piece)]


async def until_load(engine: Engine, wanted: tuple[int, int]) -> None:
    """Wait until so many rows run and jobs wait."""
    end = time.perf_counter() + 30
    while engine.load != wanted:
        assert time.perf_counter() < end
        await asyncio.sleep(0.005)


@asynccontextmanager
async def crowded(engine: Engine, piece: Work, clients: int) -> AsyncIterator[None]:
    """So many clients have begun to ask the same again and again; their last answers are waited for."""
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            await collect(engine, piece)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def text_of(events: Sequence[Event]) -> str:
    """The text of an answer."""
    return "".join(e.text for e in events if isinstance(e, Delta))
