"""Coroutines whose sleeps and deadlines take no time: a busy machine is never late, and nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while something can run, and jumps to the next timer when nothing can.

    For coroutines that wait for each other and for timers alone, not for threads, sockets or processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def jump(timeout: float | None) -> Any:
            self._now += timeout or 0.0
            return select(timeout and 0.0)

        selector.select = jump

    def time(self) -> float:
        """Seconds since the loop was made, by its own clock."""
        return self._now


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Decorates a test that is to run on a `VirtualLoop`."""

    @wraps(test)
    def run(*arguments: Any, **more: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*arguments, **more))

    return run
