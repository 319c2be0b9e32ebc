"""Benchmarks: one module each, which loads tasks, prompts for them and scores the answers.

`get(name)` returns the benchmark that `Task.benchmark` and the config name. A new one is a module with a class
that follows `Benchmark`, added to `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

from cascade.config import Config
from cascade.errors import ConfigError
from cascade.tasks import Completion, Message, Split, Task, Verdict

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

RUNS_CODE = frozenset({"bfcl", "humaneval", "jsonl", "livecodebench", "mbpp"})
"""Benchmarks that run what a model wrote, in the sandbox."""


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


class Conversational(Benchmark, Protocol):
    """A benchmark with tasks of several turns (`Task.max_turns` above 1)."""

    def reply(self, task: Task, said: Sequence[Message]) -> tuple[Message, ...]:
        """What follows the last answer; () if the conversation is over.

        A function of its arguments alone, so that a conversation can be stored, resumed and checked again: an
        environment with a state plays it again from the start.

        Args:
            task: as loaded.
            said: what followed the task's messages so far, an answer (role "assistant") last.
        """


def reply(task: Task, said: Sequence[Message]) -> tuple[Message, ...]:
    """What follows the last of a conversation's answers; () if it is over, as every other task is after one."""
    answers = sum(m.role == "assistant" for m in said)
    if answers >= task.max_turns:
        return ()
    benchmark: Conversational = get(task.benchmark)  # type: ignore[assignment]
    return benchmark.reply(task, said)


def right_steps(task: Task) -> Iterator[Task]:
    """The task as it stands before each right answer: itself, and a conversation after every reply.

    The right answer to each is its benchmark's `reference_answer`.
    """
    said: tuple[Message, ...] = ()
    while True:
        asked = replace(task, messages=(*task.messages, *said))
        yield asked
        said += (Message("assistant", get(task.benchmark).reference_answer(asked)),)
        replies = reply(task, said)
        if not replies:
            return
        said += replies


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


def score(task: Task, completion: Completion) -> Verdict:
    """The verdict of the task's own benchmark."""
    return get(task.benchmark).score(task, completion)


def needs_judge(task: Task) -> bool:
    """Whether a task has no exact scorer, so that only a judge model's opinion can be had of an answer."""
    return isinstance(task.reference, dict) and task.reference.get("kind") == "open"


def require_judge(config: Config, tasks: Sequence[Task]) -> None:
    """
    Raises:
        ConfigError: there are tasks without an exact scorer, and no judge to ask.
    """
    unjudged = [t.id for t in tasks if needs_judge(t)]
    if unjudged and config.judge is None:
        raise ConfigError(
            f"{len(unjudged)} training tasks have no exact scorer ({unjudged[0]}, …): name a model under judge: in the "
            "config, whose opinion then decides, or take them out of the task file"
        )
