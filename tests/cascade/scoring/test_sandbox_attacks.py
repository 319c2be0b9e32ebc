# ruff: noqa: E501
"""What a hostile answer may try: no forged pass, no escape, no hung check."""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attacks import BOMBS, ESCAPES, FAST, FORGED, HUNG, JAVASCRIPT, MARKER, TESTS, judge

from cascade.scoring import python_tests, sandbox
from cascade.scoring.python_tests import TestResult, run_tests
from cascade.scoring.sandbox import Confined, Limits, SandboxError, missing_walls
from cascade.scoring.sandbox_programs import run_javascript, run_program, run_python

NODE = shutil.which("node", path="/usr/local/bin:/usr/bin:/bin")
pytestmark = pytest.mark.skipif(bool(missing_walls()), reason=f"no walls here: {missing_walls()}")


@pytest.fixture(scope="module")
def results() -> dict[str, TestResult]:
    """What is said of all attacks on the checker, four at a time. One that hung the checker would be waited for here."""
    attacks = [*FORGED, *HUNG, *BOMBS, *(JAVASCRIPT if NODE else ())]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(python_tests, "CHECKER_CPU_S", 0.75)
        return dict(zip(attacks, pool.map(judge, attacks, timeout=300), strict=True))


@pytest.mark.parametrize("name", FORGED)
def test_no_forged_pass(name: str, results: dict[str, TestResult]) -> None:
    assert results[name].outcome in {"fail", "timeout"}, results[name]


@pytest.mark.parametrize("name", HUNG)
def test_nothing_hangs_a_check(name: str, results: dict[str, TestResult]) -> None:
    assert results[name].outcome in {"timeout", "fail"}, results[name]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_alone(name: str, results: dict[str, TestResult]) -> None:
    assert results[name].outcome in {"fail", "timeout"}, results[name]


@pytest.mark.skipif(NODE is None, reason="no node")
@pytest.mark.parametrize("name", JAVASCRIPT)
def test_no_forged_pass_in_javascript(name: str, results: dict[str, TestResult]) -> None:
    assert results[name].outcome in {"fail", "timeout"}, results[name]


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


def test_names_that_programs_use_are_there_and_main_is_not_run_in_tests_of_functions() -> None:
    code = (
        "def add(a, b):\n  if a > 99: exit(1)\n  return a + b\nif __name__ == '__main__':\n  n = int(input())\n  quit()"
    )
    assert run_tests(code, TESTS).outcome == "pass"
    program = run_python("if __name__ == '__main__':\n  print(int(input()) + 1)\n  exit()\nprint('no')", "1", Limits())
    assert (program.text, program.ended.code) == ("2\n", 0)


def test_an_exception_of_the_candidate_keeps_its_message() -> None:
    tests = "try:\n  add(1, 2)\nexcept ValueError as error:\n  assert str(error) == 'no'\nelse:\n  assert False"
    assert run_tests("def add(a, b): raise ValueError('no')", tests).outcome == "pass"


def test_what_is_written_to_standard_error_is_kept_apart() -> None:
    output = run_python("import sys\nprint('noise', file=sys.stderr)\nif 5 is 5: print(3)", "", Limits())
    assert output.text == "3\n"
    assert output.errors.startswith("<program>:3: SyntaxWarning")
    assert output.errors.endswith("noise\n")
    loud = run_python("import sys\nfor _ in range(99): sys.stderr.write('x' * 9999)\nprint(3)", "", Limits())
    assert (loud.text, loud.flooded, loud.errors.count("x")) == ("3\n", False, 1 << 14)


@pytest.mark.parametrize("out", ["sys.stdout = None", "sys.stdout.close()", "sys.stdout = type('O', (), {})()"])
def test_a_program_may_put_something_else_for_its_output(out: str) -> None:
    output = run_python(f"import sys\nprint(3)\nsys.stdout.flush()\n{out}", "", Limits())
    assert (output.text, output.ended.code) == ("3\n", 0)


def test_no_program_has_a_second_process_or_a_namespace() -> None:
    clone = "import ctypes; print(ctypes.CDLL(None, use_errno=True).syscall({number}, {flags}, 0, 0, 0, 0))"
    for flags in (0x10000011, 0x00020011, 0x11, 0x10010F00):
        code = clone.format(number=56, flags=flags)
        if shutil.which("python3", path="/usr/bin"):
            assert run_program(["/usr/bin/python3", "-S", "-c", code], "", Limits()).text == "-1\n"


def test_computing_buys_wall_time_so_that_a_busy_host_flips_no_verdict() -> None:
    class Computing:
        limits, used = Limits(cpu_seconds=5, wall_seconds=1), 0.0

        def cpu_seconds(self) -> float:
            return self.used

    process, clock = Computing(), [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.time, "monotonic", lambda: clock[0])
        patience = sandbox.Patience(1.0, process)  # type: ignore[arg-type]
        while process.used < 4.9:  # ten times slower than alone
            clock[0] += 0.2
            process.used += 0.02
            assert patience.left() > 0
        clock[0] += 3600  # everything was stopped
        assert patience.left() > 0
        process.used = 5.0
        assert patience.left() <= 0
        sleeping = Computing()
        patience = sandbox.Patience(1.0, sleeping)  # type: ignore[arg-type]
        for _ in range(6):
            clock[0] += 0.2
            left = patience.left()
        assert left <= 0


def test_code_that_computes_outlasts_the_wall_limit() -> None:
    code = "import time\ndef add(a, b):\n  end = time.process_time() + 2.2\n  while time.process_time() < end: pass\n  return 3"
    limits = Limits(cpu_seconds=10, wall_seconds=2)  # of which a busy host may need one until the process computes
    assert run_tests(code, "assert add(1, 2) == 3", limits=limits).outcome == "pass"


def test_cpu_time_is_known_of_what_is_ended_by_force() -> None:
    with Confined(Limits(), argv=["/bin/sh", "-c", "while :; do :; done"]) as confined:
        while confined.cpu_seconds() < 0.2:
            time.sleep(0.01)
        ended = confined.end()
    assert ended.ending == "wall"
    assert 0.2 <= ended.cpu_seconds < 5


def test_a_call_has_a_limit_of_its_own() -> None:
    code = "import time\ndef add(a, b):\n  end = time.process_time() + a\n  while time.process_time() < end: pass\n  return a"
    limits = Limits(cpu_seconds=5, call_cpu_seconds=0.5)
    assert run_tests(code, "assert add(0.3, 0) + add(0.3, 0) + add(0.3, 0) > 0", limits=limits).outcome == "pass"
    slow = run_tests(code, "assert add(0.8, 0)", limits=limits)
    assert (slow.outcome, slow.evidence) == ("timeout", "a call took over 0.5 s of CPU time")
    assert run_tests("import os\ndef add(a, b): os._exit(0)", "assert add(1, 2)", limits=limits).outcome == "fail"


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


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others' runs leave theirs in /tmp meanwhile
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **more: seen.append(make(*a, **more)) or seen[-1])
    run_tests("def add(a, b): return a + b", TESTS)
    assert any(Path(folder).parent == tmp_path for folder in seen)
    assert list(tmp_path.iterdir()) == []


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
        first, second = (run_python(code, "", Limits()) for code in (read, connect))
    assert first.text == "True\n"
    assert "PermissionError" in second.last_error
    monkeypatch.setattr(sandbox, "missing_walls", lambda: {"seccomp": "not granted"})
    with pytest.warns(RuntimeWarning):
        first, second = (run_python(code, "", Limits()) for code in (read, connect))
    assert "FileNotFoundError" in first.last_error
    assert second.text.startswith("<socket.socket")


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
