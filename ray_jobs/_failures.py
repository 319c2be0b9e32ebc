"""Kinds of failed tasks: embeddings from the base over Ray Data, kept in a run of their own, and their clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from cascade.clusters import Kind, cluster, name_kinds
from cascade.config import Config
from cascade.models.base import load_base
from cascade.models.embedding import embed
from cascade.tasks import Task, from_table, to_table
from ray_jobs._context import Job
from ray_jobs._evaluate import limit_process
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


def embed_failures(job: Job) -> None:
    """Embed what the bare base left unsolved, unless that was done; needs Ray."""
    runs = job.runs
    run, tasks = runs.embed_failures, runs.test_domain.read(UNSOLVED, Task)
    if run.done:
        return
    run.start(job.config)
    vectors: dict[str, list[float]] = {}
    if tasks:
        execution = job.config.execution
        size = execution.task_block
        blocks = [to_table(Task, tasks[i : i + size]) for i in range(0, len(tasks), size)]
        results = ray.data.from_arrow(blocks).map_batches(
            EmbeddingActor,
            batch_size=size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(execution.student_actors, len(blocks))),
            num_cpus=execution.cpus_per_actor,
            num_gpus=execution.gpus,
            fn_constructor_kwargs={"config": job.config},
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            table = cast(pa.Table, batch)
            vectors |= zip(table.column("task_id").to_pylist(), table.column("vector").to_pylist(), strict=True)
            job.progress.update(job.run.job, len(vectors), len(tasks), "failures embedded")
    ids = sorted(vectors)
    columns = {"task_id": pa.array(ids, pa.string()), "vector": pa.array([vectors[i] for i in ids], _VECTOR)}
    run.write_arrow(EMBEDDINGS, pa.table(columns))
    run.finish({"embedded": len(ids)})


_VECTOR = pa.list_(pa.float32())


class EmbeddingActor:
    """Holds one base and embeds blocks of tasks."""

    def __init__(self, config: Config) -> None:
        limit_process(config.execution, config.execution.cpus_per_actor)
        self.loaded = load_base(config.base)

    def __call__(self, block: pa.Table) -> pa.Table:
        tasks = from_table(Task, block)
        vectors = embed(self.loaded, [t.prompt for t in tasks])
        return pa.table({"task_id": [t.id for t in tasks], "vector": pa.array(list(vectors), _VECTOR)})


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
