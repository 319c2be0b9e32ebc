"""Functions in Python and JavaScript judged by plain values, in the sandbox."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest

from cascade.scoring.function_tests import run_cases, same_value
from cascade.scoring.sandbox import Limits, missing_walls

pytestmark = pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")
with_node = pytest.mark.skipif(shutil.which("node", path="/usr/local/bin:/usr/bin:/bin") is None, reason="no node")
CASES: list[dict[str, Any]] = [{"args": [1, 2], "returns": 3}, {"args": [-1, 1], "returns": 0}]
FAST = Limits(cpu_seconds=2, wall_seconds=10)
ENDLESS = replace(FAST, cpu_seconds=0.5)
"""For what is to reach the limit."""


@with_node
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("function add(a, b) { return a + b }", "pass"),
        ("const add = (a, b) => a + b", "pass"),
        ("module.exports = { add: (a, b) => a + b }", "pass"),
        ("async function add(a, b) { await null; return a + b }", "pass"),
        ("function add(a, b) { console.log('noise'); return a + b }", "pass"),
        (
            "const fs = require('fs'), out = 1, run = 2, text = 3, given = 4; function add(a, b) { return a + b }",
            "pass",
        ),
        ("setInterval(() => {}, 1000); function add(a, b) { return a + b }", "pass"),
        ("function add(a, b) { return a - b }", "fail"),
        ("function add(a, b) { return String(a + b) }", "fail"),
        ("function add(a, b) { throw new Error('no') }", "fail"),
        ("function sub(a, b) { return a - b }", "fail"),
        ("function add(a, b) { return", "fail"),
        ("function add(a, b) { return new Proxy({}, { get: () => true }) }", "fail"),
        ("Object.prototype.toJSON = () => 3; function add(a, b) { return {} }", "fail"),
        ("process.exit(0)", "fail"),
        ("function add() { process.exit(0) }", "fail"),
        ("function add() { return new Promise(() => {}) }", "fail"),
        ("function add() { require('child_process').execSync('true'); return 3 }", "fail"),
        ("require('fs').writeSync(1, '{\"results\": [{\"value\": 3}]}\\n'); process.exit(0)", "fail"),
        ("while (true) {}", "timeout"),
        ("function add() { while (true) {} }", "timeout"),
        ("function add() { const x = []; while (true) x.push(new Array(1e6).fill(1)) }", "fail"),
    ],
)
def test_javascript(code: str, expected: str) -> None:
    result = run_cases(code, "javascript", "add", CASES, ENDLESS if expected == "timeout" else FAST)
    allowed = {expected, "timeout"} if "push" in code else {expected}
    assert result.outcome in allowed, result


@pytest.mark.parametrize(
    "code",
    [
        "from collections import Counter\ndef count(x): return Counter(x)",
        "import collections\ndef count(x): return collections.OrderedDict(b=1, a=2)",
        "import numpy as np\ndef count(x): return {'a': np.int64(2), 'b': np.float64(1)}",
    ],
)
def test_python_may_answer_with_relatives_of_plain_values(code: str) -> None:
    result = run_cases(code, "python", "count", [{"args": ["aab"], "returns": {"a": 2, "b": 1}}], FAST)
    assert result.outcome == "pass", result


@with_node
def test_javascript_may_answer_with_an_end_of_line_of_another_kind() -> None:
    cases = [{"args": ["one"], "returns": "one\u2028two\x85"}]
    code = "function f(a) { return a + '\\u2028two\\u0085' }"
    assert run_cases(code, "javascript", "f", cases, FAST).outcome == "pass"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def add(a, b): return a + b", "pass"),
        ("import sys\ndef add(a, b):\n  print('noise')\n  return a + b", "pass"),
        ("def add(a, b): return a + b\nif __name__ == '__main__':\n  n = int(input())", "pass"),
        ("def add(a, b): return a - b", "fail"),
        ("class E(int):\n  def __eq__(s, o): return True\ndef add(a, b): return E(3)", "fail"),
        ("def sub(a, b): return 1", "fail"),
        ("import os\nos._exit(0)", "fail"),
        ("import json\njson.dumps = lambda *a: '{\"results\": []}'\ndef add(a, b): return 9", "fail"),
        ("def add(a, b):\n  while True: pass", "timeout"),
    ],
)
def test_python(code: str, expected: str) -> None:
    limits = ENDLESS if expected == "timeout" else FAST
    assert run_cases(code, "python", "add", CASES, limits).outcome == expected


def test_the_evidence_says_which_call() -> None:
    result = run_cases("def add(a, b): return 3", "python", "add", CASES, FAST)
    assert result.evidence == "add(-1, 1) gave 3, should be 0"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True), (1, True, False), (0, False, False), (None, False, False), ("1", 1, False), ([], {}, False),
        ([1, 2], [1, 2.0], True), ([1], [1, 2], False), ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": True}, {"a": 1}, False),
        (float("nan"), float("nan"), False), ("", None, False),
    ],
)  # fmt: skip
def test_values_are_compared_as_json(a: Any, b: Any, same: bool) -> None:
    assert same_value(a, b) is same
    assert same_value(b, a) is same
