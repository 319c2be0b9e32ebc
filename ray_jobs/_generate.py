"""The `generate_*` jobs: a tier's teacher answers what is unsolved, and what passes the task's scorer is an example.

Teachers are asked by async actors over Ray Data. All actors share one limiter per endpoint and key and one budget,
which live in an actor of their own; every response is in the ledger before anything else happens to it. The driver
holds the tasks as an Arrow table alone, a few hundred bytes each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from cascade.artifacts import Run
from cascade.benchmarks import needs_judge
from cascade.config import ANSWER_KEY, Config
from cascade.errors import BudgetExceeded, TeacherError
from cascade.tasks import Completion, Task, from_table, to_table
from cascade.teachers.budget import budget_state
from cascade.teachers.conversation import order_by_head
from cascade.teachers.ledger import Ledger, compact
from cascade.teachers.offline import answer_key_server
from cascade.teachers.predictor import first_wave
from ray_jobs._context import Job, Metrics
from ray_jobs._desk import open_desk
from ray_jobs._meter import TierGauges, TierMeter
from ray_jobs._progress import polling
from ray_jobs._shortcut import without_sent_past
from ray_jobs._teacher_actor import ANSWERS, JUDGEMENTS, VERDICTS, TeacherActor
from ray_jobs._test import UNSOLVED

_MOST_BLOCKS = 400
"""Ray Data holds some 50 kB for each in the driver."""
_STOPPED = {"budget": BudgetExceeded, "teacher": TeacherError}


def generate_answers(job: Job, tier: int) -> Metrics:
    """Ask a tier's teacher all that is unsolved; verified answers become examples.

    Raises:
        BudgetExceeded: a budget is reached. What was bought is kept, and used when the job runs again.
        TeacherError: the teacher cannot be asked (key refused, model unknown, nobody answering).
    """
    teacher, last = job.config.tier(tier), len(job.config.tiers)
    tasks = job.runs.test(tier - 1).require().read_arrow(UNSOLVED) or to_table(Task, [])
    compact(job.runs.store, job.config.domain)  # what a killed job left; each actor is about to read it
    with ExitStack() as stack:
        resolve: dict[str, str] = {}
        if teacher.is_answer_key and len(_pending(job, tasks)):
            server = answer_key_server(job.runs.train_tasks, job.config.tiers, job.config.seed)
            resolve[ANSWER_KEY] = stack.enter_context(server)
        if job.config.predictor.enabled and tier < last:
            wave = first_wave(from_table(Task, tasks), job.config.predictor, job.config.seed)
            _ask_all(job, tier, to_table(Task, wave), resolve, total=len(tasks))
            tasks = to_table(Task, without_sent_past(job, tier, from_table(Task, tasks)))
        _ask_all(job, tier, tasks, resolve, total=len(tasks))
    compact(job.runs.store, job.config.domain)
    return _metrics(job.run, tier, teacher.name)


def _pending(job: Job, tasks: pa.Table) -> pa.Table:
    """The tasks without a verdict."""
    decided = pa.array(_column(job.run, VERDICTS, "task_id"), pa.string())
    return tasks.filter(pc.invert(pc.is_in(tasks.column("id"), value_set=decided)))


def _column(run: Run, table: str, name: str) -> list[Any]:
    """One column of a run's table, [] if nothing was written."""
    found = run.read_arrow(table, [name])
    return [] if found is None else found.column(name).to_pylist()


def _each(tasks: pa.Table) -> Iterator[Task]:
    """The tasks of a table, a thousand of them in memory."""
    for batch in tasks.to_batches(max_chunksize=1000):
        yield from from_table(Task, pa.Table.from_batches([batch]))


