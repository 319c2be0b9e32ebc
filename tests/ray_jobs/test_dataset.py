"""What the training job trains on: planted leaks of any protected benchmark and near-duplicates never get there."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cascade.config import check_config
from cascade.tasks import Completion, Example, Message, Task, Verdict
from ray_jobs import _dataset

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
RNG = random.Random(5)


def prose(length: int) -> str:
    return " ".join("".join(RNG.choices("abcdefghijklmnop", k=6)) for _ in range(length))


def example(number: int, prompt: str) -> Example:
    messages = (Message("user", prompt), Message("assistant", prose(4)))
    return Example(f"jsonl/own/{number}", "jsonl", "own", "exact", 1, messages, "teacher", 1)


@pytest.fixture
def job(tmp_path: Path) -> Any:
    questions = {i: prose(25) for i in range(11, 31)}
    rows = [
        {"task_id": i, "text": q, "code": "def f(): pass", "test_list": ["assert f()"]} for i, q in questions.items()
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"id": 1, "kind": "exact", "prompt": prose(30), "answer": 2}
    (tmp_path / "own.jsonl").write_text(json.dumps(own))
    source = {"benchmark": "jsonl", "options": {"path": str(tmp_path / "own.jsonl")}}
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["tasks"] = {s: {"count": None, "sources": [source]} for s in ("train", "validation", "test")}
    raw["tasks"]["protect"] = [{"benchmark": "mbpp", "options": {"path": str(tmp_path / "mbpp.jsonl")}}]
    config = check_config(raw)
    return SimpleNamespace(config=config, runs=None, own=own["prompt"], questions=questions)


def test_leaks_of_other_benchmarks_and_near_duplicates_are_left_out(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = [example(i, prose(80)) for i in range(30)]
    leaks = [example(100 + i, f"{prose(5)} {' '.join(q.split()[4:19]).upper()}") for i, q in job.questions.items()]
    leaks.append(example(200, f"Please: {job.own}"))
    words = clean[0].messages[0].content.split()
    copy = replace(clean[0], task_id="jsonl/own/300")
    changed = Message("user", " ".join([*words[:-1], "changed"]))
    near = replace(clean[0], task_id="jsonl/own/301", messages=(changed, clean[0].messages[1]))
    monkeypatch.setattr(_dataset, "examples_up_to", lambda runs, tier: [*clean, *leaks, copy, near])
    kept, about = _dataset.training_examples(job)
    assert kept == clean
    assert about["left_out_overlapping_test"] == len(leaks) == 21
    assert about["left_out_near_duplicates"] == 2
    assert about["checked_against_tests_of"] == {"domain": 1, "mbpp": 20}
    assert about["not_checked_against"] == {}


def test_replayed_answers_are_whole_and_as_many_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "cut": ("yes, and furth", "length"),
        "empty": (" ", "stop"),
        "a": ("yes", "stop"),
        "b": ("no", "stop"),
        "c": ("so", "stop"),
    }
    messages = (Message("user", "q"),)
    tables = {
        "tasks": [Task(name, "jsonl", "own", "train", messages, {}) for name in answers],
        "base_completions": [Completion(name, "m", "", text, reason) for name, (text, reason) in answers.items()],
        "base_verdicts": [Verdict(name, "m", "", "pass") for name in answers],
    }
    run = SimpleNamespace(read=lambda table, record: tables[table])
    run.require = lambda: run
    for seed in range(5):  # in whatever order they come
        config = SimpleNamespace(seed=seed, base=SimpleNamespace(model="m"))
        job: Any = SimpleNamespace(config=config, runs=SimpleNamespace(test_domain=run))
        assert len(_dataset._replayed(job, 2)) == 2
        assert {e.task_id for e in _dataset._replayed(job, 9)} == {"a", "b", "c"}
