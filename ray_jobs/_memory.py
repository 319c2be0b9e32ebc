"""The memory of a whole pipeline: this process, Ray's own and all workers of this machine, sampled as they run."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil


class PeakMemory:
    """`with PeakMemory() as memory:` … `memory.peak_bytes`: largest sum of resident memory seen, in bytes.

    Where the kernel says how many processes share a page (Linux), a page counts once however many map it; elsewhere
    once for each, so that the figure is never too low. Asking the kernel that is dear, so it is asked only when the
    plain sum of resident sizes is higher than ever before.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_bytes = 0
        self._highest_sum = 0
        self._interval, self._stop = interval_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._interval):
            self._sample([me, *me.children(recursive=True)])

    def _sample(self, processes: list[psutil.Process]) -> None:
        summed = sum(_resident(p) for p in processes)
        if summed > self._highest_sum:
            self.peak_bytes = max(self.peak_bytes, sum(_proportional(p) for p in processes))
            self._highest_sum = summed


def _resident(process: psutil.Process) -> int:
    """Resident bytes, those of shared pages included; 0 for a process that has ended."""
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _proportional(process: psutil.Process) -> int:
    """Resident bytes, each shared page divided among the processes that map it."""
    try:
        return int(process.memory_full_info().pss)
    except (AttributeError, psutil.Error):
        return _resident(process)
