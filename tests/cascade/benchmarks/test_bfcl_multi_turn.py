"""Conversations with stateful tools: right ones pass however they get there, wrong ones and attacks do not."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from cascade import benchmarks
from cascade.benchmarks.bfcl_multi_turn import MAX_STEPS, calls_in
from cascade.errors import DataError
from cascade.scoring.sandbox import missing_walls
from cascade.tasks import Completion, Example, Message, Task, Verdict

pytestmark = pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    options = {"split_rule": "none", "categories": ["multi_turn_base"]}
    try:
        loaded = benchmarks.get("bfcl").load("test", domain="d", options=options, seed=1, count=None)
    except DataError as error:
        pytest.skip(str(error)[:100])
    return {t.id: t for t in loaded}


def said(answers: list[str]) -> tuple[Message, ...]:
    return tuple(Message("assistant", a) for a in answers)


def verdict(task: Task, answers: list[str]) -> Verdict:
    return benchmarks.get("bfcl").score(task, Completion(task.id, "m", "", answers[-1], turns=said(answers)))


def reference_conversation(task: Task) -> tuple[Message, ...]:
    *_, last = benchmarks.right_steps(task)
    answer = benchmarks.get("bfcl").reference_answer(last)
    return (*last.messages[len(task.messages) :], Message("assistant", answer))


def test_reference_answers_lead_through_every_kind_of_tool(tasks: dict[str, Task]) -> None:
    assert len(tasks) == 200
    chosen = [tasks[f"bfcl/multi_turn_base_{i}"] for i in (0, 55, 105, 160)]
    assert len({name for t in chosen for name in t.reference["classes"]}) >= 6
    for task in chosen:
        talk = reference_conversation(task)
        completion = Completion(task.id, "m", "", talk[-1].content, turns=talk)
        result = benchmarks.get("bfcl").score(task, completion)
        assert result.passed, (task.id, result.evidence)
        questions = [m.content for m in talk if m.role == "user" and not m.content.startswith("[{'role': 'tool'")]
        assert [[q] for q in questions] == task.reference["questions"][1:]
        example = Example.from_answer(
            replace(task, split="train"), talk, result, teacher="t", tier=1, cost_usd=0, prompt_hash=""
        )
        assert example.messages == (*task.messages, *talk)


def test_other_ways_to_the_same_end_pass_and_wrong_ones_do_not(tasks: dict[str, Task]) -> None:
    task = tasks["bfcl/multi_turn_base_1"]
    first, second, third = "[ls(a=True)]", "[cd(folder='workspace')]", "[mv(source='log.txt', destination='archive')]"
    fourth = ["[cd(folder='archive'), grep(file_name='log.txt', pattern='Error')]", "."]
    right = [first, "Done.", second, third, "ok", *fourth, "[tail(file_name='log.txt', lines=20)]", "end"]
    assert verdict(task, right).outcome == "pass"
    assert verdict(task, ["[pwd()]", *right]).outcome == "pass"
    wrong_state = verdict(task, [*right[:4], "[touch(file_name='new')]", *right[4:]])
    assert (wrong_state.outcome, "GorillaFileSystem.root" in wrong_state.evidence) == ("fail", True)
    missing = verdict(task, ["[pwd()]", *right[1:]])
    assert (missing.outcome, "turn 1: no call gave" in missing.evidence) == ("fail", True)
    assert "turn 2 of 4" in verdict(task, right[:3]).evidence
    assert verdict(task, ["I cannot do that.", "No.", "No.", "No."]).outcome == "unparsed"
    assert verdict(task, ["[ls(a=True)]", "Done.", "No.", "No.", "No."]).outcome == "fail"


def test_replies_are_results_then_questions_then_nothing(tasks: dict[str, Task]) -> None:
    task = tasks["bfcl/multi_turn_base_1"]
    (results,) = benchmarks.reply(task, said(["[ls(a=True), nothing(x=1)]"]))
    assert results.role == "user"
    assert "current_directory_content" in results.content
    assert "Error during execution: name 'nothing' is not defined" in results.content
    (question,) = benchmarks.reply(task, said(["[ls(a=True)]", "Done."]))
    assert [question.content] == task.reference["questions"][1]
    assert benchmarks.reply(task, said(["a", "b", "c", "d"])) == ()
    endless = ["[pwd()]"] * (MAX_STEPS + 1)
    assert benchmarks.reply(task, said(endless)) == ()
    assert "turn 1 of 4" in verdict(task, endless).evidence
    assert benchmarks.reply(replace(task, max_turns=1), said(["[pwd()]"])) == ()


ATTACKS = [
    "print(end='')",
    "__import__(name='os')",
    "open(file='/tmp/x', mode='w')",
    "open(file=5, mode='w')",
    "print(end='{}', file=open(file=1, mode='w'))",
    "exit()",
    "breakpoint()",
    "help()",
    "globals()",
    "GorillaFileSystem.__init__()",
    "pwd.__globals__()",
    "ls(a=print(end='x'))",
    "vars()",
    "exec(source='x')",
]


def test_only_the_tools_can_be_called(tasks: dict[str, Task]) -> None:
    task = tasks["bfcl/multi_turn_base_1"]
    answer = f"[{', '.join(ATTACKS)}]"
    assert len(calls_in(answer)) == len(ATTACKS)
    (reply,) = benchmarks.reply(task, said([answer]))
    results = [result["content"] for result in ast.literal_eval(reply.content)]
    assert [r for r in results if not r.startswith("Error during execution")] == []
    assert verdict(task, [answer, "a", "b", "c", "d"]).outcome == "fail"


def test_tools_that_are_used_up_are_a_timeout(tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade.scoring import stateful_tools
    from cascade.scoring.sandbox import Limits

    task = next(t for t in tasks.values() if "MathAPI" in t.reference["classes"])
    monkeypatch.setattr(stateful_tools, "LIMITS", Limits(cpu_seconds=2, wall_seconds=30))
    answers = ["[power(base=9.5, exponent=1e300), logarithm(value=2, base=10, precision=900000000)]"]
    turns = len(task.reference["questions"])
    assert verdict(task, [*answers, *["Done."] * turns]).outcome in {"fail", "timeout"}
