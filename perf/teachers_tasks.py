"""Tasks and a config for `teachers.py`, for processes that have to start quickly: nothing here imports Ray."""

from __future__ import annotations

from typing import Any

from cascade.config import Config, check_config
from cascade.tasks import Message, Task

PRICES = (1.0, 0.5, 4.0)
"""US dollars per million prompt, cached and completion tokens, on both sides."""


def questions(count: int, name: str = "q") -> list[Task]:
    """Tasks that the server's standard answer solves. Their form has no scorer to wait for: exact text."""
    return [
        Task(
            id=f"jsonl/{name}-{i}",
            benchmark="jsonl",
            domain="perf",
            split="train",
            messages=(Message("user", prompt := f"Question {name} {i}: what is {i} + {i}?"),),
            reference={"kind": "exact", "answers": [f"answer to {prompt}"]},
        )
        for i in range(count)
    ]


def config_for(url: str, storage: str, *, actors: int = 1, budget_usd: float = 1000.0, **teacher: Any) -> Config:
    """A config whose tiers all ask the mock server; `teacher` changes tier 1 (limits included)."""
    limits = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "max_concurrency": 32}
    limits |= {name: teacher.pop(name) for name in limits if name in teacher}
    tier = {
        "name": "model-a",
        "endpoints": [{"base_url": url, **limits}],
        "input_usd_per_million": PRICES[0],
        "cached_input_usd_per_million": PRICES[1],
        "output_usd_per_million": PRICES[2],
        "max_tokens": 64,
        "timeout_s": 2.0,
        **teacher,
    }
    sources = [{"benchmark": "reasoning_gym"}]
    raw = {
        "domain": "perf",
        "storage": storage,
        "base": {"model": "none"},
        "tasks": {split: {"sources": sources} for split in ("train", "validation", "test")},
        "tiers": [tier] * 3,
        "budget_usd": budget_usd,
        "execution": {"teacher_actors": actors, "task_block": 64},
    }
    return check_config(raw)
