# ruff: noqa: E501
"""LiveCodeBench's schema, windows and checks on two tiny problems of exactly that schema."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from cascade import benchmarks
from cascade.benchmarks.livecodebench import same_output
from cascade.benchmarks.livecodebench import test_cases as read_cases
from cascade.errors import ConfigError, DataError
from cascade.scoring.sandbox import missing_walls
from cascade.tasks import Completion, Task

LCB = benchmarks.get("livecodebench")
confined = pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")


def packed(cases: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def problem(
    name: str, date: str, starter: str, public: list[Any], private: list[Any], **metadata: str
) -> dict[str, Any]:
    return {
        "question_title": name, "question_content": f"Solve {name}.", "platform": "atcoder", "question_id": name,
        "contest_id": "c", "contest_date": f"{date}T00:00:00", "starter_code": starter, "difficulty": "easy",
        "public_test_cases": json.dumps(public), "private_test_cases": packed(private), "metadata": json.dumps(metadata),
    }  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    stdin = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    more = [{"input": "10 5\n", "output": "15.0\n", "testtype": "stdin"}]
    call = [{"input": "[1, 2]\n3", "output": "[3, 6]", "testtype": "functional"}]
    starter = "class Solution:\n    def scale(self, xs: List[int], k: int) -> List[int]:\n        "
    rows = [
        problem("sum", "2024-05-01", "", stdin, more),
        problem("scale", "2024-09-01", starter, call, call, func_name="scale"),
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    loaded = LCB.load("test", domain="code", options={"path": str(file)}, seed=1, count=None)
    return {t.id.split("/")[1]: t for t in loaded}


def outcome(task: Task, code: str) -> str:
    return LCB.score(task, Completion(task.id, "m", "", code)).outcome


@confined
def test_programs_and_functions(tasks: dict[str, Task]) -> None:
    assert outcome(tasks["sum"], "```python\nprint(sum(map(int, input().split())))\n```\nDone") == "pass"
    assert outcome(tasks["sum"], "```python\nprint(3)\n```") == "fail"
    assert outcome(tasks["sum"], "```python\nraise ValueError\n```") == "fail"
    assert outcome(tasks["sum"], "print(3)") == "unparsed"
    good = "```python\nclass Solution:\n    def scale(self, xs: List[int], k: int):\n        return [x * k for x in xs]\n```"
    assert outcome(tasks["scale"], good) == "pass"
    assert outcome(tasks["scale"], good.replace("x * k", "x + k")) == "fail"
    always = "```python\nclass E:\n    def __eq__(s, o): return True\nclass Solution:\n    def scale(self, xs, k): return E()\n```"
    assert outcome(tasks["scale"], always) == "fail"


def test_windows_by_contest_date(tmp_path: Path, tasks: dict[str, Task]) -> None:
    options = {"path": str(tmp_path / "test.jsonl"), "start": "2024-08-01"}
    assert [t.id for t in LCB.load("test", domain="code", options=options, seed=1, count=None)] == [
        "livecodebench/scale"
    ]
    with pytest.raises(ConfigError, match="no problem in that window"):
        LCB.load("test", domain="code", options=options | {"end": "2024-08-02"}, seed=1, count=None)
    with pytest.raises(ConfigError, match="no train tasks"):
        LCB.load("train", domain="code", options=options, seed=1, count=None)


def test_lines_are_compared_as_text_then_as_decimals() -> None:
    assert same_output("1.50 2\nyes \n", "1.5 2.0\nyes")
    assert not same_output("1.5", "1.5\n2")
    assert not same_output("1e400x", "1")


def test_pickled_cases_cannot_name_code() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, ("true",))

    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(DataError, match="refused"):
        read_cases(evil)
    assert read_cases(packed([{"input": "1"}])) == [{"input": "1"}]
