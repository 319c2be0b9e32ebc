# ruff: noqa: E501
"""Attacks on the checker of code: what a hostile answer may try. Each is an answer to "write add(a, b)"."""

from __future__ import annotations

from pathlib import Path

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
