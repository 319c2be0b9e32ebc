"""Where the time of a training step goes, by torch's profiler: what `perf/training.py --profile` prints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from training_plain import wait_for

KINDS = {
    "attention": ("flash", "attention", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "splitk", "mm", "mkldnn", "linear"),
    "copies": ("memcpy", "copy_"),
}
"""Of kernels (on a CPU: of operators), by parts of their names; the first that fits counts."""


def profile_steps(steps: Iterator[Any], device: str, count: int = 3) -> dict[str, float]:
    """Milliseconds of one step, the mean of `count`: in all, and computing, by kind.

    On a GPU `busy` is the time in which at least one kernel ran; what is left of `wall` waited for launches.
    """
    gpu = device == "cuda"
    next(steps)
    wait_for(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        for _ in range(count):
            next(steps)
        wait_for(device)
        wall = time.perf_counter() - began
    events: list[Any] = [e for e in found.events() or () if (e.device_type.name == "CUDA") == gpu]
    took: Counter[str] = Counter()
    for event in events:
        took[kind_of(event.name)] += event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    figures = {"wall": 1e6 * wall, "busy": covered(spans) if gpu else sum(took.values()), **took}
    return {name: us / 1000 / count for name, us in figures.items()} | {"kernels": len(events) / count}


def kind_of(name: str) -> str:
    """One of `KINDS`, or "other"."""
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "other")


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans that are sorted by their beginnings."""
    total = end = 0.0
    for start, stop in spans:
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total
