# ruff: noqa: E501
"""LiveCodeBench's schema, windows and checks on two tiny problems of exactly that schema."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade import benchmarks
from cascade.benchmarks import livecodebench
from cascade.benchmarks.livecodebench import between_fences, same_output
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


THREADED = """from threading import Thread
import time
def main():
    time.sleep(0.2)
    print(sum(map(int, input().split())))"""


@confined
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys\nprint('dbg', file=sys.stderr)\nprint(sum(map(int, input().split())))", "pass"),
        ("x = 5\nif x is 5: print(sum(map(int, input().split())))", "pass"),
        ("print(sum(map(int, input().split())))\nexit()", "pass"),
        ("import sys\nprint(sum(map(int, input().split())))\nsys.exit(1)", "pass"),
        ("print(sum(map(int, input().split())))\nraise ValueError", "fail"),
        ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(1)", "fail"),
        ("def main():\n    print(sum(map(int, stdin.read().split())))\nif __name__ == '__main__':\n    main()", "pass"),
        ("a, b = map(int, input().split())\nstr(10 ** 5000)\nprint(fsum(deepcopy([a, b])))", "pass"),
        (f"{THREADED}\nThread(target=main).start()", "pass"),
        (f"{THREADED}\nThread(target=main, daemon=True).start()", "fail"),
        (f"{THREADED}\nThread(target=main).start()\nraise ValueError", "fail"),
        ("import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))", "pass"),
        ("import atexit\n@atexit.register\ndef last():\n    print(15)\n    raise ValueError", "fail"),
        ("import threading\nthreading._shutdown = exit\nprint(sum(map(int, input().split())))", "pass"),
        ("import mmap\nx = mmap.mmap(-1, 3 << 30)\nprint(sum(map(int, input().split())))", "pass"),
        ("import mmap\nx = mmap.mmap(-1, 5 << 30)\nprint(sum(map(int, input().split())))", "fail"),
    ],
)
def test_programs_are_judged_as_the_harness_does(tasks: dict[str, Task], code: str, expected: str) -> None:
    assert outcome(tasks["sum"], f"```python\n{code}\n```") == expected


@confined
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def scale(xs, k): return [x * k for x in xs]", "pass"),
        ("def scale(xs: List[int], k): return tuple(mul(x, k) for x in deepcopy(xs) if ascii_lowercase)", "pass"),
        ("class Solution:\n    def scale(self, xs, k):\n        return [self.deep(9000)[0] + x * k for x in xs]\n"
         "    def deep(self, n): return [0] if n == 0 else self.deep(n - 1)", "pass"),
        ("class Solution:\n    calls = 0\n    def scale(self, xs, k):\n        self.calls += 1\n"
         "        return [x * k for x in xs] if self.calls == 1 else []", "fail"),
        ("class Solution:\n    def scale(self, xs, k): return [(x * k) for x in xs]\nSolution = None", "fail"),
        ("def other(xs, k): return xs", "fail"),
    ],
)  # fmt: skip
def test_functions_are_judged_as_the_harness_does(tasks: dict[str, Task], code: str, expected: str) -> None:
    assert outcome(tasks["scale"], f"```python\n{code}\n```") == expected


@confined
def test_every_test_of_a_function_has_its_own_time(tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "LIMITS", replace(livecodebench.LIMITS, cpu_seconds=0.5))
    code = (
        "import time\ndef scale(xs, k):\n    end = time.process_time() + {seconds}\n"
        "    while time.process_time() < end: pass\n    return [x * k for x in xs]"
    )
    assert outcome(tasks["scale"], f"```python\n{code.format(seconds=0.35)}\n```") == "pass"
    assert outcome(tasks["scale"], f"```python\n{code.format(seconds=0.7)}\n```") == "timeout"


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


def test_the_last_fenced_block_is_the_answer() -> None:
    assert between_fences("```python\nold\n```\nBetter:\n```python\nnew\n```\nDone.") == "new"
    assert between_fences("```python\nonly\n```") == "only"
    assert between_fences("```python\nno end") is None


@confined
@pytest.mark.parametrize(
    ("body", "count", "expected"),
    [
        ("return sum(a)", 20, "pass"),
        ("return sum(a) + (len(a) > 99_999 and a[-1] == 1)", 2, "fail"),
        ("cases.clear(); return 0", 2, "fail"),
        ("total = sum(a); a.clear(); return total", 2, "pass"),
        ("return a", 2, "fail"),
    ],
)
def test_large_tests_take_no_time_of_the_candidate_or_the_checker(
    tmp_path: Path, body: str, count: int, expected: str
) -> None:
    lists = [[*range(99_999), number] for number in range(count)]
    cases = [{"input": json.dumps(a), "output": str(sum(a)), "testtype": "functional"} for a in lists]
    starter = "class Solution:\n    def total(self, a: List[int]) -> int:\n        "
    file = tmp_path / "large.jsonl"
    file.write_text(json.dumps(problem("large", "2024-05-01", starter, [], cases, func_name="total")))
    (task,) = LCB.load("test", domain="code", options={"path": str(file)}, seed=1, count=None)
    tampering = "cases, case, listed, shown, AssertionError = [], {}, None, None, None"
    code = f"```python\n{tampering}\nclass Solution:\n    def total(self, a): {body}\n```"
    verdict = LCB.score(task, Completion(task.id, "m", "", code))
    assert verdict.outcome == expected, verdict.evidence
    assert len(verdict.evidence) <= 800
