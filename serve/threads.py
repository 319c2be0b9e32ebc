"""How many threads compute a step: as many as help, found out while serving.

A step of a few rows is bound by memory, which one or two cores may fill; and with every operation waiting for its
slowest thread, a core that another process also wants makes two threads many times slower than one. Neither can be
known beforehand, so the engine goes by what its last steps took.

Only one thread of the process may compute with several: each that does has a team of its own, and with more threads in
teams than there are cores OpenMP lets them sleep, not wait, at every barrier, which makes steps 2.5 times slower.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

_NEWEST = 0.3
"""Weight of the newest measurement in the average."""
_FAR_OFF = 1.3
"""A count that is so many times slower than the best is tried half as often as before."""
_OFTEN, _SELDOM = 16, 512
"""Steps between two trials of a count that is not the best."""


_BEHIND = 5
"""By how much the thread that computes is nicer than those that answer."""


def give_way() -> None:
    """Let other threads go before the calling one, and those that it starts, where the machine allows it.

    Answering needs little time, but at once; computing takes all there is.
    """
    if sys.platform == "linux":  # elsewhere priorities are a process's, not a thread's
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _BEHIND)


@dataclass
class _Count:
    """What is known of one number of threads: seconds per token, and when to try it again."""

    threads: int
    seconds: float = 0.0  # not measured yet
    every: int = _OFTEN
    due: int = 0

    def wait(self, step: int, times: float) -> None:
        """Try it again after so many times the steps of before."""
        self.every = min(max(int(times * self.every), _OFTEN), _SELDOM)
        self.due = step + self.every


class Threads:
    """Sets the number of threads for one computing thread.

    Works of one kind and about one size share what is known. The counts tried are the powers of two and `most`.
    """

    def __init__(
        self,
        most: int,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._counts = sorted({most, *(2**i for i in range(most.bit_length()))}, reverse=True)
        self._set, self._clock = set_threads, clock
        self._known: dict[tuple[str, int], list[_Count]] = {}
        self._steps: dict[tuple[str, int], int] = {}

    @contextmanager
    def computing(self, kind: str, tokens: int) -> Iterator[None]:
        """Compute something of a kind with so many tokens, at least one, within."""
        if len(self._counts) == 1:
            yield
            return
        key = kind, tokens.bit_length()
        counts = self._known.setdefault(key, [_Count(n) for n in self._counts])
        step = self._steps[key] = self._steps.get(key, 0) + 1
        best = min(counts, key=lambda c: c.seconds)
        chosen = next((c for c in counts if c is not best and c.due <= step), best)
        self._set(chosen.threads)
        start = self._clock()
        yield
        seconds = (self._clock() - start) / tokens
        if chosen is not best:  # what was known is old
            chosen.seconds = seconds
            chosen.wait(step, 2 if seconds > _FAR_OFF * best.seconds > 0 else 0.5)
            return
        chosen.seconds += (_NEWEST if chosen.seconds else 1.0) * (seconds - chosen.seconds)
        if min(c.seconds for c in counts) < chosen.seconds:
            chosen.wait(step, 2)
