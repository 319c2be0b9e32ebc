"""The memory of a process and its children."""

from __future__ import annotations

import subprocess
import sys

MEGABYTE = 2**20

UNTIL = """
import subprocess, sys, time
from ray_jobs._memory import PeakMemory

def until(reached):
    end = time.monotonic() + 120
    while not reached() and time.monotonic() < end:
        time.sleep(0.01)

def begun(memory):
    until(lambda: memory.peak_bytes)
    return memory.peak_bytes
"""

COUNTS_A_CHILD = f"""
{UNTIL}
with PeakMemory(interval_s=0.05) as memory:
    before = begun(memory)
    block = "block = bytearray(b'x' * {64 * MEGABYTE}); input()"
    child = subprocess.Popen([sys.executable, "-c", block], stdin=subprocess.PIPE)
    until(lambda: memory.peak_bytes - before > {60 * MEGABYTE})
    child.communicate(b"end")
print(before, memory.peak_bytes)
"""

SHARES_PAGES = f"""
{UNTIL}
import mmap, os
with PeakMemory(interval_s=0.05) as memory:
    before = begun(memory)
    shared = mmap.mmap(-1, {128 * MEGABYTE})
    shared[:] = b"x" * len(shared)
    (read, has_read), (end, ends) = os.pipe(), os.pipe()
    for _ in range(3):
        if os.fork() == 0:
            os.close(ends)
            sum(shared[i] for i in range(0, len(shared), 4096))
            os.write(has_read, b".")
            os.read(end, 1)
            os._exit(0)
    for _ in range(3):
        os.read(read, 1)
    until(lambda: memory._highest_sum > {4 * 120 * MEGABYTE})  # all four were looked at together
    os.close(ends)
    for _ in range(3):
        os.wait()
print(before, memory.peak_bytes)
"""


def test_the_peak_counts_children_and_outlives_them() -> None:
    before, peak = _watched(COUNTS_A_CHILD)
    assert before > 4 * MEGABYTE
    assert 60 * MEGABYTE < peak - before < 250 * MEGABYTE


def test_shared_pages_count_once() -> None:
    before, peak = _watched(SHARES_PAGES)
    assert 120 * MEGABYTE < peak - before < 300 * MEGABYTE


def _watched(code: str) -> tuple[int, int]:
    """Bytes before and at the peak, of a process of its own: memory that other tests left here may be given back."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, peak = map(int, done.stdout.split())
    return before, peak
