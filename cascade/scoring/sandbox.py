"""A sandbox for code that nobody has read: what a model wrote, and the tests it is judged by.

What holds, where the kernel grants it: namespaces of its own (user, mount, pid, network, ipc, uts), a root file
system with system libraries and the interpreter read-only and an empty /tmp, no capability, a seccomp filter (no
sockets, no new processes or programs, no tracing, no mounts), an empty environment, and limits on CPU time, address
space, file size, scratch space and open files. CPU time decides timeouts, so that a busy host flips no verdict; wall
time is a generous backstop for code that sleeps.

What it does NOT protect against: a hole in the kernel itself, side channels between processes, and what the walls that
are not granted (`missing_walls`) would keep out. Where one is missing it refuses to run, unless the config
(`execution.allow_weak_sandbox`) or CASCADE_ALLOW_WEAK_SANDBOX=1 says that the whole machine is expendable; then
it says aloud what is missing, and the walls that are granted stand.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cascade.errors import CascadeError

WEAK_SWITCH = "CASCADE_ALLOW_WEAK_SANDBOX"
_HERE = Path(__file__).parent
_NAMESPACES = ("user", "mount", "pid", "network", "ipc", "uts")
Ending = Literal["exit", "cpu", "wall", "killed", "setup"]


class SandboxError(CascadeError):
    """The sandbox cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a confined process may use.

    Attributes:
        cpu_seconds: CPU time, user and system, as measured when the process has ended. The kernel's own limit counts
            clock ticks and is off by a tenth on a busy machine: it is set a quarter above, and only ends the process.
        wall_seconds: backstop for processes that sleep or wait; None: 20 s more than four times the CPU time.
        memory_bytes: address space; 0 leaves it to the kernel (node reserves far more than it uses).
        scratch_bytes: all of /tmp together.
        file_bytes: one file.
        output_bytes: standard output that is kept; beyond it the process is ended.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float | None = None
    memory_bytes: int = 1 << 30
    scratch_bytes: int = 32 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 64
    output_bytes: int = 8 << 20

    @property
    def wall(self) -> float:
        """The wall-time backstop in seconds."""
        return self.wall_seconds if self.wall_seconds is not None else 20.0 + 4 * self.cpu_seconds

    def for_launcher(self) -> dict[str, int]:
        """Whole numbers, as the kernel's limits want them."""
        numbers = {k: v for k, v in asdict(self).items() if k not in {"wall_seconds", "output_bytes"}}
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
        request = {
            "namespaces": [] if "namespaces" in missing else list(_NAMESPACES),
            "seccomp": "seccomp" not in missing,
            "root": self._root,
            "visible": visible_paths(),
            "limits": limits.for_launcher(),
            "role_files": [str(_HERE / f"{name}.py") for name in roles],
            "argv": list(argv),
            "payload": payload or {},
            "fds": list(fds),
            "streams": list(streams),
            "python_path": [sysconfig.get_path("purelib")],
        }
        self._process = _launch(request, {*fds, *(s for s in streams if s is not None)})

    def __enter__(self) -> Confined:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._root, ignore_errors=True)

    def kill(self) -> None:
        """End every process inside, at once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def wait(self, seconds: float | None = None) -> Ended:
        """Wait for the end, at most for the wall limit or the seconds given, then end it by force."""
        limit = self.limits.wall if seconds is None else seconds
        try:
            self._process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            self.kill()
            return Ended("wall", detail=f"no end after {limit:.0f} s of wall time")
        assert self._process.stdout is not None
        return self._ended(_report(self._process.stdout.read()))

    def _ended(self, report: dict[str, Any]) -> Ended:
        if "exit" not in report or "setup_error" in report:
            return Ended("setup", detail=str(report.get("setup_error") or report.get("missing") or "no report"))
        code, cpu = int(report["exit"]), float(report["cpu_seconds"])
        ending: Ending = "exit" if code >= 0 else "killed"
        if cpu >= self.limits.cpu_seconds or code == -signal.SIGXCPU:
            ending = "cpu"
        return Ended(ending, code, cpu, int(report["peak_bytes"]))


def _report(output: bytes) -> dict[str, Any]:
    """What the launcher says: one line in the end, and one before if a wall could not be built."""
    merged: dict[str, Any] = {}
    for line in output.splitlines():
        merged |= json.loads(line)
    return merged


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
    with process.stdin as stdin:
        stdin.write(json.dumps(request).encode())
    process.stdin = None
    return process


@cache
def visible_paths() -> list[str]:
    """Folders that confined code can read: system libraries, the interpreter, installed packages."""
    paths = ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix, sysconfig.get_path("purelib")]
    return [p for p in dict.fromkeys(os.path.abspath(p) for p in paths) if os.path.exists(p) and p != "/"]


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
        request: dict[str, Any] = {"root": root, "visible": visible_paths(), "limits": Limits().for_launcher()}
        request |= {"namespaces": list(_NAMESPACES) if "namespaces" in walls else [], "seccomp": "seccomp" in walls}
        request |= {"role_files": [], "argv": ["/bin/true"], "payload": {}}
        request |= {"fds": [], "streams": [None, None, None], "python_path": []}
        output, _ = _launch(request, set()).communicate(timeout=60)
    report = _report(output)
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


@dataclass(frozen=True, slots=True)
class Output:
    """What a program wrote to standard output, and how it ended."""

    text: str
    ended: Ended
    flooded: bool = field(default=False)


def run_program(argv: Sequence[str], stdin: str, limits: Limits) -> Output:
    """A program of the visible folders (node, say) with its standard input.

    Raises:
        SandboxError: see `Confined`.
    """
    return _run_with_streams(stdin, limits, argv=argv)


def run_python(code: str, stdin: str, limits: Limits) -> Output:
    """A Python program, run as `__main__`, with its standard input.

    Raises:
        SandboxError: see `Confined`.
    """
    return _run_with_streams(stdin, limits, roles=["program_role"], payload={"code": code})


def run_role(roles: Sequence[str], payload: dict[str, Any], limits: Limits) -> Output:
    """A role of this package (see `Confined`) that writes its answer to standard output.

    Raises:
        SandboxError: see `Confined`.
    """
    return _run_with_streams("", limits, roles=roles, payload=payload)


def run_javascript(code: str, stdin: str, limits: Limits) -> Output:
    """A JavaScript program under node, with its standard input; the address space is node's own affair.

    Raises:
        SandboxError: node is not installed below /usr or /bin; or see `Confined`.
    """
    node = shutil.which("node", path="/usr/local/bin:/usr/bin:/bin")
    if node is None:
        raise SandboxError("JavaScript tasks need node below /usr/bin or /usr/local/bin")
    heap = f"--max-old-space-size={max(64, limits.memory_bytes >> 21)}"
    roomy = Limits(**{**asdict(limits), "memory_bytes": 0})
    return run_program([node, heap, "--eval", code], stdin, roomy)


def _run_with_streams(
    stdin: str,
    limits: Limits,
    *,
    argv: Sequence[str] = (),
    roles: Sequence[str] = (),
    payload: dict[str, Any] | None = None,
) -> Output:
    with tempfile.TemporaryFile() as source:
        source.write(stdin.encode())
        source.seek(0)
        reader, writer = os.pipe()
        streams = (source.fileno(), writer, writer)
        with os.fdopen(reader, "rb") as output:
            try:
                confined = Confined(limits, argv=argv, roles=roles, payload=payload, streams=streams)
            finally:
                os.close(writer)
            with confined:
                return _collect(output.fileno(), confined, limits)


def _collect(fd: int, confined: Confined, limits: Limits) -> Output:
    """Read until the end of the output, the limit of its size, or the wall limit."""
    chunks, size, deadline = [], 0, time.monotonic() + limits.wall
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and size <= limits.output_bytes:
            if not selector.select(timeout=left):
                continue
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
    flooded = size > limits.output_bytes
    ended = confined.wait(0.0 if flooded else max(0.0, deadline - time.monotonic()))
    text = b"".join(chunks)[: limits.output_bytes].decode(errors="replace")
    return Output(text, ended, flooded)
