"""Samples, repair rounds, and which verified answer is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cascade.config import check_config
from cascade.errors import BudgetExceeded, ConfigError, DataError
from cascade.tasks import Message, Task, Verdict
from cascade.teachers.client import Answer
from cascade.teachers.solve import Solved, solve


class Script:
    """A teacher whose answers are given by sample and round; "" is an answer that could not be had."""

    def __init__(self, answers: dict[tuple[int, int], str | Exception]) -> None:
        self.answers = answers
        self.asked: list[tuple[int, tuple[Message, ...]]] = []

    async def answer(self, task: Task, attempt: int = 0, follow_up: Sequence[Message] = ()) -> Answer:
        self.asked.append((attempt, tuple(follow_up)))
        text = self.answers[attempt, len(follow_up) // 2]
        if isinstance(text, Exception):
            raise text
        error = "" if text else "cut off"
        return Answer(task.id, attempt, "model-a", 1, text, 0.25, 1, 1, 0.1, "h", False, error, len(follow_up) // 2)


async def verify(task: Task, answer: Answer) -> Verdict:
    if not answer.ok:
        return Verdict(task.id, "model-a", "", "error", evidence=answer.error)
    right = str(task.reference) in answer.text.split()
    return Verdict(task.id, "model-a", "", "pass" if right else "fail", answer.text, f"expected {task.reference}")


@pytest.fixture
def settle(make_task, make_teacher) -> Callable[..., object]:
    async def run(script: Script, **settings: object) -> Solved:
        return await solve(make_task(21), make_teacher("http://x/v1", **settings), script, verify)

    return run


async def test_the_first_verified_sample_ends_it(settle) -> None:
    script = Script({(0, 0): "41", (1, 0): "42", (2, 0): "42"})
    solved = await settle(script, samples=3)
    assert [a for a, _ in script.asked] == [0, 1]
    assert solved.kept.answer.attempt == 1
    assert solved.verdict.passed
    assert solved.cost_usd == 0.5
    example = solved.example(1)
    assert (example.messages[-1].content, example.cost_usd, example.tier) == ("42", 0.5, 1)


async def test_of_several_verified_the_shortest_is_kept(settle) -> None:
    script = Script({(0, 0): "well, it is 42", (1, 0): "it is 42", (2, 0): "41"})
    solved = await settle(script, samples=3, choose="shortest")
    assert len(script.asked) == 3
    assert solved.kept.answer.text == "it is 42"
    assert solved.cost_usd == 0.75


async def test_a_failed_sample_goes_back_with_what_was_wrong_and_not_with_the_answer(settle) -> None:
    script = Script({(0, 0): "40", (0, 1): "41", (0, 2): "42"})
    solved = await settle(script, repair_rounds=2)
    assert solved.kept.answer.round == 2
    assert solved.example(1).messages[-1].content == "42"
    last = script.asked[-1][1]
    assert [m.role for m in last] == ["assistant", "user", "assistant", "user"]
    assert [m.content for m in last[::2]] == ["40", "41"]
    assert "41" in last[-1].content
    assert not any("42" in m.content for m in last), "the reference answer was given away"


async def test_every_sample_is_repaired_before_the_next_is_drawn(settle) -> None:
    script = Script({(0, 0): "40", (0, 1): "41", (1, 0): "43", (1, 1): "42"})
    solved = await settle(script, samples=2, repair_rounds=1)
    assert [(a, len(f) // 2) for a, f in script.asked] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert solved.verdict.passed


async def test_an_answer_that_could_not_be_had_is_not_sent_back(settle) -> None:
    script = Script({(0, 0): "", (1, 0): "42"})
    solved = await settle(script, samples=2, repair_rounds=3)
    assert [(a, len(f)) for a, f in script.asked] == [(0, 0), (1, 0)]
    assert solved.verdict.passed


async def test_nothing_verified_keeps_the_last_answer_and_makes_no_example(settle) -> None:
    solved = await settle(Script({(0, 0): "40", (1, 0): "41"}), samples=2)
    assert solved.kept.answer.text == "41"
    with pytest.raises(DataError, match="no passing verdict"):
        solved.example(1)


async def test_a_budget_reached_beside_a_verified_sample_loses_nothing(settle) -> None:
    over = BudgetExceeded("reached")
    solved = await settle(Script({(0, 0): over, (1, 0): "42"}), samples=2, choose="shortest")
    assert solved.verdict.passed
    with pytest.raises(BudgetExceeded):
        await settle(Script({(0, 0): over, (1, 0): "41"}), samples=2, choose="shortest")


def test_an_answer_key_cannot_be_asked_to_mend() -> None:
    tier = {
        "name": "answer-key-1",
        "endpoints": [{"base_url": "answer-key"}],
        "input_usd_per_million": 0,
        "output_usd_per_million": 0,
        "answer_key": {"max_difficulty": 1},
        "repair_rounds": 1,
    }
    source = {"sources": [{"benchmark": "jsonl"}]}
    raw = {"domain": "d", "base": {"model": "m"}, "tasks": dict.fromkeys(("train", "validation", "test"), source)}
    with pytest.raises(ConfigError, match="repair_rounds"):
        check_config(raw | {"budget_usd": 1, "tiers": [tier] * 3})


async def test_a_conversation_is_one_sample_and_trained_on_whole(make_task, make_teacher, monkeypatch) -> None:
    task = replace(make_task(21), max_turns=5)

    def reply(_: Task, said: Sequence[Message]) -> tuple[Message, ...]:
        return () if len(said) == 5 else (Message("user", f"and {len(said)}?"),)

    monkeypatch.setattr("cascade.benchmarks.reply", reply)
    heard = []

    async def judge(task: Task, answer: Answer, said: tuple[Message, ...] = ()) -> Verdict:
        heard.append(said)
        return Verdict(task.id, "model-a", "", "pass" if answer.ok and answer.text == "42" else "fail")

    broken = {(0, 0): "1", (0, 1): ""}
    script = Script({**broken, (1, 0): "40", (1, 1): "41", (1, 2): "42"})
    solved = await solve(task, make_teacher("http://x/v1", samples=2, repair_rounds=1), script, judge)
    assert [m.content for m in solved.kept.said] == ["40", "and 1?", "41", "and 3?", "42"]
    assert heard[-1] == solved.kept.said
    assert script.asked[-1] == (1, solved.kept.said[:-1])
    assert [a.text for a in solved.answers] == ["1", "", "40", "41", "42"]
    assert solved.cost_usd == 1.25
    assert solved.example(1).messages == (*task.messages, *solved.kept.said)
