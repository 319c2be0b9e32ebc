"""Validation tasks without a reference answer are left out, not tripped over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cascade.tasks import Example, Message, Task
from ray_jobs import _search
from ray_jobs._held_out import held_out


def task(number: int, solution: str, form: str = "chat") -> Task:
    reference = {"kind": "unit_tests", "tests": ["assert f()"], "solution": solution, "setup": ""}
    messages = (Message("user", f"Write f number {number}."),)
    return Task(f"jsonl/code/{number}", "jsonl", "code", "validation", messages, reference, form=form)  # type: ignore


TASKS = [task(0, ""), task(1, "def f(): return 1"), task(2, "def f(): return 2", "completion"), task(3, "f = int")]


def test_tasks_without_a_solution_are_left_out() -> None:
    assert [name for name, _ in held_out(TASKS)] == ["jsonl/code/1", "jsonl/code/3"]
    messages = held_out(TASKS)[0][1]
    assert [m.role for m in messages] == ["user", "assistant"]
    assert "return 1" in messages[1].content


def test_as_many_are_taken_as_are_wanted() -> None:
    assert [name for name, _ in held_out(TASKS, 1)] == ["jsonl/code/1"]
    assert held_out(TASKS, 0) == []
    assert len(held_out(TASKS, 9)) == 2


def test_livecodebench_has_none() -> None:
    messages = (Message("user", "q"),)
    assert held_out([Task("livecodebench/1", "livecodebench", "code", "validation", messages, {})]) == []


def test_the_pruning_search_measures_on_training_examples_where_no_task_has_an_answer(monkeypatch) -> None:
    messages = (Message("user", "q"), Message("assistant", "a"))
    examples = [Example(f"e{i}", "quiz", "code", "", 1, messages, "t", 1) for i in range(10)]
    run = SimpleNamespace(read=lambda table, record: examples)
    job: Any = SimpleNamespace(runs=SimpleNamespace(validation_tasks=TASKS[:1], train_modifier=run))
    monkeypatch.setattr(_search, "IN_PLACE", 4)
    assert [name for name, _ in _search.held_out_answers(job)] == ["e0", "e2", "e4", "e6"]
    job.runs.validation_tasks = TASKS
    assert [name for name, _ in _search.held_out_answers(job)] == ["jsonl/code/1", "jsonl/code/3"]
