"""A sandbox for code that nobody has read: what a model wrote, and the tests it is judged by.

What holds, where the kernel grants it: namespaces of its own (user, mount, pid, network, ipc, uts), a root file
system with system libraries, the interpreter and a few packages (`PACKAGES`) read-only and an empty /tmp, no
capability, a seccomp filter (no sockets, no second process, no tracing, no mounts), an empty environment, and limits on
CPU time, memory, file size, scratch space and open files.

CPU time decides timeouts, read from the kernel's clock of the one process while it runs and from its exact account when
it has ended, by itself or by force. Wall time ends what sleeps, and every second of CPU time buys `PATIENCE` more of
it: so neither a busy host nor a process that will not end changes a verdict.

What it does NOT protect against: a hole in the kernel itself, side channels between processes, and what the walls that
are not granted (`missing_walls`) would keep out. Where one is missing it refuses to run, unless the config
(`execution.allow_weak_sandbox`) or CASCADE_ALLOW_WEAK_SANDBOX=1 says that the whole machine is expendable; then
it says aloud what is missing, and the walls that are granted stand.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cascade.errors import CascadeError

WEAK_SWITCH = "CASCADE_ALLOW_WEAK_SANDBOX"
_HERE = Path(__file__).parent
_NAMESPACES = ("user", "mount", "pid", "network", "ipc", "uts")
PATIENCE = 20.0
"""Seconds of wall time that a second of CPU time buys: a process slowed twenty times by others still gets its due."""
STEP_S = 0.2
"""How often CPU time is looked at. What one step took beyond five times that is nobody's waiting: we were stopped."""
END_S = 60.0
"""What a killed process may take to be gone."""
PACKAGES = (
    "attr", "attrs", "dateutil", "mpmath", "networkx", "numpy", "numpy.libs", "pandas", "pandas.libs", "pytz", "regex",
    "scipy", "scipy.libs", "six.py", "sortedcontainers", "sympy", "typing_extensions.py", "tzdata",
)  # fmt: skip
"""Installed packages that confined code can import. No others: some carry benchmarks with their answers."""
Ending = Literal["exit", "cpu", "wall", "killed", "setup"]


