"""Users' tasks of every kind: right and wrong answers, and errors that name file, task and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cascade import benchmarks
from cascade.errors import ConfigError, DataError
from cascade.scoring.sandbox import missing_walls
from cascade.tasks import Completion, Task

JSONL = benchmarks.get("jsonl")
FUNCTION = {
    "name": "weather.get",
    "description": "Weather of a city.",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
ROWS: list[dict[str, Any]] = [
    {"id": 1, "kind": "exact", "prompt": "Capital of France?", "answer": ["Paris", "City of Paris"]},
    {"id": 2, "kind": "exact", "prompt": "6 x 7?", "answer": 42},
    {"id": 3, "kind": "multiple_choice", "prompt": "Largest?", "choices": ["ant", "whale", "dog"], "answer": "whale"},
    {"id": 4, "kind": "unit_tests", "prompt": "Write add.", "tests": ["assert add(1, 2) == 3"],
     "solution": "def add(a, b):\n    return a + b"},
    {"id": 5, "kind": "calls", "prompt": "Weather in Rome?", "functions": [FUNCTION],
     "expected": [{"weather.get": {"city": ["Rome", "Roma"], "days": [1, ""]}}]},
    {"id": 6, "kind": "calls", "prompt": "Sing!", "functions": [FUNCTION], "expected": []},
    {"id": 7, "kind": "function", "language": "javascript", "prompt": "Write add in JavaScript.", "function": "add",
     "cases": [{"args": [1, 2], "returns": 3}], "solution": "const add = (a, b) => a + b"},
    {"id": 8, "kind": "function", "prompt": "Write add.", "function": "add",
     "cases": [{"args": [1, 2], "returns": 3}], "solution": "def add(a, b):\n    return a + b"},
]  # fmt: skip


def load(tmp_path: Path, rows: list[dict[str, Any]], split: Any = "train") -> list[Task]:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JSONL.load(split, domain="own", options={"path": str(file)}, seed=1, count=None)


@pytest.mark.parametrize(
    ("row", "right", "wrong", "unparsed"),
    [
        (0, ["Paris", "The answer is Paris.", "**Answer:** paris", "\\boxed{Paris}"], ["Rome", "Answer: Lyon"], [""]),
        (1, ["42", "6 x 7 = 42", "It is 42.0", "The answer is 42"], ["41", "41, 42 or 43"], ["no idea"]),
        (2, ["(B)", "B", "The answer is (B).", "It is the whale."], ["A", "A, B or C"], ["hm"]),
        (4, ["[weather.get(city='rome')]", "```\nweather.get(city='Roma', days=1)\n```"],
         ["[weather.get(city='Rome', days=2)]", "[weather.get()]", "[other(city='Rome')]"], ["It rains."]),
        (5, ["None of them fits."], ["[weather.get(city='Rome')]"], [""]),
    ],
)  # fmt: skip
def test_answers_of_each_kind(tmp_path: Path, row: int, right: Any, wrong: Any, unparsed: Any) -> None:
    task = load(tmp_path, [ROWS[row]])[0]

    def outcomes(texts: list[str]) -> set[str]:
        return {JSONL.score(task, Completion(task.id, "m", "", text)).outcome for text in texts}

    assert outcomes([*right, JSONL.reference_answer(task)]) == {"pass"}
    assert outcomes(wrong) == {"fail"}
    assert outcomes(unparsed) == {"unparsed"}


@pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")
def test_unit_tests_run_in_the_sandbox(tmp_path: Path) -> None:
    task = load(tmp_path, [ROWS[3]])[0]
    verdict = JSONL.score(task, Completion(task.id, "m", "", "```python\ndef add(a, b): return a - b\n```"))
    assert (verdict.outcome, verdict.evidence.split("\n")[0]) == ("fail", "assert add(1, 2) == 3")
    assert JSONL.score(task, Completion(task.id, "m", "", JSONL.reference_answer(task))).passed
    assert JSONL.score(task, Completion(task.id, "m", "", "Adding is easy.")).outcome == "unparsed"


@pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")
@pytest.mark.parametrize(("row", "wrong"), [(6, "const add = (a, b) => a - b"), (7, "def add(a, b): return a - b")])
def test_functions_are_judged_by_values(tmp_path: Path, row: int, wrong: str) -> None:
    task = load(tmp_path, [ROWS[row]])[0]
    if row == 6 and shutil.which("node", path="/usr/local/bin:/usr/bin:/bin") is None:
        pytest.skip("no node here")
    assert JSONL.score(task, Completion(task.id, "m", "", JSONL.reference_answer(task))).passed
    failed = JSONL.score(task, Completion(task.id, "m", "", f"```\n{wrong}\n```"))
    assert (failed.outcome, failed.evidence) == ("fail", "add(1, 2) gave -1, should be 3")
    assert JSONL.score(task, Completion(task.id, "m", "", "Adding is easy.")).outcome == "unparsed"


def test_splits_by_line_and_by_file(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "split": "train"}, {**ROWS[1], "split": "test"}]
    assert [t.id for t in load(tmp_path, rows, "test")] == ["jsonl/own/2"]
    with pytest.raises(ConfigError, match="no validation tasks"):
        load(tmp_path, rows, "validation")
    (tmp_path / "own.jsonl").rename(tmp_path / "test.jsonl")
    folder = JSONL.load("test", domain="own", options={"path": str(tmp_path)}, seed=1, count=None)
    assert [t.id for t in folder] == ["jsonl/test/2"]


def typed(schema: dict[str, Any], *accepted: Any) -> dict[str, Any]:
    """A function with one parameter x, and that it is to be called with one of these values."""
    function = {"name": "f", "parameters": {"properties": {"x": schema}, "required": ["x"]}}
    return {"functions": [function], "expected": [{"f": {"x": list(accepted)}}]}


@pytest.mark.parametrize(
    ("schema", "accepted", "right", "wrong"),
    [
        ({"type": "number"}, 12.5, "[f(x=12.5)]", "[f(x=12)]"),
        ({"type": "number"}, 12.0, "[f(x=12)]", "[f(x='12')]"),
        ({"type": "object"}, {"a": [1]}, "[f(x={'a': 1})]", "[f(x={'a': 2})]"),
        ({"type": "array", "items": {"type": "number"}}, [1.5], "[f(x=[1.5])]", "[f(x=[2.5])]"),
    ],
)
def test_parameters_have_the_types_of_json_schema(tmp_path, schema, accepted, right, wrong) -> None:
    (task,) = load(tmp_path, [{"id": 1, "kind": "calls", "prompt": "x", **typed(schema, accepted)}])
    assert f'"type": "{schema["type"]}"' in task.messages[0].content
    assert JSONL.score(task, Completion(task.id, "m", "", right)).passed
    assert not JSONL.score(task, Completion(task.id, "m", "", wrong)).passed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "prompt": "x"}, "task 1 .*kind"),
        ({**ROWS[0], "anser": 1}, "anser"),
        ({"id": 1, "kind": "exact", "answer": "x"}, "either prompt or messages"),
        ({**ROWS[2], "answer": "cat"}, "no index, letter or text"),
        ({**ROWS[4], "expected": [{"unknown": {}}]}, "names one of the functions"),
        ({**ROWS[4], **typed({"type": "text"})}, "parameter x of f has the type 'text'.*number"),
        ({**ROWS[4], **typed({})}, "parameter x of f has the type None"),
        ({**ROWS[4], **typed({"type": "array"})}, "items of parameter x of f"),
        ({**ROWS[0], "difficulty": 0}, "difficulty"),
        ({**ROWS[6], "language": "cobol"}, "language"),
        ({**ROWS[6], "cases": [{"args": 1, "returns": 1}]}, "args"),
    ],
)
def test_schema_errors_name_the_key(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [row])


def test_repeated_ids_and_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="appears twice"):
        load(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(ConfigError, match="file"):
        JSONL.load("train", domain="own", options={"file": "x"}, seed=1, count=None)
    with pytest.raises(DataError, match="no data file"):
        JSONL.load("train", domain="own", options={"path": str(tmp_path / "nothing")}, seed=1, count=None)
