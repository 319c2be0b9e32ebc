"""Embedding what the base fails with the base itself, over Ray Data, in a run of its own."""

from __future__ import annotations

import functools
from typing import cast

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from cascade.config import Config
from cascade.tasks import Task, from_table, to_table
from ray_jobs._context import Job
from ray_jobs._evaluate import block_size
from ray_jobs._failures import EMBEDDINGS
from ray_jobs._results import UNSOLVED

_VECTOR = pa.list_(pa.float32())


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
        size = block_size(execution, len(tasks))
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


class EmbeddingActor:
    """Holds one base and embeds blocks of tasks."""

    def __init__(self, config: Config) -> None:
        # Torch and all, which the driver has no use for.
        from cascade.models.base import load_base
        from cascade.models.embedding import embed
        from ray_jobs._share import limit_process

        limit_process(config.execution, config.execution.cpus_per_actor)
        self.embed = functools.partial(embed, load_base(config.base))

    def __call__(self, block: pa.Table) -> pa.Table:
        tasks = from_table(Task, block)
        vectors = self.embed([t.prompt for t in tasks])
        return pa.table({"task_id": [t.id for t in tasks], "vector": pa.array(list(vectors), _VECTOR)})
