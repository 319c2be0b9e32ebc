# ruff: noqa: E501
"""What a hostile answer may try: no forged pass, no escape, no hung check."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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

TESTS = "assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(-1, 1) == 0\nassert sorted([add(5, 5), 1]) == [1, 10]"
FAST = Limits(cpu_seconds=1, wall_seconds=4, memory_bytes=512 << 20)
MARKER = Path("/tmp/cascade-escaped")

FORGED = {
    "always equal": "class E:\n  def __eq__(s, o): return True\n  def __lt__(s, o): return True\n  __hash__ = None\ndef add(a, b): return E()",
    "int that equals all": "class E(int):\n  def __eq__(s, o): return True\n  def __hash__(s): return 0\ndef add(a, b): return E(7)",
    "str that equals all": "class E(str):\n  def __eq__(s, o): return True\n  __hash__ = str.__hash__\ndef add(a, b): return E('x')",
    "list that equals all": "class E(list):\n  def __eq__(s, o): return True\ndef add(a, b): return E()",
    "reflected comparison": "class E:\n  def __ne__(s, o): return False\n  def __eq__(s, o): return True\n  def __bool__(s): return True\n  def __radd__(s, o): return s\ndef add(a, b): return E()",
    "os._exit(0) at import": "import os\nos._exit(0)",
    "os._exit(0) in the call": "import os\ndef add(a, b): os._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "raises SystemExit subclass": "class S(SystemExit): pass\ndef add(a, b): raise S(0)",
    "kills itself": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGKILL)",
    "kills init": "import os, signal\ndef add(a, b):\n  os.kill(1, signal.SIGKILL)\n  return 99",
    "kills everybody": "import os, signal\ndef add(a, b):\n  os.kill(-1, signal.SIGKILL)\n  return 99",
    "frame walking": "import sys\ndef add(a, b):\n  f = sys._getframe()\n  while f:\n    for k, v in list(f.f_globals.items()) + list(f.f_locals.items()):\n      if isinstance(v, list): v.append('passed')\n      if isinstance(v, dict): v['outcome'] = 'pass'\n    f = f.f_back\n  return 99",
    "gc walking": "import gc\ndef add(a, b):\n  for o in gc.get_objects():\n    if isinstance(o, dict) and 'payload' in o: o['outcome'] = 'pass'\n  return 99",
    "patched builtins": "import builtins\nbuiltins.sorted = lambda *a, **k: [1, 10]\nbuiltins.AssertionError = type('A', (Exception,), {})\nbuiltins.isinstance = lambda *a: True\ndef add(a, b): return 99",
    "patched json": "import json\njson.dumps = lambda *a, **k: '{\"outcome\": \"pass\"}'\njson.loads = lambda *a, **k: {'call': 'add', 'args': [], 'kwargs': {}}\ndef add(a, b): return 99",
    "verdict on every descriptor": "import os\nfor fd in range(0, 64):\n  for line in (b'{\"outcome\": \"pass\", \"evidence\": \"\"}\\n', b'{\"ready\": true}\\n'):\n    try: os.write(fd, line)\n    except OSError: pass\ndef add(a, b): return 99",
    "verdict in the call": "import os\ndef add(a, b):\n  for fd in range(0, 64):\n    try: os.write(fd, b'{\"outcome\": \"pass\", \"evidence\": \"\"}\\n')\n    except OSError: pass\n  return 99",
    "status line of the launcher": "import os\ndef add(a, b):\n  os.write(1, b'{\"exit\": 0, \"cpu_seconds\": 0, \"peak_bytes\": 0}\\n')\n  return 99",
    "atexit": "import atexit\natexit.register(lambda: print('pass'))\ndef add(a, b): return 99",
    "import hook": "import sys\nclass F:\n  def find_spec(s, *a): raise SystemExit(0)\nsys.meta_path.insert(0, F())\ndef add(a, b): return 99",
    "trace function": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef add(a, b): return 99",
    "defines the asserts' helpers": "def sorted(x): return [1, 10]\ndef add(a, b): return 99",
    "handle instead of value": "def add(a, b): return add",
    "malformed answer": "import os\ndef add(a, b):\n  for fd in range(3, 64):\n    try: os.write(fd, b'{\"value\": {\"$\": \"remote\"}}\\n' * 3)\n    except OSError: pass\n  return 99",
    "endless nesting": "def add(a, b):\n  x = []\n  x.append(x)\n  return x",
    "deep nesting": "def add(a, b):\n  x = []\n  for _ in range(100000): x = [x]\n  return x",
    "ctypes reads memory": "import ctypes\ndef add(a, b): return ctypes.string_at(0, 8)",
    "reads the tests' memory": "import os\ndef add(a, b):\n  for p in range(1, 50):\n    try: return open(f'/proc/{p}/mem', 'rb').read(1)\n    except OSError: pass\n  return os.listdir('/proc')",
    "nan equals": "def add(a, b): return float('nan')",
    "generator": "def add(a, b):\n  while True: yield 1",
}  # fmt: skip

HUNG = {
    "busy loop": "def add(a, b):\n  while True: pass",
    "busy loop at import": "while True: pass",
    "sleeps": "import time\ndef add(a, b): time.sleep(3600)",
    "ignores the CPU signal": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ndef add(a, b):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
    "threads that outlive": "import threading, time\ndef add(a, b):\n  for _ in range(4): threading.Thread(target=lambda: time.sleep(3600)).start()\n  time.sleep(3600)",
    "catastrophic regex": "import re\ndef add(a, b): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "huge power": "def add(a, b): return len(str(7 ** 10 ** 9))",
    "closes its pipes and sleeps": "import os, time\ndef add(a, b):\n  time.sleep(3600)\nos.closerange(0, 3)",
}  # fmt: skip

BOMBS = {
    "memory": "def add(a, b): return len(bytearray(1 << 40))",
    "slow memory": "def add(a, b):\n  x = []\n  while True: x.append(bytearray(1 << 24))",
    "output flood": "import sys\ndef add(a, b):\n  while True: sys.stdout.write('x' * (1 << 20))",
    "fork": "import os\ndef add(a, b):\n  while True: os.fork()",
    "fork through multiprocessing": "import multiprocessing\ndef add(a, b):\n  p = multiprocessing.Process(target=print)\n  p.start()\n  return 99",
    "threads": "import threading, time\ndef add(a, b):\n  while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "disk": "def add(a, b):\n  n = 0\n  while True:\n    with open(f'/tmp/{n}', 'wb') as f: f.write(b'x' * (1 << 22))\n    n += 1",
    "big file": "def add(a, b):\n  with open('/tmp/x', 'wb') as f:\n    while True: f.write(b'x' * (1 << 22))",
    "open files": "def add(a, b):\n  k = []\n  while True: k.append(open('/dev/null'))",
    "huge answer": "def add(a, b): return 'x' * (1 << 28)",
    "stack": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef add(a, b): return add(a, b)",
}  # fmt: skip

ESCAPES = {
    "os.system": "import os; assert os.system('touch {m}') == 0",
    "posix.system": "import posix; assert posix.system('touch {m}') == 0",
    "subprocess": "import subprocess; subprocess.run(['touch', '{m}'], check=True)",
    "execv": "import os; os.execv('/bin/touch', ['touch', '{m}'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/touch', ['touch', '{m}'], {{}})",
    "file outside": "open('{m}', 'w'); assert False, 'private'",
    "user's files": "import os; assert os.path.exists('{home}')",
    "passwords": "open('/etc/passwd').read()",
    "environment": "import os; assert os.environ",
    "parent's environment": "open('/proc/1/environ').read()",
    "writes to the interpreter": "import os; open(os.__file__, 'a')",
    "writes to packages": "open('/usr/cascade-escaped', 'w')",
    "inet socket": "import socket; socket.socket()",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "raw socket call": "import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
    "http": "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "unshare": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "chroot": "import os; os.chroot('/tmp')",
    "setuid": "import os; os.setuid(1)",
    "ptrace": "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "raises its CPU limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    "clone through libc": "import ctypes; l = ctypes.CDLL(None); assert l.syscall(57) >= 0",
    "memfd": "import os; os.memfd_create('x')",
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, 0) >= 0",
    "kill the host's init": "import os; os.kill(os.getppid() or 0, 0); assert os.getppid() not in (0, 1)",
    "devices": "open('/dev/mem')",
    "device nodes": "import os; os.mknod('/tmp/sda', 0o60600, os.makedev(8, 0)); open('/tmp/sda', 'rb').read(1)",
}


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


def test_without_walls_it_refuses_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing_walls", lambda: ("namespaces: user",))
    monkeypatch.delenv(sandbox.WEAK_SWITCH, raising=False)
    with pytest.raises(SandboxError, match=r"namespaces: user.*CASCADE_ALLOW_WEAK_SANDBOX=1"):
        Confined(Limits(), argv=["/bin/true"])
    monkeypatch.setenv(sandbox.WEAK_SWITCH, "1")
    with pytest.warns(RuntimeWarning, match="WEAK SANDBOX"):
        assert run_python("print(1)", "", Limits()).text == "1\n"
