"""The student at work over Ray Data: tasks fanned out to actors that hold the base, verdicts written as they come.

An `Assignment` is one way of being tested: a name, an adapter or none, a prompt style, and the tasks. All
assignments of a call share one pool of actors, which swap the adapter in place. Each finished batch is one atomic
part in the run, so that a killed job repeats at most the batches in flight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from cascade.config import Execution, PromptStyle
from cascade.models.worked_examples import WorkedExamples
from cascade.tasks import Task, Verdict, from_table, to_table
from ray_jobs._context import Job


@dataclass(frozen=True)
class Assignment:
    """One way in which the student is tested.

    Attributes:
        name: prefix of the tables `<name>_completions` and `<name>_verdicts`; no dots.
        adapter: path in the store of a PEFT folder or a compressed modifier file; None for the bare base.
        label: what completions and verdicts carry as `modifier`.
    """

    name: str
    tasks: Sequence[Task]
    style: PromptStyle
    adapter: str | None = None
    label: str = ""

    @property
    def verdicts(self) -> str:
        return f"{self.name}_verdicts"


def evaluate(job: Job, assignments: Sequence[Assignment], pool: Sequence[Task] = ()) -> dict[str, list[Verdict]]:
    """Test the student in several ways; what was done before is not done again.

    Args:
        pool: training tasks that worked examples may be taken from.

    Returns:
        Verdicts by assignment name, in the order of its tasks.
    """
    found = {a.name: {v.task_id: v for v in job.run.read(a.verdicts, Verdict)} for a in assignments}
    pending = [(a, [t for t in a.tasks if t.id not in found[a.name]]) for a in assignments]
    size = block_size(job.config.execution, sum(len(tasks) for _, tasks in pending))
    blocks = [block for a, tasks in pending for block in _blocks(a, tasks, size)]
    total = sum(len(a.tasks) for a in assignments)
    done = total - sum(block.num_rows for block in blocks)
    if blocks:
        job.progress.update(job.run.job, done, total, "tasks")
        for name, verdicts in _run_blocks(job, assignments, blocks, size, pool):
            found[name] |= {v.task_id: v for v in verdicts}
            done += len(verdicts)
            job.progress.update(job.run.job, done, total, "tasks")
    return {a.name: [found[a.name][t.id] for t in a.tasks] for a in assignments}


def _blocks(assignment: Assignment, tasks: Sequence[Task], size: int) -> list[pa.Table]:
    """Tables of at most `size` tasks; those of one category, which share worked examples, stay together."""
    ordered = sorted(tasks, key=lambda t: (t.benchmark, t.category, -sum(len(m.content) for m in t.messages), t.id))
    blocks = []
    for start in range(0, len(ordered), size):
        table = to_table(Task, ordered[start : start + size])
        blocks.append(table.append_column("assignment", pa.array([assignment.name] * len(table))))
    return blocks


def _run_blocks(
    job: Job, assignments: Sequence[Assignment], blocks: list[pa.Table], size: int, pool: Sequence[Task]
) -> Iterator[tuple[str, list[Verdict]]]:
    """Verdicts by assignment name, block by block, as they are done."""
    execution = job.config.execution
    actors = min(execution.student_actors, len(blocks))
    settings = {a.name: (a.style, a.adapter, a.label) for a in assignments}
    results = ray.data.from_arrow(blocks).map_batches(
        StudentActor,
        batch_size=size,  # Ray Data wants a number where there are GPUs
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        num_cpus=execution.cpus_per_actor,
        num_gpus=execution.gpus,
        fn_constructor_kwargs={
            "config": job.config,
            "run": job.run,
            "settings": settings,
            "examples": WorkedExamples.from_pool(pool),
        },
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        table = cast(pa.Table, batch)
        names = table.column("assignment").to_pylist()
        verdicts = from_table(Verdict, table)
        for name in dict.fromkeys(names):
            yield name, [v for n, v in zip(names, verdicts, strict=True) if n == name]


class StudentActor:
    """Holds a `LoadedStudent`, whose module, with torch and all, is imported here and not in the driver."""

    def __init__(self, **given: Any) -> None:
        from ray_jobs._loaded_student import LoadedStudent

        self.student = LoadedStudent(**given)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.student(batch)


def block_size(execution: Execution, tasks: int) -> int:
    """Tasks of a block: so few that every actor has some, since that they are not many leaves no actor idle."""
    return max(1, min(execution.task_block, math.ceil(tasks / execution.student_actors)))
