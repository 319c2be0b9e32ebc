"""What a `generate_*` job does with its whole tables: which tasks are still to be asked, and what came of all.

Each function runs as a Ray task (`elsewhere`, `send_blocks`), so that the driver, which lives as long as the job, holds
sums and references, however many tasks there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayTaskError

from cascade.artifacts import Run
from cascade.benchmarks import needs_judge
from cascade.config import Config, Teacher
from cascade.tasks import Task, from_table
from cascade.teachers.conversation import order_by_head
from cascade.teachers.ledger import compact
from ray_jobs._desk import own_error
from ray_jobs._results import UNSOLVED

Result = TypeVar("Result")
ANSWERS, VERDICTS = "answers", "verdicts"
EXAMPLES, JUDGEMENTS = "examples", "judgements"
"""Tables of a `generate_*` run."""
BASE_ANSWER = "base_answer"
"""Column of a block beside those of a task: what the base said to it, if a judge decides on it."""
_MOST_BLOCKS = 400
"""Ray Data holds some 50 kB for each in the driver."""
_AHEAD = 4
"""Blocks that may wait to be fetched by the driver: small ones do so in its own memory."""
_CPUS = 0.25
"""As teacher actors: wherever one of them fits."""


@dataclass(frozen=True)
class Tables:
    """Where a `generate_*` job reads and writes.

    Attributes:
        failures: the test before it, whose unsolved tasks the tier is asked.
        base: `test_domain`, with what the base said to them.
        run: the job's own.
    """

    failures: Run
    base: Run
    run: Run
    config: Config
    tier: int

    @property
    def teacher(self) -> Teacher:
        return self.config.tier(self.tier)


class SoFar(NamedTuple):
    """How far the job is: of all `tasks` that the test left unsolved, those with a verdict, and what they have cost."""

    tasks: int
    done: int
    verified: int
    spent_usd: float


def elsewhere(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in another process; its errors are raised as they were there."""
    remote: Any = ray.remote(num_cpus=_CPUS)(function)
    try:
        result: Result = ray.get(remote.remote(*args))
    except RayTaskError as error:
        raise own_error(error) from error
    return result


def send_blocks(tables: Tables, leave_out: frozenset[str]) -> list[tuple[Any, int]]:
    """`pending_blocks`, made elsewhere, as objects of this process with their numbers of tasks.

    One block at a time passes through its memory, and the process that made them ends. Objects of that process would
    be gone with its node, and made anew they would be other blocks: by then some of the tasks have verdicts.
    """
    remote: Any = ray.remote(num_cpus=_CPUS, max_calls=1)(pending_blocks)
    remote = remote.options(num_returns="streaming", _generator_backpressure_num_objects=_AHEAD)
    return [_own(ref) for ref in remote.remote(tables, leave_out)]


def _own(ref: Any) -> tuple[Any, int]:
    block = ray.get(ref)
    return ray.put(block), len(block)


def so_far(tables: Tables) -> SoFar:
    """What an earlier start of the job has done. Puts the ledger's small objects together: each actor will read it."""
    compact(tables.run.store, tables.config.domain)
    outcomes, run = _column(tables.run, VERDICTS, "outcome"), tables.run
    spent = sum(_column(run, ANSWERS, "cost_usd")) + sum(_column(run, JUDGEMENTS, "cost_usd"))
    return SoFar(len(unsolved_ids(tables)), len(outcomes), outcomes.count("pass"), spent)


def unsolved_ids(tables: Tables) -> list[str]:
    """All that the tier is asked in the plain cascade."""
    return _column(tables.failures, UNSOLVED, "id")


def pending_blocks(tables: Tables, leave_out: frozenset[str]) -> Iterator[pa.Table]:
    """Tables of the tasks without a verdict, those whose conversations begin alike one after the other.

    Each task has what the base said to it in a column of its own, "" where no judge will compare it.
    """
    tasks = pending(tables, leave_out)
    if tasks is None or not len(tasks):
        return
    tasks = tasks.append_column(BASE_ANSWER, _base_answers(tables.base, tasks)).combine_chunks()
    order, size = order_by_head(each_task(tasks), tables.teacher), _block_size(tables, len(tasks))
    for start in range(0, len(order), size):
        yield tasks.take(order[start : start + size])


def pending(tables: Tables, leave_out: frozenset[str]) -> pa.Table | None:
    """The unsolved tasks without a verdict, in their order, less some."""
    tasks = tables.failures.read_arrow(UNSOLVED)
    if tasks is None:
        return None
    out = pa.array([*leave_out, *_column(tables.run, VERDICTS, "task_id")], pa.string())
    return tasks.filter(pc.invert(pc.is_in(tasks.column("id"), value_set=out)))


def each_task(tasks: pa.Table) -> Iterator[Task]:
    """The tasks of a table, a thousand of them in memory."""
    for batch in tasks.to_batches(max_chunksize=1000):
        yield from from_table(Task, pa.Table.from_batches([batch]))


def settle(tables: Tables) -> dict[str, Any]:
    """Put the parts of the job's tables together when all is asked; returns its figures."""
    run = tables.run
    compact(run.store, tables.config.domain)
    run.merge()
    outcomes = Counter(_column(run, VERDICTS, "outcome"))
    rounds, judging = _column(run, ANSWERS, "round"), _column(run, JUDGEMENTS, "cost_usd")
    return {
        "tier": tables.tier,
        "teacher": tables.teacher.name,
        "asked": outcomes.total(),
        "verified": outcomes["pass"],
        "unparsed": outcomes["unparsed"],
        "errors": outcomes["error"],
        "requests": len(rounds),
        "repairs": sum(n > 0 for n in rounds),
        "judged": len(judging),
        "cost_usd": sum(_column(run, ANSWERS, "cost_usd")) + sum(judging),
    }


def _block_size(tables: Tables, count: int) -> int:
    """Tasks in a block. In batches of the endpoint's all go at once, into as few as possible."""
    execution = tables.config.execution
    if tables.teacher.mode == "batch":
        return count
    return max(execution.task_block, math.ceil(count / max(_MOST_BLOCKS, 8 * execution.teacher_actors)))


def _base_answers(base: Run, tasks: pa.Table) -> pa.Array:
    """Of each task what the base said to it, if a judge is to compare answers with it; else ""."""
    judged = [t.id if needs_judge(t) else "" for t in each_task(tasks)]
    said = base.read_arrow("base_completions", ["task_id", "text"]) if any(judged) else None
    if said is None:
        return pa.array([""] * len(tasks), pa.string())
    texts = said.filter(pc.is_in(said.column("task_id"), value_set=pa.array(judged)))
    by_id = dict(zip(texts.column("task_id").to_pylist(), texts.column("text").to_pylist(), strict=True))
    return pa.array([by_id.get(i, "") for i in judged], pa.string())


def _column(run: Run, table: str, name: str) -> list[Any]:
    """One column of a run's table, [] if nothing was written."""
    found = run.read_arrow(table, [name])
    return [] if found is None else found.column(name).to_pylist()
