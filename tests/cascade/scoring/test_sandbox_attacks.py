# ruff: noqa: E501
"""What a hostile answer may try: no forged pass, no escape, no hung check."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attacks import BOMBS, ESCAPES, FAST, FORGED, HUNG, MARKER, TESTS

from cascade.scoring import sandbox
from cascade.scoring.python_tests import TestResult, run_tests
from cascade.scoring.sandbox import (
    Confined,
    Limits,
    SandboxError,
    missing_walls,
    run_javascript,
    run_program,
    run_python,
)

pytestmark = pytest.mark.skipif(bool(missing_walls()), reason=f"no walls here: {missing_walls()}")


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[TestResult, float]]:
    """All attacks on the checker, two at a time."""

    def attack(code: str) -> tuple[TestResult, float]:
        start = time.monotonic()
        return run_tests(code, TESTS, limits=FAST), time.monotonic() - start

    attacks = FORGED | HUNG | BOMBS
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(attacks, pool.map(attack, attacks.values()), strict=True))


@pytest.mark.parametrize("name", FORGED)
def test_no_forged_pass(name: str, results: dict[str, tuple[TestResult, float]]) -> None:
    assert results[name][0].outcome in {"fail", "timeout"}, results[name]


@pytest.mark.parametrize("name", HUNG)
def test_nothing_hangs_a_check(name: str, results: dict[str, tuple[TestResult, float]]) -> None:
    result, seconds = results[name]
    assert result.outcome in {"timeout", "fail"}, result
    assert seconds < 20


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_alone(name: str, results: dict[str, tuple[TestResult, float]]) -> None:
    result, seconds = results[name]
    assert result.outcome in {"fail", "timeout"}, result
    assert seconds < 20


@pytest.mark.parametrize("name", ESCAPES)
def test_no_escape(name: str, tmp_path: Path) -> None:
    code = ESCAPES[name].format(m=MARKER, home=Path.home() / ".cache") + "\nprint('ESCAPED')"
    output = run_python(code, "", Limits(cpu_seconds=2, wall_seconds=10))
    assert "ESCAPED" not in output.text, output
    assert not MARKER.exists()


def test_honest_code_passes_and_wrong_code_says_where() -> None:
    assert run_tests("def add(a, b): return a + b", TESTS).outcome == "pass"
    wrong = run_tests("def add(a, b): return a * b", TESTS)
    assert (wrong.outcome, wrong.evidence) == ("fail", "assert add(1, 2) == 3\nAssertionError")
    raising = run_tests("def add(a, b): raise ValueError('no')", TESTS)
    assert "ValueError: no" in raising.evidence
    assert "cannot be executed" in run_tests("def add(a, b) return a", TESTS).evidence


def test_values_of_every_plain_kind_cross_the_wall() -> None:
    code = """
import collections, itertools
def same(x): return x
def kinds(): return [None, True, 1 << 200, float("inf"), 1 + 2j, "é", b"x", (1, [2]), {3}, frozenset({4}), {(1, 2): "t"}]
def counter(): return collections.Counter("aab")
def pairs(): return zip([1, 2], "ab")
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def total(pairs): return sum(p.a + p.b for p in pairs)
def bad(): raise KeyError("k")
"""
    tests = """
assert kinds() == [None, True, 1 << 200, float("inf"), 1 + 2j, "é", b"x", (1, [2]), {3}, frozenset({4}), {(1, 2): "t"}]
assert same({1: (2, {3})}) == {1: (2, {3})}
assert type(same((1,))) is tuple
assert counter() == {"a": 2, "b": 1}
assert list(pairs()) == [(1, "a"), (2, "b")]
assert total([Pair(1, 2), Pair(3, 4)]) == 10
try:
    bad()
    raise SystemError
except KeyError:
    pass
