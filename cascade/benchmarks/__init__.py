"""Benchmarks: one module each, which loads tasks, prompts for them and scores the answers.

`get(name)` returns the benchmark that `Task.benchmark` and the config name. A new one is a module with a class
that follows `Benchmark`, added to `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from cascade.errors import ConfigError
from cascade.tasks import Completion, Split, Task, Verdict

_MODULES = (
    "arc",
    "bbh",
    "bfcl",
    "humaneval",
    "jsonl",
    "livecodebench",
    "mbpp",
    "mmlu",
    "reasoning_gym",
)


class Benchmark(Protocol):
    """What every benchmark module provides as `BENCHMARK`."""

    name: str

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """Tasks of one split, in an order that depends on the seed alone; all of them if `count` is None.

        Raises:
            ConfigError: an option is unknown or out of range, or the split does not exist for this benchmark.
            DataError: the data cannot be had (says which sources would do) or breaks its schema.
        """

    def score(self, task: Task, completion: Completion) -> Verdict:
        """Judge one completion. Never raises for bad text: that is a verdict."""

    def reference_answer(self, task: Task) -> str:
        """A correct answer in the form that the prompt asks for: worked examples and offline teachers use it."""


@cache
def get(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in _MODULES:
        raise ConfigError(f"unknown benchmark {name!r}; there are {', '.join(_MODULES)}")
    benchmark: Benchmark = importlib.import_module(f"cascade.benchmarks.{name}").BENCHMARK
    return benchmark
