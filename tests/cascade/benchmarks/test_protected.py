"""What training must not overlap: the domain's test tasks and every published benchmark's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cascade.benchmarks.protected import PUBLISHED, protected_tasks
from cascade.config import TaskSource, check_config
from cascade.errors import DataError

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def config(tmp_path: Path, protect: Any = None) -> Any:
    import yaml

    raw = yaml.safe_load(QUICKSTART.read_text())
    line = {"id": 1, "kind": "exact", "prompt": "1 + 1?", "answer": 2}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    source = {"benchmark": "jsonl", "options": {"path": str(tmp_path / "own.jsonl")}}
    raw["tasks"] = {s: {"count": None, "sources": [source]} for s in ("train", "validation", "test")}
    raw["tasks"]["protect"] = protect
    return check_config(raw)


@pytest.fixture(autouse=True)
def _nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_what_is_not_cached_is_named_and_nothing_is_downloaded(tmp_path: Path) -> None:
    found = protected_tasks(config(tmp_path))
    assert found.checked == {"domain": 1}
    assert set(found.missing) == set(PUBLISHED)
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_both_sets_of_arc_are_protected(tmp_path: Path) -> None:
    for part in ("Challenge", "Easy"):
        row = {"id": part, "question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
        (tmp_path / f"ARC-{part}-Test.jsonl").write_text(json.dumps(row))
    arc = {"benchmark": "arc", "options": {"path": str(tmp_path)}}
    easy = {"benchmark": "arc", "options": {"path": str(tmp_path), "set": "ARC-Easy"}}
    found = protected_tasks(config(tmp_path, [easy]))
    assert {t.id for t in found.tasks} == {"jsonl/own/1", "arc/ARC-Easy/Easy"}
    plain = config(tmp_path)
    test = plain.tasks.test.model_copy(update={"sources": [TaskSource(**arc)]})
    found = protected_tasks(plain.model_copy(update={"tasks": plain.tasks.model_copy(update={"test": test})}))
    assert found.checked == {"domain": 1, "arc": 2}


def test_benchmarks_that_the_config_names_must_be_there_and_are_taken_whole(tmp_path: Path) -> None:
    rows = [
        {"task_id": i, "text": f"Write a function number {i}.", "code": "def f(): pass", "test_list": ["assert f()"]}
        for i in (11, 12, 700)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = [{"benchmark": "mbpp", "options": {"path": str(tmp_path / "mbpp.jsonl"), "shots": 3, "form": "chat"}}]
    found = protected_tasks(config(tmp_path, named))
    assert found.checked == {"domain": 1, "mbpp": 2}
    assert {t.id for t in found.tasks} == {"jsonl/own/1", "mbpp/11", "mbpp/12"}
    with pytest.raises(DataError, match="nowhere"):
        protected_tasks(config(tmp_path, [{"benchmark": "mbpp", "options": {"path": str(tmp_path / "nowhere")}}]))
