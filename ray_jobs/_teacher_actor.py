"""The actors that ask a teacher. They import neither torch nor transformers: waiting for an API takes little memory."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from cascade import benchmarks
from cascade.artifacts import Run
from cascade.benchmarks import needs_judge
from cascade.config import Config, Teacher
from cascade.errors import BudgetExceeded, TeacherError
from cascade.tasks import Example, Message, Task, Verdict, from_table
from cascade.teachers.client import Answer, TeacherClient
from cascade.teachers.judge import Judgement, judge
from cascade.teachers.ledger import Ledger
from cascade.teachers.solve import Solved, solve
from ray_jobs._desk import DeskClient, Done, own_error
from ray_jobs._generate_tables import ANSWERS, BASE_ANSWER, EXAMPLES, JUDGEMENTS, VERDICTS


class TeacherActor:
    """Asks one tier's teacher, many tasks at once, and verifies the answers.

    Attributes:
        base_answers: task id -> what the base said, of the tasks in work that a judge decides on.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        tier: int,
        resolve: dict[str, str],
        desk: Any,
    ) -> None:
        self.run, self.tier, self.judge = run, tier, config.judge
        self.base_answers: dict[str, str] = {}
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
        try:
            self.client = self.client or self.make_client(self.teacher)
            if self.judge is not None and self.judge_client is None:
                self.judge_client = self.make_client(self.judge.model, judge=True)
        except TeacherError as error:
            yield pa.Table.from_pylist([_row(stopped="teacher", note=str(error))])
            return
        for client in filter(None, (self.client, self.judge_client)):
            await asyncio.to_thread(client.refresh)  # an actor that was killed may have bought some of this block
        solved: list[Solved] = []
        tasks = from_table(Task, block)
        said = {t.id: text for t, text in zip(tasks, block.column(BASE_ANSWER).to_pylist(), strict=True) if text}
        self.base_answers |= said
        rows = await asyncio.gather(*(self._solve(task, solved) for task in tasks))
        for task_id in said:
            self.base_answers.pop(task_id, None)
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
        return await asyncio.to_thread(benchmarks.score, task, replace(answer.completion(), turns=said))

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
