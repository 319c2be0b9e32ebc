"""How one tier settles one task: samples, repair rounds, and which of the verified answers is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cascade import benchmarks
from cascade.config import Teacher
from cascade.tasks import Example, Message, Task, Verdict
from cascade.teachers.client import Answer
from cascade.teachers.feedback import feedback


class Asks(Protocol):
    """What a task is put to: `cascade.teachers.client.TeacherClient`."""

    async def answer(self, task: Task, attempt: int = 0, follow_up: Sequence[Message] = ()) -> Answer:
        """See `TeacherClient.answer`."""


class Verify(Protocol):
    """Judges an answer to a task, or a whole conversation."""

    def __call__(self, task: Task, answer: Answer, said: tuple[Message, ...] = ()) -> Awaitable[Verdict]:
        """
        Args:
            answer: of a conversation, the last one.
            said: a conversation's answers and replies (`Completion.turns`).
        """


@dataclass(frozen=True, slots=True)
class Attempt:
    """One answer of the teacher, or one conversation with it, and the verdict.

    Attributes:
        answer: of a conversation, the last one.
        said: all that was said in a conversation after the task's messages; () for a single answer.
        before: a conversation's earlier answers.
    """

    answer: Answer
    verdict: Verdict
    said: tuple[Message, ...] = ()
    before: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Solved:
    """What came of one task: every attempt, and the one that counts.

    Attributes:
        kept: of the verified ones the one that is trained on; if none is verified, the last.
    """

    task: Task
    attempts: tuple[Attempt, ...]
    kept: Attempt

    @property
    def verdict(self) -> Verdict:
        return self.kept.verdict

    @property
    def answers(self) -> list[Answer]:
        """Every answer that was asked for, in order."""
        return [answer for a in self.attempts for answer in (*a.before, a.answer)]

    @property
    def cost_usd(self) -> float:
        """Of all answers."""
        return sum(answer.cost_usd for answer in self.answers)

    def example(self, tier: int, judge: str = "", judging_usd: float = 0.0) -> Example:
        """The kept answer as an example.

        Args:
            judge: the model that accepted it, if no exact scorer verified it.
            judging_usd: what its opinions of the answers to this task have cost.

        Raises:
            DataError: it has no passing verdict, or the task is not of the training split.
        """
        return Example.from_answer(
            self.task,
            self.kept.said or self.kept.answer.text,
            self.verdict,
            teacher=self.kept.answer.teacher,
            tier=tier,
            cost_usd=self.cost_usd + judging_usd,
            prompt_hash=self.kept.answer.prompt_hash,
            repairs=self.kept.answer.round,
            judge=judge,
        )


async def solve(task: Task, teacher: Teacher, ask: Asks, verify: Verify) -> Solved:
    """Put a task to a teacher, as often as its config says, until an answer is verified.

    Raises:
        TeacherError, BudgetExceeded: from asking, if no answer was verified before.
    """
    samples = _at_once if teacher.choose == "shortest" else _in_turn
    attempts = await samples(task, teacher, ask, verify)
    verified = [a for a in attempts if a.verdict.passed]
    kept = min(verified, key=lambda a: len(a.answer.text), default=attempts[-1])
    return Solved(task, tuple(attempts), kept)


async def _in_turn(task: Task, teacher: Teacher, ask: Asks, verify: Verify) -> list[Attempt]:
    """Samples one after another; the first verified answer ends it."""
    attempts: list[Attempt] = []
    for sample in range(teacher.samples):
        attempts += await _sample(task, sample, teacher.repair_rounds, ask, verify)
        if attempts[-1].verdict.passed:
            break
    return attempts


async def _at_once(task: Task, teacher: Teacher, ask: Asks, verify: Verify) -> list[Attempt]:
    """All samples side by side. One that cannot be had is passed over if another was verified."""
    asking = (_sample(task, sample, teacher.repair_rounds, ask, verify) for sample in range(teacher.samples))
    results = await asyncio.gather(*asking, return_exceptions=True)
    attempts = [a for result in results if not isinstance(result, BaseException) for a in result]
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed and not any(a.verdict.passed for a in attempts):
        raise failed[0]
    return attempts


async def _sample(task: Task, sample: int, repair_rounds: int, ask: Asks, verify: Verify) -> list[Attempt]:
    """One sample, sent back with what was found wrong until it is verified or nothing more may be said."""
    if task.max_turns > 1:
        return [await _talk(task, sample, ask, verify)]
    attempts: list[Attempt] = []
    follow_up: list[Message] = []
    for _ in range(1 + repair_rounds):
        answer = await ask.answer(task, sample, tuple(follow_up))
        verdict = await verify(task, answer)
        attempts.append(Attempt(answer, verdict))
        told = None if verdict.passed or not answer.ok else feedback(task, verdict)
        if told is None:
            break
        follow_up += [Message("assistant", answer.text), Message("user", told)]
    return attempts


async def _talk(task: Task, sample: int, ask: Asks, verify: Verify) -> Attempt:
    """One sample of a conversation: answer after answer, with what the task's benchmark says to each."""
    answers: list[Answer] = []
    said: tuple[Message, ...] = ()
    while True:
        answers.append(await ask.answer(task, sample, said))
        if not answers[-1].ok:
            break
        said += (Message("assistant", answers[-1].text),)
        reply = await asyncio.to_thread(benchmarks.reply, task, said)
        if not reply:
            break
        said += reply
    return Attempt(answers[-1], await verify(task, answers[-1], said), said, tuple(answers[:-1]))
