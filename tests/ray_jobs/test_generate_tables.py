"""What a `generate_*` job reads of its own tables: which tasks have no verdict yet, and the figures of its manifest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cascade.artifacts import Run, open_run
from cascade.config import Config, check_config
from cascade.store import Store
from cascade.tasks import Completion, Message, Task, Verdict, from_table, to_table
from cascade.teachers.client import Answer
from cascade.teachers.judge import Judgement
from ray_jobs._generate_tables import (
    ANSWERS,
    BASE_ANSWER,
    JUDGEMENTS,
    VERDICTS,
    SoFar,
    Tables,
    each_task,
    pending,
    pending_blocks,
    settle,
    so_far,
    unsolved_ids,
)
from ray_jobs._results import UNSOLVED

NOTHING: frozenset[str] = frozenset()


def question(number: int, kind: str = "exact", head: str = "") -> Task:
    messages = (*([Message("system", head)] if head else []), Message("user", f"What is {number}?"))
    reference = {"kind": kind, "answers": [str(number)], "rubric": "It is right."}
    return Task(f"t/{number}", "jsonl", "d", "train", messages, reference)


TASKS = [question(n) for n in range(2500)]


def config_for(folder: Path, **execution: Any) -> Config:
    sources = {"sources": [{"benchmark": "jsonl"}]}
    prices = {"input_usd_per_million": 1.0, "output_usd_per_million": 1.0}
    tier = {"name": "m", "endpoints": [{"base_url": "http://x/v1"}], **prices}
    raw = {"domain": "d", "storage": str(folder), "base": {"model": "none"}, "budget_usd": 5.0, "tiers": [tier] * 3}
    return check_config(raw | {"tasks": dict.fromkeys(("train", "validation", "test"), sources)} | execution)


@pytest.fixture
def make_tables(tmp_path: Path) -> Callable[..., Tables]:
    def make(tasks: list[Task] | None = None, **config: Any) -> Tables:
        store = Store(str(tmp_path))
        base = open_run(store, "d", "test_domain", seed=1)
        if tasks is not None:
            base.write_table(UNSOLVED, Task, tasks)
        run = open_run(store, "d", "generate_tier1", seed=1)
        return Tables(base, base, run, config_for(tmp_path, **config), 1)

    return make


def decide(run: Run, tasks: list[Task], outcome: Any = "fail") -> None:
    run.write_part(VERDICTS, [Verdict(t.id, "m", "", outcome) for t in tasks])


def in_blocks(tables: Tables, leave_out: frozenset[str] = NOTHING) -> list[list[Task]]:
    return [from_table(Task, block) for block in pending_blocks(tables, leave_out)]


def test_tasks_without_a_verdict_are_pending(make_tables: Callable[..., Tables]) -> None:
    tables = make_tables(TASKS)
    found = pending(tables, NOTHING)
    assert found is not None
    assert from_table(Task, found) == TASKS
    assert list(each_task(found)) == TASKS
    assert list(each_task(found.slice(900, 1500))) == TASKS[900:2400]
    decide(tables.run, TASKS[::2])
    assert from_table(Task, pending(tables, NOTHING) or pa.table({})) == TASKS[1::2]
    left_out = frozenset(t.id for t in TASKS[1:100])
    assert from_table(Task, pending(tables, left_out) or pa.table({})) == TASKS[101::2]
    assert unsolved_ids(tables) == [t.id for t in TASKS]


def test_blocks_hold_every_pending_task_once_in_order(make_tables: Callable[..., Tables]) -> None:
    tables = make_tables(TASKS, execution={"task_block": 64})
    blocks = in_blocks(tables)
    assert list(chain(*blocks)) == TASKS
    assert {len(b) for b in blocks[:-1]} == {64}
    decide(tables.run, TASKS[::2])
    assert list(chain(*in_blocks(tables, frozenset({TASKS[1].id})))) == TASKS[3::2]
    decide(tables.run, TASKS[1::2])
    assert in_blocks(tables) == []


def test_there_are_never_more_than_400_blocks(make_tables: Callable[..., Tables]) -> None:
    tables = make_tables(TASKS, execution={"task_block": 1})
    assert [len(b) for b in in_blocks(tables)] == [7] * 357 + [1]
    assert len(in_blocks(make_tables(TASKS, execution={"task_block": 1, "teacher_actors": 200}))) == 1250
    batch = make_tables(TASKS, execution={"task_block": 1})
    teacher = batch.config.tiers[0].model_copy(update={"mode": "batch"})
    batch.config.tiers[0] = teacher
    assert [len(b) for b in in_blocks(batch)] == [2500], "as few batches as possible"


def test_those_that_begin_alike_follow_each_other(make_tables: Callable[..., Tables]) -> None:
    mixed = [question(n, head=f"Head {n % 3}.") for n in range(9)]
    blocks = in_blocks(make_tables(mixed, execution={"task_block": 4}))
    assert [t.id for t in chain(*blocks)] == [f"t/{n}" for n in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    assert [len(b) for b in blocks] == [4, 4, 1]


def test_nothing_unsolved_is_no_block(make_tables: Callable[..., Tables]) -> None:
    for tables in (make_tables(), make_tables([])):
        assert in_blocks(tables) == []
        assert so_far(tables) == SoFar(0, 0, 0, 0.0)


def test_what_the_base_said_goes_with_the_tasks_of_a_judge(make_tables: Callable[..., Tables]) -> None:
    tasks = [question(n, "open" if n % 2 else "exact") for n in range(6)]
    tables = make_tables(tasks)
    said = [Completion(t.id, "base", "", f"base on {t.id}") for t in tasks[:5]]
    tables.base.write_table("base_completions", Completion, said)
    (block,) = pending_blocks(tables, NOTHING)
    assert block.column(BASE_ANSWER).to_pylist() == ["", "base on t/1", "", "base on t/3", "", ""]
    assert block.drop_columns([BASE_ANSWER]).equals(to_table(Task, tasks))


def test_the_figures_of_a_job_are_counted_in_its_tables(make_tables: Callable[..., Tables]) -> None:
    tables = make_tables(TASKS[:8])
    run = tables.run
    empty = settle(tables)
    assert (empty["asked"], empty["requests"], empty["cost_usd"]) == (0, 0, 0)
    for n, outcome in enumerate(("error", "unparsed", "fail", "pass", "pass")):
        decide(run, [TASKS[4 - n]], outcome)
    answers = [
        Answer(f"t/{n}", 0, "m", 1, "text", 0.25, 10, 5, 1.0, "hash", from_ledger=False, round=round_)
        for n, round_ in ((0, 0), (0, 1), (1, 0), (2, 0))
    ]
    run.write_part(ANSWERS, answers)
    run.write_part(JUDGEMENTS, [Judgement("t/1", 0, 0, "j", "teacher", "teacher", True, 0.5, 0.5)])
    assert so_far(tables) == SoFar(8, 5, 2, 1.5)
    figures = {
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
    assert settle(tables) == figures
    assert [n for n in run.store.list(run.folder) if n.startswith(VERDICTS)] == [f"{VERDICTS}.parquet"]
    assert [v.task_id for v in run.read(VERDICTS, Verdict)] == [f"t/{n}" for n in range(5)]
    assert settle(tables) == figures
