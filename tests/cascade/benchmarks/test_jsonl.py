"""Users' tasks of every kind: right and wrong answers, and errors that name file, task and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cascade import benchmarks
from cascade.benchmarks.check_tasks import check_tasks
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


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (0.00001, ["0.00001", "1e-5", "The answer is 0.00001."], ["0.0001"]),
        (1e20, ["100000000000000000000"], ["1e21"]),
        (1500, ["1.5e3", "1,500.0"], ["1.5", "1"]),
        ("1,2", ["1,2", "The answer is 1, 2."], ["12"]),
        ("1 2", ["1 2"], ["12"]),
        ("[1, 2]", ["[1,2]", "[1, 2]."], ["[12]", "[1 2]"]),
        ("50%", ["50 %", r"50\%"], ["50"]),
        ("it's", ["it’s", "“It’s.”", '"it\'s"'], ["its"]),
        ("1/2", [r"\boxed{\frac{1}{2}}", "1/2"], ["12", "2/1"]),
        ("''", ["''"], ["", "x"]),
        (
            "$5",
            ["$5", "The answer is $5.", "**$5**", r"\boxed{\$5}", "Answer: **$5**."],
            ["5", "The answer is not $5."],
        ),
        ("$1,250.00", ["The answer is $1,250.00.", "Final answer: $1,250.00"], ["The answer is $1,250.01."]),
        ("__init__", ["__init__", "Answer: __init__", "`__init__`", "The answer is `__init__`."], ["Answer: init"]),
        (
            "not guilty",
            ["Not guilty.", "The answer is not guilty.", "Answer: **not guilty**"],
            ["The answer is guilty."],
        ),
        ("guilty", ["The answer is guilty."], ["The answer is not guilty.", "Answer: not guilty"]),
        (5, ["The answer is $5."], ["The answer is not 5", "The answer is not 5."]),
        ("five", ["The answer is **five**."], ["The answer is not five.", "The final answer is not five"]),
    ],
)
def test_exact_answers_are_the_same_in_another_spelling(
    tmp_path: Path, answer: Any, right: list[str], wrong: list[str]
) -> None:
    task = load(tmp_path, [{"id": 1, "kind": "exact", "prompt": "?", "answer": answer}])[0]
    passed = {text: JSONL.score(task, Completion(task.id, "m", "", text)).passed for text in (*right, *wrong)}
    assert passed == dict.fromkeys(right, True) | dict.fromkeys(wrong, False)


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


def test_an_end_of_line_of_another_kind_in_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(ROWS[0] | {"prompt": "one\u2028two\x85three"}, ensure_ascii=False), encoding="utf-8")
    (task,) = JSONL.load("test", domain="own", options={"path": str(path)}, seed=1, count=None)
    assert "one\u2028two\x85three" in task.messages[-1].content


def typed(schema: Any, *accepted: Any) -> dict[str, Any]:
    """A function with one parameter x, and that it is to be called with one of these values."""
    function = {"name": "f", "parameters": {"properties": {"x": schema}, "required": ["x"]}}
    return {"functions": [function], "expected": [{"f": {"x": list(accepted)}}]}


def requiring(names: Any) -> dict[str, Any]:
    """A function of which these parameters are required."""
    return FUNCTION | {"parameters": FUNCTION["parameters"] | {"required": names}}


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
        ({**ROWS[0], "answer": ["Paris", " "]}, "blank answer"),
        ({"id": 1, "kind": "exact", "answer": "x"}, "either prompt or messages"),
        ({"id": 1, "kind": "exact", "messages": [], "answer": "x"}, "messages holds none"),
        ({**ROWS[0], "answer": True}, "true and false would be taken for 1 and 0"),
        ({**ROWS[0], "answer": ["yes", True]}, "true and false would be taken for 1 and 0"),
        ({**ROWS[2], "answer": True}, "true and false would be taken for 1 and 0"),
        ({**ROWS[2], "answer": "cat"}, "no index, letter or text"),
        ({**ROWS[5], "functions": [{"name": "f", "parameters": None}]}, "each function needs name and parameters"),
        ({**ROWS[5], "functions": [{"parameters": {"properties": {}}}]}, "each function needs name and parameters"),
        ({**ROWS[4], **typed("string")}, "parameter x of f needs a schema"),
        ({**ROWS[4], **typed({"type": "object"}, {"a": 1})}, r"parameter x of f: .* as in \{'a': \[1\]\}"),
        ({**ROWS[4], **typed({"type": "array", "items": {"type": "object"}}, [{"a": 1}])}, r"as in \{'a': \[1\]\}"),
        ({**ROWS[4], "expected": [{"unknown": {}}]}, "names one of the functions"),
        ({**ROWS[4], **typed({"type": "text"})}, "parameter x of f has the type 'text'.*number"),
        ({**ROWS[4], **typed({})}, "parameter x of f has the type None"),
        ({**ROWS[4], **typed({"type": "array"})}, "items of parameter x of f"),
        (
            {**ROWS[4], **typed({"type": "array", "items": [{"type": "string"}]})},
            "items of parameter x of f must be one",
        ),
        ({**ROWS[5], "functions": [{**FUNCTION, "name": ["f"]}]}, "functions: .*; a name is a text"),
        ({**ROWS[5], "functions": [requiring("city")]}, "functions: parameters.required of weather.get must be a"),
        ({**ROWS[5], "functions": [requiring([["city"]])]}, "functions: parameters.required of weather.get must be"),
        *[
            (
                {"id": 1, "kind": "exact", "messages": [{"role": role, "content": "x"}], "answer": "x"},
                rf"task 1 \(1\): messages: there is no role '{role}'; roles are system, user, assistant",
            )
            for role in ("bot", "human", "tool", "")
        ],
        (
            {**ROWS[0], "prompt": "half \ud83d of it"},
            r"own.jsonl, task 1 \(1\): prompt holds '\\ud83d', one half of a ch",
        ),
        ({**ROWS[0], "answer": ["\ude00"]}, r"answer holds '\\ude00'"),
        ({**ROWS[5], "functions": [FUNCTION | {"description": "\ud83d"}]}, r"functions holds '\\ud83d'"),
        ({**ROWS[7], "cases": [{"args": [{"\ud83d": 1}], "returns": 3}]}, r"cases holds '\\ud83d'"),
        ({**ROWS[0], "difficulty": 0}, "difficulty"),
        ({**ROWS[6], "language": "cobol"}, "language"),
        ({**ROWS[6], "cases": [{"args": 1, "returns": 1}]}, "args"),
    ],
)
def test_schema_errors_name_the_key(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [row])


UNIT = {"id": 1, "kind": "unit_tests", "prompt": "Write it."}
STACK = "class Stack:\n    def __init__(self): self.s = []\n    def push(self, x): self.s.append(x)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tests": "assert f(2 == 4"}, "tests are no Python"),
        ({"tests": "assert f(2) == 4", "solution": "def f(x) return 4"}, "solution are no Python"),
        ({"tests": "assert 1 + 1 == 2"}, "nothing that an answer defines"),
        ({"tests": "assert isclose(f(2), 4)"}, "use f, isclose, which neither"),
        ({"tests": "assert isclose(f(2), 4)", "defines": ["f"]}, "use isclose, which neither"),
        ({"tests": "assert isclose(f(2), 4)", "solution": "from math import isclose\ndef f(x): return x"}, "isclose"),
        ({"tests": "s = Stack()\ns.push(1)\nassert s.pop() == 1"}, "s.push: objects stay"),
        ({"tests": "assert make().pop() == 1\nassert Stack().top == 1", "defines": ["make", "Stack"]}, "objects stay"),
        ({"tests": "s = Stack()\ns.push(1)", "solution": STACK}, "s.push: objects stay"),
        ({"tests": "f(2)\nassert f.count == 1"}, "f.count: objects stay"),
        ({"tests": "x = [1, 2]\nrev(x)\nassert x == [2, 1]"}, "rev for what it does to x"),
        ({"tests": "def check():\n    assert f(2) == 4"}, "never use f: .* call them, or name them test_"),
        ({"tests": "def check():\n    assert f(2)\ndef main():\n    check()"}, "never use f"),
        ({"tests": "def check():\n    assert f(2)\nif __name__ == '__main__':\n    check()"}, "never use f"),
        ({"tests": "def test_f(tmp_path):\n    assert f(2) == 4"}, "test_f takes tmp_path: fixtures"),
        ({"tests": "class TestF:\n    def test_f(self, x):\n        assert f(x) == 4"}, "test_f takes x: fixtures"),
        ({"tests": "async def test_f():\n    assert f(2) == 4"}, "test_f is a coroutine"),
    ],
)  # fmt: skip
def test_unit_tests_that_nobody_or_a_cheat_could_pass_are_refused(tmp_path, line, message) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [{**UNIT, **line}])


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ({"tests": "assert f(2) == 4"}, ["f"]),
        ({"tests": "from math import isclose\nassert isclose(f(2), 4)"}, ["f"]),
        ({"tests": "assert math.isclose(f(2), g(4))", "defines": ["f", "g"]}, ["f", "g"]),
        ({"tests": "assert near(f(2), 4)", "setup": "def near(a, b): return abs(a - b) < 1"}, ["f"]),
        ({"tests": "assert sum([1]) == 1", "solution": "def sum(x): return x[0]"}, ["sum"]),
        ({"tests": "r = f('a')\nassert r.upper() == 'A'\nassert f('b').upper() == 'B'"}, ["f"]),
        ({"tests": "x = [1]\ny = f(x)\nassert x == [1] and y == [2]"}, ["f"]),
        ({"tests": "x = []\ntry:\n    f(x)\n    assert False\nexcept ValueError:\n    assert x == []"}, ["f"]),
        ({"tests": "n = 3\nf(n)\nassert f(n) == 3"}, ["f"]),
    ],
)
def test_what_an_answer_must_define_is_told_from_the_tests(tmp_path, line, names) -> None:
    assert load(tmp_path, [{**UNIT, **line}])[0].reference["defines"] == names


@pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")
@pytest.mark.parametrize(
    "tests",
    [
        "def test_small():\n    assert f(2) == 4\n\ndef test_large(x=9):\n    assert f(x) == 18",
        "class TestF:\n    def test_small(self):\n        assert f(2) == 4",
        "import unittest\nclass F(unittest.TestCase):\n    def setUp(self):\n        self.x = 2\n"
        "    def test_small(self):\n        self.assertEqual(f(self.x), 4)",
        "def test_small():\n    assert f(2) == 4\n\ntest_small()",
        "def test_small():\n    assert f(2) == 4\n\nif __name__ == '__main__':\n    test_small()",
        "def check(x):\n    assert f(x) == 2 * x\n\ndef main():\n    check(2)\n\nmain()",
    ],
)
def test_tests_of_pytest_and_unittest_are_run(tmp_path: Path, tests: str) -> None:
    task = load(tmp_path, [{**UNIT, "tests": tests, "solution": "def f(x): return 2 * x"}])[0]
    for code, outcome in (("def f(x): return 2 * x", "pass"), ("def f(x): return 'nonsense'", "fail")):
        assert JSONL.score(task, Completion(task.id, "m", "", code)).outcome == outcome


@pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")
def test_code_in_several_fences_is_put_together_by_the_names_under_test(tmp_path: Path) -> None:
    task = load(tmp_path, [{**UNIT, "tests": "assert f(2) == 9"}])[0]
    split = "```python\nMOD = 7\ndef f(x):\n    return x + MOD\n```\nUse it:\n```python\nprint(f(2))\n```"
    assert JSONL.score(task, Completion(task.id, "m", "", split)).outcome == "pass"
    both = load(tmp_path, [{**UNIT, "tests": "assert f(2) == g(2) + 7 == 9", "defines": ["f", "g"]}])[0]
    older = "```python\ndef f(x): return 0\n```\n```python\ndef g(x): return x\n```\nBetter:\n"
    assert JSONL.score(both, Completion(both.id, "m", "", older + split)).outcome == "pass"
    assert JSONL.score(both, Completion(both.id, "m", "", split)).outcome == "unparsed"


@pytest.mark.parametrize(
    "row",
    [
        {**ROWS[4], "expected": [{"weather.get": {"city": ["Rome"], "when": ["now"]}}]},
        {**ROWS[4], "expected": [{"weather.get": {"days": [1]}}]},
    ],
)
def test_a_line_whose_own_answer_does_not_pass_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="its own right answer"):
        load(tmp_path, [row])


@pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")
def test_solutions_are_run_when_asked(tmp_path: Path) -> None:
    wrong = {**ROWS[3], "id": "wrong", "solution": "def add(a, b):\n    return a - b"}
    rows = [
        *ROWS[:4],
        wrong,
        {**UNIT, "id": "none", "tests": "assert f(2) == 4"},
        {**ROWS[0], "id": "t", "split": "test"},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_tasks(str(tmp_path))
    assert found.passed == {"exact": 3, "multiple_choice": 1, "unit_tests": 1}
    assert [v.task_id for v in found.failed] == ["jsonl/own/wrong"]
    assert found.unknown == ["jsonl/own/none"]


def test_a_file_belongs_to_the_split_that_is_a_word_of_its_name(tmp_path: Path) -> None:
    for name in ("contest_train", "constraints", "shop.test", "latest-Validation-2"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**ROWS[0], "id": name}))

    def ids(split: Any) -> list[str]:
        return [t.id for t in JSONL.load(split, domain="d", options={"path": str(tmp_path)}, seed=1, count=None)]

    assert ids("train") == ["jsonl/contest_train/contest_train"]
    assert ids("validation") == ["jsonl/latest-Validation-2/latest-Validation-2"]
    with pytest.raises(ConfigError, match="no test tasks"):
        ids("test")


def test_characters_of_two_halves_are_whole(tmp_path: Path) -> None:
    assert load(tmp_path, [{**ROWS[0], "prompt": "Which one is 😀?"}])[0].messages[0].content == "Which one is 😀?"


def test_a_field_too_long_for_csv_is_said_in_words(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text(f"id,kind,prompt,answer\n1,exact,{'x' * 131_073},1\n")
    with pytest.raises(DataError, match=r"own\.csv: field larger than field limit \(131072\); .* JSON lines"):
        JSONL.load("train", domain="own", options={"path": str(file)}, seed=1, count=None)


def test_what_a_source_without_tasks_of_a_split_needs_depends_on_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"own\.jsonl has no test tasks: give lines of it split: test"):
        load(tmp_path, [{**ROWS[0], "split": "train"}], "test")
    load(tmp_path, [{**ROWS[0], "split": "test"}], "test")
    with pytest.raises(ConfigError, match=r"only files named after the split are read: call one test\.jsonl, or give"):
        JSONL.load("test", domain="own", options={"path": str(tmp_path)}, seed=1, count=None)


def test_a_uri_is_no_path_of_tasks() -> None:
    with pytest.raises(DataError, match=r"s3://bucket/tasks is a URI, .* copy it here, and give that"):
        JSONL.load("train", domain="own", options={"path": "s3://bucket/tasks"}, seed=1, count=None)


def test_repeated_ids_and_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="appears twice"):
        load(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(ConfigError, match="file"):
        JSONL.load("train", domain="own", options={"file": "x"}, seed=1, count=None)
    with pytest.raises(DataError, match="no data file"):
        JSONL.load("train", domain="own", options={"path": str(tmp_path / "nothing")}, seed=1, count=None)
