# ruff: noqa: E501
"""Attacks on the checker of code: what a hostile answer may try. Each is an answer to "write add(a, b)"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cascade.scoring.function_tests import run_cases
from cascade.scoring.python_tests import TestResult, run_tests
from cascade.scoring.sandbox import Limits

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
    "ends the tests' loop": "def add(a, b): raise StopIteration",
    "ends the tests' map": "class S(StopIteration): pass\ndef add(a, b): raise S(3)",
    "ends the tests' iterator": "def add(a, b): raise StopIteration",
    "claims a builtin exception": "class StopIteration(Exception): pass\nStopIteration.__module__ = 'builtins'\ndef add(a, b): raise StopIteration",
    "raises GeneratorExit": "def add(a, b): raise GeneratorExit",
    "raises StopAsyncIteration": "def add(a, b): raise StopAsyncIteration",
    "raises KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "gone under a bare except": "import os\ndef add(a, b): os._exit(0)",
    "interrupts init": "import os, signal\ndef add(a, b):\n  os.kill(1, signal.SIGINT)\n  return 99",
    "every signal to init": "import os, signal\ndef add(a, b):\n  for s in signal.valid_signals(): os.kill(1, s)\n  return 99",
    "hides what it burned": "import os, time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\nos._exit = lambda code: time.sleep(60)\ndef add(a, b): return a + b",
    "burns in a thread": "import threading\ndef burn():\n  while True: pass\nthreading.Thread(target=burn, daemon=True).start()\ndef add(a, b):\n  import time\n  while time.process_time() < 0.5: time.sleep(0.01)\n  return a + b",
    "nested beyond the stack": "import os\ndef add(a, b):\n  for fd in range(3, 64):\n    try: os.write(fd, b'{\"value\": ' + b'[' * 19000 + b']' * 19000 + b'}\\n')\n    except OSError: pass\n  return 99",
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
    "stops itself": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGSTOP)",
    "sleeps bit by bit": "import time\ndef add(a, b):\n  while True: time.sleep(0.01)",
    "will not exit": "import os, time\nos._exit = lambda code: time.sleep(3600)\ndef add(a, b): return 99",
    "endless range for the tests to add": "def add(a, b): return range(10 ** 12)",
    "huge number for the tests to raise": "def add(a, b): return 3 << 10 ** 7",
    "colliding hashes for the tests to collect": "def add(a, b): return [i * (2 ** 61 - 1) for i in range(100_000)]",
    "long text for the tests to search": "def add(a, b): return 'a' * 3_000_000",
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
    "library of its own": "import ctypes, shutil, _ctypes; shutil.copy(_ctypes.__file__, '/tmp/own.so'); ctypes.CDLL('/tmp/own.so')",
    "clone into a user namespace": "import ctypes; assert ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0) >= 0",
    "packages with answers": "import reasoning_gym",
    "every installed package": "import os, sys; assert {{'pytest', 'reasoning_gym', 'torch', 'pip'}} & {{n for p in sys.path if os.path.isdir(p) for n in os.listdir(p)}}",
    "the interpreter's packages": "import glob, sys; assert glob.glob(sys.base_prefix + '/lib/python3*/site-packages/*')",
    "the system's packages": "import glob; assert glob.glob('/usr/lib/python3*/dist-packages/*') or glob.glob('/usr/local/lib/python3*/*-packages/*')",
    "the system's sources": "import os; assert os.path.exists('/usr/src') or os.path.exists('/usr/local/src')",
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

JAVASCRIPT = {
    "buffers beyond the memory": "const kept = []; for (let i = 0; i < 7; i++) kept.push(Buffer.alloc(100 << 20, 1)); function add(a, b) { return a + b }",
    "shared buffers beyond the memory": "const kept = []; for (let i = 0; i < 7; i++) kept.push(new Uint8Array(new SharedArrayBuffer(100 << 20)).fill(1)); function add(a, b) { return a + b }",
    "WebAssembly memory beyond the memory": "const m = new WebAssembly.Memory({ initial: 8000 }); new Uint8Array(m.buffer).fill(1); function add(a, b) { return a + b }",
    "arrays beyond the memory": "const kept = []; for (let i = 0; i < 70; i++) kept.push(new Array(1 << 20).fill(i + 0.5)); function add(a, b) { return a + b }",
    "children that compute": "const { spawn } = require('child_process'); for (let i = 0; i < 3; i++) { const c = spawn('python3', ['-c', 'while True: pass'], { detached: true, stdio: 'ignore' }); if (!c.pid) throw new Error('no child'); } function add(a, b) { return a + b }",
    "shell": "require('child_process').execSync('true'); function add(a, b) { return a + b }",
    "fork of node": "const c = require('child_process').fork('/tmp/x.js'); if (!c.pid) throw new Error('no child'); function add(a, b) { return a + b }",
    "worker that computes": "const { Worker } = require('worker_threads'); new Worker('for (;;);', { eval: true }); async function add(a, b) { while (process.cpuUsage().user < 0.9e6) await new Promise(r => setTimeout(r, 50)); return a + b }",
    "addon of its own": "require('fs').copyFileSync('/usr/lib/x86_64-linux-gnu/libm.so.6', '/tmp/own.node'); try { process.dlopen({ exports: {} }, '/tmp/own.node') } catch (e) { if (!/did not self-register/.test(e)) throw e } function add(a, b) { return a + b }",
    "writes its own report": "require('fs').writeSync(1, '{\"results\": [{\"value\": 3}, {\"value\": 0}]}\\n'); function add() { return 99 }",
    "always a number": "function add() { return { valueOf: () => 3, toJSON: () => '3' } }",
    "socket": "const s = require('net').createServer(); let ok = false; s.on('error', () => {}); s.listen(0, () => { ok = true }); async function add(a, b) { await new Promise(r => setTimeout(r, 100)); return ok ? a + b : null }",
}  # fmt: skip
"""Answers in JavaScript: right where what they try succeeds, or wrong anyway."""

LOOPS = "for r in map(add, [1, 2], [2, 2]): assert r in (3, 4)\nassert all(map(add, [2, 4], [6, 8]))\n"
OWN_TESTS = {
    "ends the tests' loop": LOOPS,
    "ends the tests' map": LOOPS,
    "ends the tests' iterator": "assert [r for r in iter(lambda: add(1, 2), 0)][:0] == []",
    "claims a builtin exception": LOOPS,
    "raises StopAsyncIteration": LOOPS,
    "gone under a bare except": "try:\n  add(1, 2)\nexcept:\n  pass",
    "endless range for the tests to add": "assert sum(add(1, 2)) == 3",
    "huge number for the tests to raise": "assert add(1, 2) ** 99 == 3",
    "colliding hashes for the tests to collect": "assert set(add(1, 2)) == {3}",
    "long text for the tests to search": "assert add(1, 2).count('a' * 1_000_000 + 'b') + add(1, 2).find(('a' * 999 + 'b') * 999) == 1",
}
"""Attack -> the tests that it aims at, where those are not `TESTS`."""
BURNS = {
    *("hides what it burned", "burns in a thread", "busy loop", "busy loop at import", "ignores the CPU signal"),
    *("catastrophic regex", "huge power", "output flood", "stack"),
}
"""Attacks that compute for as long as they are let, which a quarter of a second shows as well as a whole one."""
WAITS = {"sleeps", "sleeps bit by bit", "threads that outlive", "closes its pipes and sleeps", "stops itself"}
"""Attacks that do nothing for as long as they are let."""
JAVASCRIPT_LIMITS = Limits(cpu_seconds=0.7, wall_seconds=5, memory_bytes=128 << 20)
JAVASCRIPT_CASES = [{"args": [1, 2], "returns": 3}, {"args": [-1, 1], "returns": 0}]


def judge(name: str) -> TestResult:
    """What the checker says of an attack of FORGED, HUNG, BOMBS or JAVASCRIPT."""
    if name in JAVASCRIPT:
        return run_cases(JAVASCRIPT[name], "javascript", "add", JAVASCRIPT_CASES, JAVASCRIPT_LIMITS)
    limits = FAST
    if name in BURNS:
        limits = replace(FAST, cpu_seconds=0.25)
    elif name in WAITS:
        limits = replace(FAST, wall_seconds=2)
    return run_tests((FORGED | HUNG | BOMBS)[name], OWN_TESTS.get(name, TESTS), limits=limits)
