"""Kinds of failed tasks: the clusters of the embeddings that `_embed` has made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascade.clusters import Kind, cluster, name_kinds
from cascade.tasks import Task
from ray_jobs._results import UNSOLVED
from ray_jobs._runs import Runs

EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Kinds:
    """The kinds of tasks that the base fails.

    Attributes:
        of: task id -> number of its kind, an index into `kinds`.
    """

    kinds: Sequence[Kind]
    of: Mapping[str, int]


def failure_vectors(runs: Runs) -> tuple[list[Task], NDArray[np.float32]] | None:
    """The tasks that the base failed, by id, and their embeddings row by row; None if there are none yet."""
    table = runs.embed_failures.read_arrow(EMBEDDINGS) if runs.embed_failures.done else None
    if table is None or not len(table):
        return None
    tasks = {t.id: t for t in runs.test_domain.read(UNSOLVED, Task)}
    ids = table.column("task_id").to_pylist()
    return [tasks[i] for i in ids], np.array(table.column("vector").to_pylist(), dtype=np.float32)


def failure_kinds(runs: Runs) -> Kinds:
    """The clusters of what the base failed; no kinds if they were switched off or nothing was failed."""
    found = failure_vectors(runs) if runs.config.clusters.enabled else None
    if found is None:
        return Kinds((), {})
    tasks, vectors = found
    numbers = cluster(vectors, runs.config.clusters, runs.config.seed)
    return Kinds(name_kinds(tasks, numbers), {t.id: n for t, n in zip(tasks, numbers, strict=True)})
