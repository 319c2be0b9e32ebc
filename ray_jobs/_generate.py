"""The `generate_*` jobs: a tier's teacher answers what is unsolved, and what passes the task's scorer is an example.

Teachers are asked by async actors over Ray Data. All actors share one limiter per endpoint and key and one budget,
which live in an actor of their own; every response is in the ledger before anything else happens to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from cascade.artifacts import Run
from cascade.benchmarks import needs_judge
from cascade.config import ANSWER_KEY, Config
from cascade.errors import BudgetExceeded, TeacherError
from cascade.tasks import Completion, Task, Verdict, to_table
from cascade.teachers.budget import budget_state
from cascade.teachers.client import Answer
from cascade.teachers.conversation import by_head
from cascade.teachers.judge import Judgement
from cascade.teachers.ledger import Ledger, compact
from cascade.teachers.offline import answer_key_server
from cascade.teachers.predictor import first_wave
from ray_jobs._context import Job, Metrics
from ray_jobs._desk import open_desk
from ray_jobs._meter import TierGauges, TierMeter
from ray_jobs._progress import polling
from ray_jobs._shortcut import without_sent_past
from ray_jobs._teacher_actor import ANSWERS, JUDGEMENTS, VERDICTS, TeacherActor
from ray_jobs._test import unsolved_before

_STOPPED = {"budget": BudgetExceeded, "teacher": TeacherError}


def generate_answers(job: Job, tier: int) -> Metrics:
    """Ask a tier's teacher all that is unsolved; verified answers become examples.

    Raises:
        BudgetExceeded: a budget is reached. What was bought is kept, and used when the job runs again.
        TeacherError: the teacher cannot be asked (key refused, model unknown, nobody answering).
    """
    teacher = job.config.tier(tier)
    tasks = unsolved_before(job.runs, tier)
    compact(job.runs.store, job.config.domain)  # what a killed job left; each actor is about to read it
    with ExitStack() as stack:
        resolve: dict[str, str] = {}
        if teacher.is_answer_key and _pending(job, tasks):
            server = answer_key_server(job.runs.train_tasks, job.config.tiers, job.config.seed)
            resolve[ANSWER_KEY] = stack.enter_context(server)
        if job.config.predictor.enabled and tier < len(job.config.tiers):
            _ask_all(job, tier, first_wave(tasks, job.config.predictor, job.config.seed), resolve, total=len(tasks))
            tasks = without_sent_past(job, tier, tasks)
        _ask_all(job, tier, tasks, resolve, total=len(tasks))
    compact(job.runs.store, job.config.domain)
    verdicts = job.run.read(VERDICTS, Verdict)
    return _metrics(job.run, tier, teacher.name, verdicts)


def _pending(job: Job, tasks: list[Task]) -> list[Task]:
    """The tasks without a verdict."""
    decided = {v.task_id for v in job.run.read(VERDICTS, Verdict)}
    return [t for t in tasks if t.id not in decided]


def _ask_all(job: Job, tier: int, tasks: list[Task], resolve: dict[str, str], *, total: int) -> None:
    """Fan out the tasks that have no verdict; raises only after all that was in flight has come back."""
    if not (pending := by_head(_pending(job, tasks), job.config.tier(tier))):
        return
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
            stopped = [row for row in _answers(job, tier, pending, resolve, desk) if row["stopped"]]
        look()
    finally:
        ray.kill(desk)
    if stopped:
        raise _STOPPED[stopped[0]["stopped"]](stopped[0]["note"])


def _meter(job: Job, tier: int, total: int) -> TierMeter:
    """A meter that goes on where an earlier start of the job stopped."""
    config, before = job.config, job.run.read(VERDICTS, Verdict)
    budget = budget_state(config, Ledger(job.runs.store, config.domain))
    left = [budget.domain_usd - budget.total_spent()]
    left += [budget.tier_usd[tier] - budget.total_spent(tier)] if tier in budget.tier_usd else []
    spent = sum(a.cost_usd for a in job.run.read(ANSWERS, Answer))
    spent += sum(j.cost_usd for j in job.run.read(JUDGEMENTS, Judgement))
    passed = sum(v.passed for v in before)
    return TierMeter(tier, config.tier(tier).name, total, len(before), passed, min(left), spent_usd=spent)


def _answers(job: Job, tier: int, tasks: list[Task], resolve: dict[str, str], desk: Any) -> Iterator[dict[str, str]]:
    """What `TeacherActor` says of each task, as it is known."""
    execution = job.config.execution
    block = execution.task_block
    if job.config.tier(tier).mode == "batch":  # all in as few batches as possible, and days without a result
        block = len(tasks)
        DataContext.get_current().execution_no_progress_timeout_s = -1
    blocks = [to_table(Task, tasks[i : i + block]) for i in range(0, len(tasks), block)]
    rows = ray.data.from_arrow(blocks).map_batches(
        TeacherActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=_actor_pool(job.config, tier, len(blocks)),
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


def _actor_pool(config: Config, tier: int, blocks: int) -> ActorPoolStrategy:
    """Teacher actors, each at work on so many blocks at once that the end of one never leaves the endpoint idle."""
    execution = config.execution
    actors = min(execution.teacher_actors, blocks)
    at_once = sum(e.max_concurrency for e in config.tier(tier).endpoints)
    calls = 1 + math.ceil(at_once / (actors * execution.task_block))
    return ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=calls + 1)


def _base_answers(job: Job, tasks: list[Task]) -> dict[str, str]:
    """What the base said to the tasks that need a judge: their answers are compared with it."""
    judged = {t.id for t in tasks if needs_judge(t)}
    said = job.runs.test_domain.read("base_completions", Completion) if judged else []
    return {c.task_id: c.text for c in said if c.task_id in judged}


def _metrics(run: Run, tier: int, teacher: str, verdicts: list[Verdict]) -> Metrics:
    answers, opinions = run.read(ANSWERS, Answer), run.read(JUDGEMENTS, Judgement)
    return {
        "tier": tier,
        "teacher": teacher,
        "asked": len(verdicts),
        "verified": sum(v.passed for v in verdicts),
        "unparsed": sum(v.outcome == "unparsed" for v in verdicts),
        "errors": sum(v.outcome == "error" for v in verdicts),
        "requests": len(answers),
        "repairs": sum(a.round > 0 for a in answers),
        "judged": len(opinions),
        "cost_usd": sum(a.cost_usd for a in answers) + sum(j.cost_usd for j in opinions),
    }