def _ask_all(job: Job, tier: int, tasks: pa.Table, resolve: dict[str, str], *, total: int) -> None:
    """Fan out the tasks that have no verdict; raises only after all that was in flight has come back."""
    pending = _pending(job, tasks)
    if not len(pending):
        return
    pending = pending.take(order_by_head(_each(pending), job.config.tier(tier)))
    desk = open_desk(job.config, tier)
    meter, gauges = _meter(job, tier, total), TierGauges(job.config.domain)

    def look() -> None:
        with suppress(RayError):  # the desk is gone: the job is over
            for news in ray.get(desk.take_done.remote()):
                meter.add(news.passed, news.cost_usd, news.paid_usd, news.requests)
            gauges.show(meter.state())
            job.progress.tier(job.run.job, meter.state())

    try:
        with polling(look):
            stopped: dict[str, str] | None = None
            for row in _answers(job, tier, pending, resolve, desk):
                stopped = stopped or (row if row["stopped"] else None)
        look()
    finally:
        ray.kill(desk)
    if stopped:
        raise _STOPPED[stopped["stopped"]](stopped["note"])


def _meter(job: Job, tier: int, total: int) -> TierMeter:
    """A meter that goes on where an earlier start of the job stopped."""
    config, before = job.config, _column(job.run, VERDICTS, "outcome")
    budget = budget_state(config, Ledger(job.runs.store, config.domain))
    left = [budget.domain_usd - budget.total_spent()]
    left += [budget.tier_usd[tier] - budget.total_spent(tier)] if tier in budget.tier_usd else []
    spent = sum(_column(job.run, ANSWERS, "cost_usd")) + sum(_column(job.run, JUDGEMENTS, "cost_usd"))
    return TierMeter(tier, config.tier(tier).name, total, len(before), before.count("pass"), min(left), spent_usd=spent)


def _answers(job: Job, tier: int, tasks: pa.Table, resolve: dict[str, str], desk: Any) -> Iterator[dict[str, str]]:
    """What `TeacherActor` says of each task, as it is known."""
    execution = job.config.execution
    block = max(execution.task_block, math.ceil(len(tasks) / max(_MOST_BLOCKS, 8 * execution.teacher_actors)))
    if job.config.tier(tier).mode == "batch":  # all in as few batches as possible, and days without a result
        block = len(tasks)
        DataContext.get_current().execution_no_progress_timeout_s = -1
    blocks = [tasks.slice(i, block) for i in range(0, len(tasks), block)]
    rows = ray.data.from_arrow(blocks).map_batches(
        TeacherActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=_actor_pool(job.config, tier, len(blocks), block),
        num_cpus=0.25,
        fn_constructor_kwargs={
            "config": job.config,
            "run": job.run,
            "tier": tier,
            "resolve": resolve,
            "desk": desk,
            "base_answers": _base_answers(job, tasks),
        },
    )
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from cast(pa.Table, batch).to_pylist()


def _actor_pool(config: Config, tier: int, blocks: int, block: int) -> ActorPoolStrategy:
    """Teacher actors, each at work on so many blocks at once that the end of one never leaves the endpoint idle."""
    actors = min(config.execution.teacher_actors, blocks)
    at_once = sum(e.max_concurrency for e in config.tier(tier).endpoints)
    calls = 1 + math.ceil(at_once / (actors * block))
    return ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=calls + 1)


def _base_answers(job: Job, tasks: pa.Table) -> dict[str, str]:
    """What the base said to the tasks that need a judge: their answers are compared with it."""
    judged = {t.id for t in _each(tasks) if needs_judge(t)}
    said = job.runs.test_domain.read("base_completions", Completion) if judged else []
    return {c.task_id: c.text for c in said if c.task_id in judged}


def _metrics(run: Run, tier: int, teacher: str) -> Metrics:
    outcomes = Counter(_column(run, VERDICTS, "outcome"))
    rounds, judging = _column(run, ANSWERS, "round"), _column(run, JUDGEMENTS, "cost_usd")
    return {
        "tier": tier,
        "teacher": teacher,
        "asked": outcomes.total(),
        "verified": outcomes["pass"],
        "unparsed": outcomes["unparsed"],
        "errors": outcomes["error"],
        "requests": len(rounds),
        "repairs": sum(n > 0 for n in rounds),
        "judged": len(judging),
        "cost_usd": sum(_column(run, ANSWERS, "cost_usd")) + sum(judging),
    }
