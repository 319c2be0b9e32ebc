"""The memory of a whole pipeline: this process, Ray's own and all workers of this machine, sampled as they run."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil


class PeakMemory:
    """`with PeakMemory() as memory:` … `memory.peak_bytes`: largest sum of resident memory seen, in bytes.

    Where the kernel says how many processes share a page (Linux), a page counts once however many map it; elsewhere
    once for each, so that the figure is never too low.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_bytes = 0
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
            self.peak_bytes = max(self.peak_bytes, resident_bytes(me))


def resident_bytes(root: psutil.Process) -> int:
    """Memory that a process and all its descendants hold together, in bytes."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += _resident(process)
    return total


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (AttributeError, psutil.AccessDenied):
        return int(process.memory_info().rss)
