"""The `generate_*` jobs: a tier's teacher answers what is unsolved, and what passes the task's scorer is an example.

Teachers are asked by async actors over Ray Data. All actors share one limiter per endpoint and key and one budget,
which live in an actor of their own; every response is in the ledger before anything else happens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from cascade.artifacts import Run
from cascade.config import ANSWER_KEY, Config
from cascade.errors import BudgetExceeded, CascadeError, TeacherError
from cascade.tasks import Message, Task, Verdict, from_table, to_table
from cascade.teachers.budget import budget_state
from cascade.teachers.client import Answer, TeacherClient
from cascade.teachers.ledger import Ledger
from cascade.teachers.offline import answer_key_server
from cascade.teachers.solve import Solved, solve
from ray_jobs._context import Job, Metrics
from ray_jobs._desk import DeskClient, open_desk, own_error
from ray_jobs._evaluate import score
from ray_jobs._meter import TierGauges, TierMeter
from ray_jobs._test import unsolved_before

ANSWERS, VERDICTS, EXAMPLES = "answers", "verdicts", "examples"
_STOPPED = {"budget": BudgetExceeded, "teacher": TeacherError}


def generate_answers(job: Job, tier: int) -> Metrics:
    """Ask a tier's teacher all that is unsolved; verified answers become examples.

    Raises:
        BudgetExceeded: a budget is reached. What was bought is kept, and used when the job runs again.
        TeacherError: the teacher cannot be asked (key refused, model unknown, nobody answering).
    """
    teacher = job.config.tier(tier)
    tasks = unsolved_before(job.runs, tier)
    decided = {v.task_id for v in job.run.read(VERDICTS, Verdict)}
    pending = [t for t in tasks if t.id not in decided]
    with ExitStack() as stack:
        resolve: dict[str, str] = {}
        if teacher.is_answer_key and pending:
            server = answer_key_server(job.runs.train_tasks, job.config.tiers, job.config.seed)
            resolve[ANSWER_KEY] = stack.enter_context(server)
        _ask_all(job, tier, pending, resolve, total=len(tasks))
    verdicts = job.run.read(VERDICTS, Verdict)
    return _metrics(job.run, tier, teacher.name, verdicts)


def _ask_all(job: Job, tier: int, pending: list[Task], resolve: dict[str, str], *, total: int) -> None:
    """Fan the tasks out; raises only after all that was in flight has come back."""
    if not pending:
        return
    desk = open_desk(job.config, tier)
    try:
        meter, gauges = _meter(job, tier, total, total - len(pending)), TierGauges(job.config.domain)
        stopped: CascadeError | None = None
        for row in _answers(job, tier, pending, resolve, desk):
            if row["stopped"]:
                stopped = stopped or _STOPPED[row["stopped"]](row["note"])
                continue
            state = meter.add(**{name: row[name] for name in ("passed", "cost_usd", "paid_usd", "requests")})
            gauges.show(state)
            job.progress.tier(job.run.job, state)
    finally:
        ray.kill(desk)
    if stopped is not None:
        raise stopped


def _meter(job: Job, tier: int, total: int, done: int) -> TierMeter:
    """A meter that goes on where an earlier start of the job stopped."""
    config, before = job.config, job.run.read(VERDICTS, Verdict)
    budget = budget_state(config, Ledger(job.runs.store, config.domain))
    left = [budget.domain_usd - budget.total_spent()]
    left += [budget.tier_usd[tier] - budget.total_spent(tier)] if tier in budget.tier_usd else []
    spent = sum(a.cost_usd for a in job.run.read(ANSWERS, Answer))
    passed = sum(v.passed for v in before)
    return TierMeter(tier, config.tier(tier).name, total, done, passed, min(left), spent_usd=spent)


def _answers(job: Job, tier: int, tasks: list[Task], resolve: dict[str, str], desk: Any) -> Iterator[dict[str, Any]]:
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
        compute=ActorPoolStrategy(size=min(execution.teacher_actors, len(blocks))),
        num_cpus=0.25,
        fn_constructor_kwargs={
            "config": job.config,
            "run": job.run,
            "tier": tier,
            "resolve": resolve,
            "desk": desk,
        },
    )
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from cast(pa.Table, batch).to_pylist()


class TeacherActor:
    """Asks one tier's teacher, many tasks at once, and verifies the answers."""

    def __init__(self, config: Config, run: Run, tier: int, resolve: dict[str, str], desk: Any) -> None:
        self.run, self.tier = run, tier
        self.teacher = config.tier(tier)
        self.client: TeacherClient | None = None

        def make_client() -> TeacherClient:
            shared = DeskClient(desk)
            ledger = Ledger(run.store, config.domain)
            return TeacherClient(
                self.teacher, tier, config.domain, ledger, shared, limiter=shared.limiter, resolve=resolve
            )

        self.make_client = make_client

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """One output row per task, as its verdict is known; the run's tables are written when all are.

        What a kill in between loses is only verdicts: the answers are in the ledger and are verified again.
        """
        self.client = self.client or self.make_client()
        await asyncio.to_thread(self.client.refresh)  # an actor that was killed may have bought some of this block
        solved: list[Solved] = []
        asking = [asyncio.ensure_future(self._solve(task, solved)) for task in from_table(Task, block)]
        for next_done in asyncio.as_completed(asking):
            yield pa.Table.from_pylist([await next_done])
        await asyncio.to_thread(self._keep, solved)

    async def _solve(self, task: Task, solved: list[Solved]) -> dict[str, Any]:
        """What came of one task, also as a row for the driver."""
        try:
            outcome = await solve(task, self.teacher, self._client, self._verdict)
        except BudgetExceeded as error:
            return _row(stopped="budget", note=_message(error))
        except TeacherError as error:
            return _row(stopped="teacher", note=_message(error))
        solved.append(outcome)
        bought = [a.cost_usd for a in outcome.answers if not a.from_ledger]
        return _row(
            passed=outcome.verdict.passed, cost_usd=outcome.cost_usd, paid_usd=sum(bought), requests=len(bought)
        )

    @property
    def _client(self) -> TeacherClient:
        assert self.client is not None
        return self.client

    async def _verdict(self, task: Task, answer: Answer, said: tuple[Message, ...] = ()) -> Verdict:
        if not answer.ok:
            return Verdict(task.id, answer.teacher, "", "error", evidence=answer.error)
        return await asyncio.to_thread(score, task, replace(answer.completion(), turns=said))

    def _keep(self, solved: list[Solved]) -> None:
        """Write what came of a block; verdicts last, since they mark their tasks as decided."""
        self.run.write_part(EXAMPLES, [s.example(self.tier) for s in solved if s.verdict.passed])
        self.run.write_part(ANSWERS, [a for s in solved for a in s.answers])
        self.run.write_part(VERDICTS, [s.verdict for s in solved])


def _row(
    *,
    stopped: str = "",
    note: str = "",
    passed: bool = False,
    cost_usd: float = 0.0,
    paid_usd: float = 0.0,
    requests: int = 0,
) -> dict[str, Any]:
    """What the driver learns of one task; `stopped` names why none more is asked."""
    return {
        "stopped": stopped,
        "note": note,
        "passed": passed,
        "cost_usd": cost_usd,
        "paid_usd": paid_usd,
        "requests": requests,
    }


def _message(error: Exception) -> str:
    """What the error says, without the traceback that Ray adds to one from another actor."""
    return str(own_error(error))


def _metrics(run: Run, tier: int, teacher: str, verdicts: list[Verdict]) -> Metrics:
    answers = run.read(ANSWERS, Answer)
    return {
        "tier": tier,
        "teacher": teacher,
        "asked": len(verdicts),
        "verified": sum(v.passed for v in verdicts),
        "unparsed": sum(v.outcome == "unparsed" for v in verdicts),
        "errors": sum(v.outcome == "error" for v in verdicts),
        "requests": len(answers),
        "repairs": sum(a.round > 0 for a in answers),
        "cost_usd": sum(a.cost_usd for a in answers),
    }
