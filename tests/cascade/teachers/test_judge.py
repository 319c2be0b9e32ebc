"""A judge's opinion counts only if it is the same with the answers swapped, and is marked wherever it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade import benchmarks
from cascade.benchmarks import needs_judge, require_judge
from cascade.config import Judge, check_config
from cascade.errors import ConfigError, DataError
from cascade.store import Store
from cascade.tasks import Completion, Message, Task
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import Answer, TeacherClient
from cascade.teachers.feedback import feedback
from cascade.teachers.judge import Judgement, judge, judge_messages, read_preference
from cascade.teachers.ledger import Ledger


def open_task(**reference: object) -> Task:
    messages = (Message("user", "Write a short note of thanks."),)
    return Task("jsonl/x/1", "jsonl", "d", "train", messages, {"kind": "open", "rubric": "", "answer": "", **reference})


ANSWER = Answer("jsonl/x/1", 2, "model-a", 1, "Thank you!", 0.25, 1, 1, 0.1, "h", False)


@pytest.fixture
def ask(fake_server, make_teacher, choices, tmp_path):
    async def run(*said: str | int, **reference: object) -> tuple[Judgement, list[dict], list]:
        server = fake_server()
        server.script.extend(choices(s) if isinstance(s, str) else s for s in said)
        settings = Judge(model=make_teacher(server.url, name="judge-model", retries=0), rubric="Be brief.")
        ledger = Ledger(Store(str(tmp_path)))
        budget = LocalBudget(BudgetState("d", 10.0))
        async with TeacherClient(settings.model, 2, "d", ledger, budget, judge=True) as client:
            made = await judge(open_task(**reference), ANSWER, "thx", client, settings)
        return made, server.calls, [e for e in ledger.entries() if e.responded]

    return run


async def test_an_answer_that_wins_in_both_positions_is_accepted(ask) -> None:
    made, calls, rows = await ask("A is kinder. Verdict: A", "**Verdict: B**")
    assert (made.as_first, made.as_second, made.accepted) == ("teacher", "teacher", True)
    assert made.cost_usd == pytest.approx(sum(r.price_usd for r in rows))
    first, second = (c["messages"][-1]["content"] for c in calls)
    assert first.index("Thank you!") < first.index("thx")
    assert second.index("thx") < second.index("Thank you!")
    assert "Be brief." in first
    assert "model-a" not in first + second, "the judge must not know whose answer it reads"
    assert {(r.judge, r.tier, r.task_id, r.attempt) for r in rows} == {(True, 2, "jsonl/x/1", 2)}
    verdict = made.verdict(open_task(), ANSWER)
    assert verdict.passed
    assert "judged by judge-model" in verdict.evidence


@pytest.mark.parametrize(
    "said",
    [
        ("Verdict: A", "Verdict: A"),  # it prefers whatever stands first
        ("Verdict: B", "Verdict: B"),
        ("Verdict: B", "Verdict: A"),
        ("Verdict: tie", "Verdict: B"),
        ("I like both.", "Verdict: B"),
        ("Verdict: A", 400),
    ],
)
async def test_any_doubt_refuses_it(ask, said) -> None:
    made, _, _ = await ask(*said)
    assert not made.accepted
    assert made.verdict(open_task(), ANSWER).outcome == "fail"


async def test_a_tasks_own_rubric_comes_first(ask) -> None:
    _, calls, _ = await ask("Verdict: A", "Verdict: B", rubric="It must rhyme.")
    assert "It must rhyme." in calls[0]["messages"][-1]["content"]
    assert "Be brief." not in calls[0]["messages"][-1]["content"]


def test_the_last_verdict_of_a_text_counts() -> None:
    assert read_preference("Verdict: A? No. Verdict: B") == "B"
    assert read_preference("verdict - TIE") == "tie"
    assert read_preference("Verdict: a tie") == "tie"
    assert read_preference("Verdict: Answer A") == "A"
    assert read_preference("Answer A is better") == ""
    assert judge_messages(open_task(), "r", "", "b")[1].content.count("(empty)") == 1


def test_no_judge_is_asked_to_like_a_mended_answer() -> None:
    verdict = Judgement("jsonl/x/1", 0, 0, "j", "base", "base", False, 0, 0).verdict(open_task(), ANSWER)
    assert feedback(open_task(), verdict) is None


def test_open_tasks_are_for_training_alone_and_need_a_judge(tmp_path: Path, make_teacher) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"id": 1, "kind": "open", "prompt": "Thank them."}) + "\n")
    jsonl = benchmarks.get("jsonl")
    options = {"path": str(tmp_path / "tasks.jsonl")}
    tasks = jsonl.load("train", domain="d", options=options, seed=1, count=None)
    assert needs_judge(tasks[0])
    assert jsonl.score(tasks[0], Completion(tasks[0].id, "m", "", "Thanks")).outcome == "error"
    with pytest.raises(DataError, match="only be trained on"):
        jsonl.load("test", domain="d", options=options, seed=1, count=None)
    source = {"sources": [{"benchmark": "jsonl"}]}
    raw = {"domain": "d", "base": {"model": "m"}, "tasks": dict.fromkeys(("train", "validation", "test"), source)}
    raw |= {"budget_usd": 1, "tiers": [make_teacher("http://x/v1").model_dump()] * 3}
    with pytest.raises(ConfigError, match="no exact scorer"):
        require_judge(check_config(raw), tasks)
    require_judge(check_config(raw | {"judge": {"model": make_teacher("http://x/v1").model_dump()}}), tasks)
