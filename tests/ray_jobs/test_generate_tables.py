"""What a `generate_*` job reads of its own tables: which tasks have no verdict yet, and the figures of its manifest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cascade.artifacts import Run, Store, open_run
from cascade.tasks import Message, Task, Verdict, from_table, to_table
from cascade.teachers.client import Answer
from cascade.teachers.judge import Judgement
from ray_jobs._generate import _each, _metrics, _pending
from ray_jobs._teacher_actor import ANSWERS, JUDGEMENTS, VERDICTS

TASKS = [
    Task(f"t/{n}", "jsonl", "d", "train", (Message("user", f"What is {n}?"),), {"kind": "exact", "answers": [str(n)]})
    for n in range(2500)
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(Store(str(tmp_path)), "d", "generate_tier1", seed=1)


def test_tasks_without_a_verdict_are_pending(run: Run) -> None:
    job, table = SimpleNamespace(run=run), to_table(Task, TASKS)
    assert from_table(Task, _pending(job, table)) == TASKS
    run.write_part(VERDICTS, [Verdict(t.id, "m", "", "fail") for t in TASKS[::2]])
    assert from_table(Task, _pending(job, table)) == TASKS[1::2]
    assert list(_each(table)) == TASKS
    assert list(_each(table.slice(900, 1500))) == TASKS[900:2400]
    assert len(_pending(job, to_table(Task, []))) == 0


def test_the_figures_of_a_job_are_counted_in_its_tables(run: Run) -> None:
    empty = _metrics(run, 1, "m")
    assert (empty["asked"], empty["requests"], empty["cost_usd"]) == (0, 0, 0)
    outcomes = ("pass", "pass", "fail", "unparsed", "error")
    run.write_part(VERDICTS, [Verdict(f"t/{n}", "m", "", outcome) for n, outcome in enumerate(outcomes)])
    answers = [
        Answer(f"t/{n}", 0, "m", 1, "text", 0.25, 10, 5, 1.0, "hash", from_ledger=False, round=round_)
        for n, round_ in ((0, 0), (0, 1), (1, 0), (2, 0))
    ]
    run.write_part(ANSWERS, answers)
    run.write_part(JUDGEMENTS, [Judgement("t/1", 0, 0, "j", "teacher", "teacher", True, 0.5, 0.5)])
    assert _metrics(run, 1, "m") == {
        "tier": 1,
        "teacher": "m",
        "asked": 5,
        "verified": 2,
        "unparsed": 1,
        "errors": 1,
        "requests": 4,
        "repairs": 1,
        "judged": 1,
        "cost_usd": 1.5,
    }