"""
    result = run_tests(code, tests)
    assert result.outcome == "pass", result


def test_cpu_time_decides_not_wall_time() -> None:
    patient = run_tests("import time\ndef add(a, b):\n  time.sleep(0.15)\n  return a + b", TESTS, limits=FAST)
    assert patient.outcome == "pass"
    assert patient.cpu_seconds < 0.3


def test_a_broken_test_is_an_error_or_a_failure_never_a_pass() -> None:
    assert run_tests("def add(a, b): return 3", "assert add(1, 2) == undefined_name").outcome == "fail"
    assert run_tests("def add(a, b): return 3", "assert add(1, 2) ==").outcome == "error"


def test_two_runs_do_not_see_each_others_files() -> None:
    assert run_python("open('/tmp/left', 'w').write('x')", "", Limits()).ended.code == 0
    assert run_python("import os; print('left' in os.listdir('/tmp'))", "", Limits()).text.strip() == "False"


def test_nothing_is_left_behind() -> None:
    before = {p for p in os.listdir("/tmp") if p.startswith("cascade-sandbox-")}
    run_tests("def add(a, b): return a + b", TESTS)
    assert {p for p in os.listdir("/tmp") if p.startswith("cascade-sandbox-")} <= before


def test_programs_read_input_and_floods_are_cut() -> None:
    assert run_python("print(int(input()) * 2)", "21\n", Limits()).text == "42\n"
    flood = run_python("while True: print('x' * 9999)", "", Limits(cpu_seconds=5, output_bytes=1 << 16))
    assert flood.flooded
    assert len(flood.text) == 1 << 16
    assert run_program(["/bin/cat"], "hello", Limits()).text == "hello"


def test_javascript_in_the_same_walls() -> None:
    try:
        output = run_javascript("console.log([1, 2, 3].map(x => x * 2).join(' '))", "", Limits(cpu_seconds=10))
    except SandboxError as error:
        pytest.skip(str(error))
    assert output.text == "2 4 6\n"
    spy = "try { console.log('ESCAPED', require('fs').readFileSync('/etc/passwd', 'utf8')) } catch (e) { console.log('no') }"
    assert run_javascript(spy, "", Limits(cpu_seconds=10)).text == "no\n"


@pytest.mark.parametrize("wall", ["namespaces", "seccomp"])
def test_without_a_wall_it_refuses_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, wall: str) -> None:
    monkeypatch.setattr(sandbox, "missing_walls", lambda: {wall: "not granted"})
    monkeypatch.delenv(sandbox.WEAK_SWITCH, raising=False)
    with pytest.raises(SandboxError, match=rf"no {wall} \(not granted\).*execution.allow_weak_sandbox"):
        Confined(Limits(), argv=["/bin/true"])
    monkeypatch.setenv(sandbox.WEAK_SWITCH, "1")
    with pytest.warns(RuntimeWarning, match=f"WEAK SANDBOX: no {wall}"):
        assert run_python("print(1)", "", Limits()).text == "1\n"


def test_the_walls_that_are_granted_stand_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.WEAK_SWITCH, "1")
    read, connect = "print(len(open('/etc/passwd').read()) > 0)", "import socket; print(socket.socket())"
    monkeypatch.setattr(sandbox, "missing_walls", lambda: {"namespaces": "not granted"})
    with pytest.warns(RuntimeWarning):
        texts = [run_python(code, "", Limits()).text for code in (read, connect)]
    assert texts[0] == "True\n"
    assert "PermissionError" in texts[1]
    monkeypatch.setattr(sandbox, "missing_walls", lambda: {"seccomp": "not granted"})
    with pytest.warns(RuntimeWarning):
        texts = [run_python(code, "", Limits()).text for code in (read, connect)]
    assert "FileNotFoundError" in texts[0]
    assert texts[1].startswith("<socket.socket")


def test_a_kernel_without_a_wall_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = sandbox._launch

    def refusing(request: dict[str, Any], fds: set[int]) -> Any:
        if request["namespaces"]:
            request = request | {"namespaces": ["user", "mount"], "visible": ["/usr"], "root": "/nowhere"}
        return launch(request, fds)

    monkeypatch.setattr(sandbox, "_launch", refusing)
    missing = sandbox.missing_walls.__wrapped__()
    assert list(missing) == ["namespaces"]
    assert "/nowhere" in missing["namespaces"]
