"""Bare questions: what is left of every benchmark's prompts is what was published, to the letter."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cascade import benchmarks
from cascade.benchmarks.mmlu import _rows
from cascade.benchmarks.questions import questions, unwrapped
from cascade.benchmarks.sources import read_rows
from cascade.errors import DataError
from cascade.tasks import Task

DATA = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data folder is not beside this checkout")


def load(name: str, **options: Any) -> list[Task]:
    try:
        return benchmarks.get(name).load("test", domain="d", options=options, seed=1, count=None)
    except DataError as error:
        pytest.skip(str(error)[:100])


@pytest.mark.parametrize("options", [{"shots": 0}, {"shots": 3}, {"form": "chat", "shots": 1}])
def test_mbpp(options: dict[str, Any]) -> None:
    published = {f"mbpp/{row['task_id']}": row["text"] for row in read_rows(DATA / "mbpp.jsonl")}
    tasks = load("mbpp", path=str(DATA / "mbpp.jsonl"), **options)
    assert [t.id for t in tasks if questions(t) != [published[t.id]]] == []


@pytest.mark.parametrize("options", [{}, {"form": "chat"}])
def test_arc(options: dict[str, Any]) -> None:
    published = {
        row["id"]: row["question"]["stem"].strip() for row in read_rows(DATA / "arc" / "ARC-Challenge-Test.jsonl")
    }
    tasks = load("arc", path=str(DATA / "arc"), **options)
    assert [t.id for t in tasks if questions(t) != [published[t.id.split("/")[2]]]] == []


@pytest.mark.parametrize("options", [{"shots": 0}, {"form": "cloze", "topic": True}, {"shots": 5}])
def test_mmlu(options: dict[str, Any]) -> None:
    published: dict[str, list[str]] = defaultdict(list)
    for row in _rows(str(DATA / "mmlu"), "test"):
        published[row["subject"]].append(row["question"].strip())
    tasks = load("mmlu", path=str(DATA / "mmlu"), **options)
    assert [t.id for t in tasks if questions(t) != [published[t.category][int(t.id.split("/")[3])]]] == []


@pytest.mark.parametrize("options", [{"shots": 0}, {"form": "chat", "shots": 0}])
def test_bbh(options: dict[str, Any]) -> None:
    tasks = load("bbh", path=str(DATA / "bbh"), **options)
    assert [t.id for t in tasks if questions(t) != [t.reference["input"].strip()]] == []


def test_humaneval_conversations_and_lettered_choices() -> None:
    tasks = load("humaneval")
    found = [questions(t)[0] for t in tasks]
    assert all(0 < len(q) < len(t.prompt) for q, t in zip(found, tasks, strict=True))
    assert not any(">>>" in q or "def " in q for q in found)
    assert found[23] == "Return length of given string"
    talk = load("bfcl", categories=["multi_turn_base"], split_rule="none")[0]
    assert len(questions(talk)) == len(talk.reference["questions"])
    assert unwrapped("jsonl", "Largest?\n(A) ant\n(B) whale") == "Largest?"
    assert unwrapped("jsonl", "Largest?") == "Largest?"
    assert json.dumps(unwrapped("nothing", " as it is ")) == '"as it is"'
