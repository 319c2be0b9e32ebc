"""The test splits that nothing in training may overlap: the domain's own, and those of every published benchmark.

A modifier of one domain is also measured, sooner or later, on benchmarks of others, so all of them are protected. What
the config names (`tasks.protect`) must be there; without a list, what the caches hold is taken, nothing is
downloaded, and what is missing is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cascade import benchmarks
from cascade.benchmarks.mixture import load_tasks
from cascade.benchmarks.sources import cached_only
from cascade.config import Config, TaskSource
from cascade.errors import DataError
from cascade.tasks import Task

PUBLISHED = ("humaneval", "mbpp", "livecodebench", "mmlu", "arc", "bbh", "bfcl")
"""Benchmarks with a test split of their own. Procedural and users' tasks are protected as the domain's test tasks."""
_BARE: Mapping[str, Mapping[str, Any]] = {name: {"shots": 0} for name in ("mbpp", "mmlu", "bbh")}
"""Options that leave a prompt to the question itself: worked examples are shared by all, and prove nothing."""
_SETS: Mapping[str, tuple[Mapping[str, Any], ...]] = {"arc": ({"set": "ARC-Challenge"}, {"set": "ARC-Easy"})}
"""Options that choose one of several test sets of a benchmark; where nothing is named, all of them are protected."""
_WHERE = frozenset({"path", "set", "source", "release", "split_rule"})
"""Options that say where data is, or which set; those that choose among it (windows, subjects) limit nothing here."""


@dataclass(frozen=True)
class Protected:
    """Test tasks that training must not overlap.

    Attributes:
        tasks: each once.
        checked: what they are of -> number of tasks; "domain" for the domain's own test tasks.
        missing: benchmark -> why its test tasks could not be had.
    """

    tasks: tuple[Task, ...]
    checked: dict[str, int]
    missing: dict[str, str]


def protected_tasks(config: Config) -> Protected:
    """The domain's test and general tasks and those of all protected benchmarks.

    Raises:
        DataError: a benchmark that `tasks.protect` names cannot be loaded.
        ConfigError: it does not exist, or an option is wrong.
    """
    own = [*load_tasks(config, "test"), *load_tasks(config, "general")]
    by_id = {task.id: task for task in own}
    checked, missing = {"domain": len(own)}, {}
    for source in _sources(config):
        try:
            loaded = _load(source, config)
        except DataError as error:
            if config.tasks.protect is not None:
                raise
            missing[source.benchmark] = str(error).splitlines()[0]
            continue
        checked[source.benchmark] = checked.get(source.benchmark, 0) + len(loaded)
        by_id |= {task.id: task for task in loaded}
    return Protected(tuple(by_id.values()), checked, missing)


def _sources(config: Config) -> list[TaskSource]:
    if config.tasks.protect is not None:
        return config.tasks.protect
    named = {s.benchmark: s.options for part in (config.tasks.train, config.tasks.test) for s in part.sources}
    sets = [(name, chosen) for name in PUBLISHED for chosen in _SETS.get(name, ({},))]
    return [TaskSource(benchmark=name, options={**named.get(name, {}), **chosen}) for name, chosen in sets]


def _load(source: TaskSource, config: Config) -> list[Task]:
    where = {key: value for key, value in source.options.items() if key in _WHERE}
    options = {**where, **_BARE.get(source.benchmark, {})}
    benchmark = benchmarks.get(source.benchmark)
    if config.tasks.protect is not None:
        return benchmark.load("test", domain=config.domain, options=options, seed=config.seed, count=None)
    with cached_only():
        return benchmark.load("test", domain=config.domain, options=options, seed=config.seed, count=None)
