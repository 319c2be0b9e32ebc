"""What every file-based benchmark does with its list of tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cascade.errors import ConfigError
from cascade.tasks import Split, Task


def shuffled(tasks: Sequence[Task], seed: int, count: int | None) -> list[Task]:
    """All tasks in their own order if `count` is None, else the first `count` of an order that the seed decides."""
    if count is None:
        return list(tasks)
    order = sorted(tasks, key=lambda task: task.id)
    random.Random(seed).shuffle(order)
    return order[:count]


def only_split(benchmark: str, split: Split, *allowed: Split) -> None:
    """
    Raises:
        ConfigError: the benchmark has no such split.
    """
    if split not in allowed:
        raise ConfigError(f"{benchmark} has no {split} tasks, only {' and '.join(allowed)}: use it under that split")