class SandboxError(CascadeError):
    """The sandbox cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a confined process may use.

    Attributes:
        cpu_seconds: CPU time, user and system, as measured when the process has ended. The kernel's own limit counts
            clock ticks and is off by a tenth on a busy machine: it is set a quarter above, and only ends the process.
        wall_seconds: how long it may sleep or wait; None: 20 s and once the CPU time. See `Patience`.
        call_cpu_seconds: CPU time of one call by the tests (`cascade.scoring.python_tests`); None: no limit of its own.
        memory_bytes: address space; 0: no limit (node reserves far more than it uses).
        data_bytes: private memory that can be written to, buffers outside a heap included; 0: no limit.
        scratch_bytes: all of /tmp together.
        file_bytes: one file.
        output_bytes: standard output that is kept; beyond it the process is ended.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float | None = None
    call_cpu_seconds: float | None = None
    memory_bytes: int = 1 << 30
    data_bytes: int = 0
    scratch_bytes: int = 32 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 64
    output_bytes: int = 8 << 20

    @property
    def wall(self) -> float:
        """How long it may wait, in seconds."""
        return self.wall_seconds if self.wall_seconds is not None else 20.0 + self.cpu_seconds

    def for_launcher(self) -> dict[str, int]:
        """Whole numbers, as the kernel's limits want them."""
        ours = {"wall_seconds", "call_cpu_seconds", "output_bytes"}
        numbers = {k: v for k, v in asdict(self).items() if k not in ours}
        numbers["cpu_seconds"] *= 1.25
        return {k: math.ceil(v) for k, v in numbers.items()}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a confined process ended.

    Attributes:
        ending: "exit" by itself, "cpu" or "wall" for a limit, "killed" by a signal, "setup" if the walls failed.
        code: exit code, negative for a signal.
    """

    ending: Ending
    code: int = 0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    detail: str = ""

    @property
    def timed_out(self) -> bool:
        return self.ending in {"cpu", "wall"}


class Confined:
    """A process in a sandbox of its own. Use as a context manager: leaving it ends every process inside."""

    def __init__(
        self,
        limits: Limits,
        *,
        roles: Sequence[str] = (),
        argv: Sequence[str] = (),
        payload: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        streams: tuple[int | None, int | None, int | None] = (None, None, None),
    ) -> None:
        """
        Args:
            roles: names of this package's modules to load; the last one's `main(payload, *fds)` runs.
            argv: instead, a program with its arguments.
            payload: JSON for the role.
            fds: file descriptors that the confined process inherits.
            streams: file descriptors for its standard input, output and error; None is /dev/null.

        Raises:
            SandboxError: a wall is missing here and that is not allowed; see `require_walls`.
        """
        missing = require_walls()
        self.limits = limits
        self._root = tempfile.mkdtemp(prefix="cascade-sandbox-")
        self._said, self._report = b"", dict[str, Any]()
        request = {
            "namespaces": [] if "namespaces" in missing else list(_NAMESPACES),
            "seccomp": "seccomp" not in missing,
            "root": self._root,
            **view(),
            "limits": limits.for_launcher(),
            "role_files": [str(_HERE / f"{name}.py") for name in roles],
            "argv": list(argv),
            "payload": payload or {},
            "fds": list(fds),
            "streams": list(streams),
            "python_path": [sysconfig.get_path("purelib")],
        }
        self._process = _launch(request, {*fds, *(s for s in streams if s is not None)})
        assert self._process.stdout is not None
        self._status = self._process.stdout.fileno()
        os.set_blocking(self._status, False)

    def __enter__(self) -> Confined:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """CPU time used so far; exact once it has ended."""
        self._listen()
        if "cpu_seconds" not in self._report and "pid" in self._report:
            try:
                return time.clock_gettime(~self._report["pid"] << 3 | 2)  # the kernel's clock of that process
            except OSError:  # it has just ended
                self._listen()
        return float(self._report.get("cpu_seconds", 0.0))

    def wait(self, seconds: float | None = None) -> Ended:
        """Wait for the end, at most as long as `Patience` allows or for the seconds given, then end it by force."""
        patience = Patience(self.limits.wall, self)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        while (left := min(patience.left(), deadline - time.monotonic())) > 0:
            if select.select([self._status], [], [], min(left, STEP_S))[0] and self._listen():
                break
        return self.end()

    def end(self) -> Ended:
        """End it by force, if it has not ended by itself; says what it used in either case."""
        forced = not self._listen()
        assert self._process.stdin is not None
        self._process.stdin.close()
        deadline = time.monotonic() + END_S
        while not self._listen() and (left := deadline - time.monotonic()) > 0:
            select.select([self._status], [], [], left)
        return self._ended(forced)

    def _listen(self) -> bool:
        """Take in what the launcher has said so far. True if that is all it will say."""
        while True:
            try:
                chunk = os.read(self._status, 1 << 16)
            except BlockingIOError:
                return False
            self._said += chunk
            *lines, self._said = self._said.split(b"\n")
            for line in lines:
                self._report |= json.loads(line)
            if not chunk:
                return True

    def _ended(self, forced: bool) -> Ended:
        report = self._report
        if "exit" not in report or "setup_error" in report:
            return Ended("setup", detail=str(report.get("setup_error") or report.get("missing") or "no report"))
        code, cpu = int(report["exit"]), float(report["cpu_seconds"])
        ending: Ending = "exit" if code >= 0 else "killed"
        if cpu >= self.limits.cpu_seconds or code == -signal.SIGXCPU:
            ending = "cpu"
        elif forced and code == -signal.SIGKILL:
            ending = "wall"
        return Ended(ending, code, cpu, int(report["peak_bytes"]))


class Patience:
    """How much longer to wait for confined processes that work together.

    They may wait for `wall` seconds, and `PATIENCE` times as long as they have computed. Time in which we ourselves
    were stopped does not count.
    """

    def __init__(self, wall: float, *processes: Confined) -> None:
        self._wall, self._processes = wall, processes
        self._waited, self._last = 0.0, time.monotonic()

    def left(self) -> float:
        """Seconds left; 0 or less as soon as one is over its CPU time. To be asked every `STEP_S` or so."""
        now, used = time.monotonic(), [p.cpu_seconds() for p in self._processes]
        self._waited += min(now - self._last, 5 * STEP_S)
        self._last = now
        if any(u >= p.limits.cpu_seconds for u, p in zip(used, self._processes, strict=True)):
            return 0.0
        return self._wall + PATIENCE * sum(used) - self._waited


def _launch(request: dict[str, Any], fds: set[int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-S", str(_HERE / "sandbox_launcher.py")]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"},
        pass_fds=tuple(fds),
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    return process


@cache
def view() -> dict[str, list[str]]:
    """What confined code can see of this machine, read-only.

    Returns:
        visible: folders of the system and the interpreter; nothing beside them, so that neither tests nor answers
            that lie below /usr/src, say, can be read.
        hidden: folders of installed packages in those, shown empty.
        packages: the `PACKAGES` that are installed, shown in spite of that.
    """
    folders = [f"{base}/{name}" for base in (sys.base_prefix, "/usr", "/usr/local") for name in ("bin", "lib", "lib64")]
    folders = ["/lib", "/lib64", "/bin", "/usr/libexec", "/usr/share", *folders]
    visible = [p for p in dict.fromkeys(map(os.path.abspath, folders)) if os.path.exists(p)]
    bases = [Path(sys.base_prefix), Path("/usr"), Path("/usr/local")]
    installed = [p for base in bases for kind in ("site", "dist") for p in base.glob(f"lib*/python3*/{kind}-packages")]
    ours = {sysconfig.get_path(key) for key in ("purelib", "platlib")}
    hidden = {str(p) for p in installed} | ours
    packages = [f"{folder}/{name}" for folder in ours for name in PACKAGES if os.path.exists(f"{folder}/{name}")]
    return {"visible": visible, "hidden": sorted(hidden), "packages": sorted(packages)}


WALLS = {
    "namespaces": "model code can read this user's files, end this user's processes and fill the disk",
    "seccomp": "model code can start programs and reach every call of the kernel",
}
"""Wall -> what is possible without it."""


@cache
def missing_walls() -> dict[str, str]:
    """The walls that this kernel or container does not grant -> why; found once, by building sandboxes."""
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(WALLS, "Linux alone has them")
    if not (together := _problem("namespaces", "seccomp")):
        return {}
    problems = {wall: _problem(wall) for wall in WALLS}
    return {wall: why for wall, why in problems.items() if why} or {"namespaces": together}


def _problem(*walls: str) -> str:
    """Why a sandbox with these walls cannot be built, "" if it can."""
    with tempfile.TemporaryDirectory(prefix="cascade-sandbox-") as root:
        request: dict[str, Any] = {"root": root, **view(), "limits": Limits().for_launcher()}
        request |= {"namespaces": list(_NAMESPACES) if "namespaces" in walls else [], "seccomp": "seccomp" in walls}
        request |= {"role_files": [], "argv": ["/bin/true"], "payload": {}}
        request |= {"fds": [], "streams": [None, None, None], "python_path": []}
        with _launch(request, set()) as process:
            assert process.stdout is not None
            lines = process.stdout.read().splitlines()
    report: dict[str, Any] = {k: v for line in lines for k, v in json.loads(line).items()}
    if report.get("exit") == 0:
        return ""
    refused = f"the kernel refuses {', '.join(report.get('missing', ['to say why']))}"
    return str(report.get("setup_error") or refused)


def require_walls() -> dict[str, str]:
    """The missing walls, after a warning that names them; {} where all stand.

    Raises:
        SandboxError: a wall is missing and nothing says that this machine is expendable.
    """
    missing = missing_walls()
    if not missing:
        return {}
    what = "; ".join(f"no {wall} ({why}): {WALLS[wall]}" for wall, why in missing.items())
    if os.environ.get(WEAK_SWITCH) != "1":
        raise SandboxError(
            f"code of a model cannot be confined here: {what}. Run where unprivileged user namespaces and seccomp are "
            f"allowed (in a container: --security-opt seccomp=unconfined or a profile that permits unshare and mount), "
            f"or, if this machine holds nothing of value, set execution.allow_weak_sandbox in the config (or "
            f"{WEAK_SWITCH}=1)."
        )
    warnings.warn(f"WEAK SANDBOX: {what}", RuntimeWarning, stacklevel=4)
    return missing
