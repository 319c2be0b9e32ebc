"""The memory of a process and its children."""

from __future__ import annotations

import subprocess
import sys
import time

from ray_jobs._memory import PeakMemory

MEGABYTE = 2**20


def test_the_peak_counts_children_and_outlives_them() -> None:
    with PeakMemory(interval_s=0.05) as memory:
        time.sleep(0.3)
        before = memory.peak_bytes
        code = f"import time; block = bytearray(b'x' * {64 * MEGABYTE}); time.sleep(1)"
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.2)
    assert before > 10 * MEGABYTE
    assert 60 * MEGABYTE < memory.peak_bytes - before < 250 * MEGABYTE


def test_shared_pages_count_once() -> None:
    code = """
import mmap, os, time
shared = mmap.mmap(-1, 128 * 2**20)
shared[:] = b"x" * len(shared)
for _ in range(3):
    if os.fork() == 0:
        sum(shared[i] for i in range(0, len(shared), 4096))
        time.sleep(1.5)
        os._exit(0)
time.sleep(1.5)
"""
    with PeakMemory(interval_s=0.05) as memory:
        time.sleep(0.3)
        before = memory.peak_bytes
        subprocess.run([sys.executable, "-c", code], check=True)
    assert memory.peak_bytes - before < 300 * MEGABYTE
