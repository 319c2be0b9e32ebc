"""The `generate_*` jobs: a tier's teacher answers what is unsolved, and what passes the task's scorer is an example.

Teachers are asked by async actors over Ray Data. All actors share one limiter per endpoint and key and one budget,
which live in an actor of their own; every response is in the ledger before anything else happens to it.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from cascade.artifacts import Run
from cascade.benchmarks import needs_judge
from cascade.config import ANSWER_KEY, Config, Teacher
from cascade.errors import BudgetExceeded, TeacherError
from cascade.tasks import Completion, Example, Message, Task, Verdict, from_table, to_table
from cascade.teachers.budget import budget_state
from cascade.teachers.client import Answer, TeacherClient
from cascade.teachers.judge import Judgement, judge
from cascade.teachers.ledger import Ledger
from cascade.teachers.offline import answer_key_server
from cascade.teachers.predictor import first_wave
from cascade.teachers.solve import Solved, solve
from ray_jobs._context import Job, Metrics
from ray_jobs._desk import DeskClient, Done, open_desk, own_error
from ray_jobs._evaluate import score
from ray_jobs._meter import TierGauges, TierMeter
from ray_jobs._progress import polling
from ray_jobs._shortcut import ANSWERS, VERDICTS, without_sent_past
from ray_jobs._test import unsolved_before

EXAMPLES, JUDGEMENTS = "examples", "judgements"
_STOPPED = {"budget": BudgetExceeded, "teacher": TeacherError}


def generate_answers(job: Job, tier: int) -> Metrics:
    """Ask a tier's teacher all that is unsolved; verified answers become examples.

    Raises:
        BudgetExceeded: a budget is reached. What was bought is kept, and used when the job runs again.
        TeacherError: the teacher cannot be asked (key refused, model unknown, nobody answering).
    """
    teacher = job.config.tier(tier)
    tasks = unsolved_before(job.runs, tier)
    with ExitStack() as stack:
        resolve: dict[str, str] = {}
        if teacher.is_answer_key and _pending(job, tasks):
            server = answer_key_server(job.runs.train_tasks, job.config.tiers, job.config.seed)
            resolve[ANSWER_KEY] = stack.enter_context(server)
        if job.config.predictor.enabled and tier < len(job.config.tiers):
            _ask_all(job, tier, first_wave(tasks, job.config.predictor, job.config.seed), resolve, total=len(tasks))
            tasks = without_sent_past(job, tier, tasks)
        _ask_all(job, tier, tasks, resolve, total=len(tasks))
    verdicts = job.run.read(VERDICTS, Verdict)
    return _metrics(job.run, tier, teacher.name, verdicts)


def _pending(job: Job, tasks: list[Task]) -> list[Task]:
    """The tasks without a verdict."""
    decided = {v.task_id for v in job.run.read(VERDICTS, Verdict)}
    return [t for t in tasks if t.id not in decided]


def _ask_all(job: Job, tier: int, tasks: list[Task], resolve: dict[str, str], *, total: int) -> None:
    """Fan out the tasks that have no verdict; raises only after all that was in flight has come back."""
    if not (pending := _pending(job, tasks)):
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


class TeacherActor:
    """Asks one tier's teacher, many tasks at once, and verifies the answers.

    Attributes:
        base_answers: task id -> what the base said, of the tasks that a judge decides on.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        tier: int,
        resolve: dict[str, str],
        desk: Any,
        base_answers: dict[str, str],
    ) -> None:
        self.run, self.tier, self.judge = run, tier, config.judge
        self.base_answers = base_answers
        self.judgements: dict[str, list[Judgement]] = defaultdict(list)
        self.teacher = config.tier(tier)
        self.client: TeacherClient | None = None
        self.desk = shared = DeskClient(desk)

        def make_client(teacher: Teacher, judge: bool = False) -> TeacherClient:
            ledger = Ledger(run.store, config.domain)
            return TeacherClient(
                teacher, tier, config.domain, ledger, shared, limiter=shared.limiter, resolve=resolve, judge=judge
            )

        self.make_client = make_client
        self.judge_client: TeacherClient | None = None

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """One output row per task, when all of a block have their verdicts and the run's tables are written.

        What a kill in between loses is only verdicts: the answers are in the ledger and are verified again.
        """
        self.client = self.client or self.make_client(self.teacher)
        if self.judge is not None and self.judge_client is None:
            self.judge_client = self.make_client(self.judge.model, judge=True)
        await asyncio.to_thread(self.client.refresh)  # an actor that was killed may have bought some of this block
        solved: list[Solved] = []
        rows = await asyncio.gather(*(self._solve(task, solved) for task in from_table(Task, block)))
        await asyncio.to_thread(self._keep, solved)
        yield pa.Table.from_pylist(rows)

    async def _solve(self, task: Task, solved: list[Solved]) -> dict[str, str]:
        """What came of one task, also as a row for the driver."""
        try:
            outcome = await solve(task, self.teacher, self._client, self._verdict)
        except BudgetExceeded as error:
            return _row(stopped="budget", note=_message(error))
        except TeacherError as error:
            return _row(stopped="teacher", note=_message(error))
        solved.append(outcome)
        bought = [a.cost_usd for a in outcome.answers if not a.from_ledger]
        opinions = self.judgements[task.id]
        cost = outcome.cost_usd + sum(j.cost_usd for j in opinions)
        paid = sum(bought) + sum(j.paid_usd for j in opinions)
        self.desk.tell(
            Done(outcome.verdict.passed, cost, paid, len(bought) + 2 * sum(j.paid_usd > 0 for j in opinions))
        )
        return _row()

    @property
    def _client(self) -> TeacherClient:
        assert self.client is not None
        return self.client

    async def _verdict(self, task: Task, answer: Answer, said: tuple[Message, ...] = ()) -> Verdict:
        if not answer.ok:
            return Verdict(task.id, answer.teacher, "", "error", evidence=answer.error)
        if needs_judge(task):
            return await self._opinion(task, answer)
        return await asyncio.to_thread(score, task, replace(answer.completion(), turns=said))

    async def _opinion(self, task: Task, answer: Answer) -> Verdict:
        assert self.judge is not None
        assert self.judge_client is not None
        opinion = await judge(task, answer, self.base_answers.get(task.id, ""), self.judge_client, self.judge)
        self.judgements[task.id].append(opinion)
        return opinion.verdict(task, answer)

    def _example(self, solved: Solved) -> Example:
        opinions = self.judgements[solved.task.id]
        return solved.example(
            self.tier, opinions[0].judge if opinions else "", judging_usd=sum(j.cost_usd for j in opinions)
        )

    def _keep(self, solved: list[Solved]) -> None:
        """Write what came of a block; verdicts last, since they mark their tasks as decided."""
        self.run.write_part(EXAMPLES, [self._example(s) for s in solved if s.verdict.passed])
        self.run.write_part(JUDGEMENTS, [j for s in solved for j in self.judgements.pop(s.task.id, [])])
        self.run.write_part(ANSWERS, [a for s in solved for a in s.answers])
        self.run.write_part(VERDICTS, [s.verdict for s in solved])


def _row(*, stopped: str = "", note: str = "") -> dict[str, str]:
    """What the driver learns of one task in the end; `stopped` names why none more is asked."""
    return {"stopped": stopped, "note": note}


def _message(error: Exception) -> str:
    """What the error says, without the traceback that Ray adds to one from another actor."""
    return str(own_error(error))


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
