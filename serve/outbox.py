"""From the engine's thread to an event loop: what an answer says, text of a moment as one event."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from serve.events import Delta, Event

PACE_S = 0.025
"""Text that comes within so long of the last goes out together: every event costs several processes their time."""


class Outbox:
    """Events of one answer on their way to the loop in which this was made.

    The first text goes at once; what follows is held for `PACE_S` after the last at most, and not once the answer has
    ended.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._pacing = False  # read by the thread: text need not wake anybody
        self._next_text = 0.0

    def put(self, event: Event) -> None:
        """Add an event, from any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._events.append(event)
        if not (self._pacing and isinstance(event, Delta)):
            self._loop.call_soon_threadsafe(self._wake.set)

    async def get(self) -> Event:
        """The next event, or all text that is there as one."""
        await self._something()
        if isinstance(self._events[0], Delta) and (early := self._next_text - time.perf_counter()) > 0:
            await self._more(early)
        event = self._events.popleft()
        if not isinstance(event, Delta):
            return event
        parts = [event]
        while self._events and isinstance(self._events[0], Delta):
            parts.append(self._events.popleft())  # type: ignore[arg-type]
        self._next_text = time.perf_counter() + PACE_S
        return Delta("".join(p.text for p in parts), tuple(token for p in parts for token in p.tokens))

    async def _something(self) -> None:
        """Wait until there is an event."""
        while not self._events:
            self._wake.clear()
            if not self._events:  # the thread adds first, and wakes then
                await self._wake.wait()

    async def _more(self, seconds: float) -> None:
        """Wait for more text, until the answer ends."""
        self._pacing = True
        self._wake.clear()
        try:
            if isinstance(self._events[-1], Delta):
                await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            self._pacing = False
