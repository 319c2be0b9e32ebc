"""Builds the walls of a sandbox, starts what is to be confined, and says how it ended.

Standard library alone, started as a script (`python -P -S sandbox_launcher.py`), never imported by the library. It
reads one line of JSON, the request, from standard input and writes JSON lines to standard output: the confined
process's id, then how it ended. When its standard input is closed it ends the confined process, so that what that has
used is known in any case.

Walls, in order: user, mount, pid, network, ipc and uts namespaces; a root file system of its own (system
libraries and the interpreter read-only, an empty private /tmp, four device files, no /proc); resource limits; all
capabilities dropped; no_new_privs; a seccomp filter. Process tree: the launcher, which stays in the host's pid
namespace where no signal from inside can reach it, has two children in the new one: its init, which only waits, and the
confined process.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import site
import struct
import sys
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
_NAMESPACES = {"user": 0x10000000, "mount": 0x00020000, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x08000000}
_NAMESPACES["uts"] = 0x04000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 32, 4096, 16384
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_MACHINE = platform.machine()
_SYS = {  # (x86_64, aarch64); -1 where the machine has no such call
    "pivot_root": (155, 41), "mount_setattr": (442, 442), "capset": (126, 91),
}  # fmt: skip
_DENIED = {
    "socket": (41, 198), "fork": (57, -1), "vfork": (58, -1), "ptrace": (101, 117), "syslog": (103, 116),
    "personality": (135, 92), "pivot_root": (155, 41), "adjtimex": (159, 171), "chroot": (161, 51), "acct": (163, 89),
    "settimeofday": (164, 170), "mount": (165, 40), "umount2": (166, 39), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, -1),
    "ioperm": (173, -1), "init_module": (175, 105), "delete_module": (176, 106), "quotactl": (179, 60),
    "clock_settime": (227, 112), "kexec_load": (246, 104), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "unshare": (272, 97), "perf_event_open": (298, 241), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "setns": (308, 268), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "finit_module": (313, 273), "memfd_create": (319, 279),
    "kexec_file_load": (320, 294), "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
}  # fmt: skip
_EXEC = {"execve": (59, 221), "execveat": (322, 281)}
_CLONE, _CLONE3, _CLONE_THREAD, _CLONE_NEW = (56, 220), (435, 435), 0x00010000, 0x7E020000
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_EPERM, _ENOSYS = 1, 38


def _number(call: tuple[int, int]) -> int:
    return call[0] if _MACHINE == "x86_64" else call[1]


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = [s.encode() for s in (source, target, kind)]
    _check(_LIBC.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


# ------------------------------------------------------------------------------------------------- namespaces


def enter_namespaces(wanted: list[str]) -> list[str]:
    """Unshare what the kernel grants: all at once, else none.

    Returns:
        The names of the namespaces that are missing.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = sum(_NAMESPACES[name] for name in wanted)
    if _LIBC.unshare(flags) != 0:
        return list(wanted)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    return []


def build_root(request: dict[str, Any]) -> None:
    """A root of our own: `visible` read-only, `hidden` empty, of these `packages` alone, /tmp empty and writable."""
    root, scratch = request["root"], request["limits"]["scratch_bytes"]
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.makedirs(root + "/tmp")
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC  # what code writes there is not executed or mapped as a library
    _mount("tmpfs", root + "/tmp", "tmpfs", flags, f"size={scratch},mode=700,nr_inodes=4096")
    for path in request["visible"]:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path) and not _covered(path, request["visible"]):
            _show(path, root + path)
    hidden = [path for path in request["hidden"] if os.path.isdir(root + path)]
    for path in hidden:
        _mount("tmpfs", root + path, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=256k,mode=755")
    for path in request["packages"]:
        _show(path, root + path)
    os.makedirs(root + "/dev")
    for name in ("null", "zero", "random", "urandom"):
        with open(f"{root}/dev/{name}", "w"):
            _mount(f"/dev/{name}", f"{root}/dev/{name}", "", _MS_BIND)
    os.chdir(root)
    _check(_LIBC.syscall(_number(_SYS["pivot_root"]), b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", _MNT_DETACH), "umount of the old root")
    for path in ("/", *hidden):
        _mount("none", path, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _show(path: str, inside: str) -> None:
    """A folder or file of the host at the path `inside`, read-only."""
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        open(inside, "a").close()
    _mount(path, inside, "", _MS_BIND | _MS_REC)
    _read_only(inside)


def _covered(path: str, visible: list[str]) -> bool:
    return any(path != other and path.startswith(other.rstrip("/") + "/") for other in visible)


def _read_only(path: str) -> None:
    """Read-only with everything mounted below, keeping the flags that a user namespace may not change."""
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    recursive = 0x8000
    call = _number(_SYS["mount_setattr"])
    if _LIBC.syscall(call, -100, path.encode(), recursive, attributes, len(attributes)) != 0:
        _mount("none", path, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


# ------------------------------------------------------------------------------------------- privileges and limits


def drop_capabilities() -> None:
    """No capability is left, and none can come back."""
    for capability in range(64):
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", *[0] * 6)
    _check(_LIBC.syscall(_number(_SYS["capset"]), header, data), "capset")


def no_new_privileges() -> None:
    """Nothing executed later may gain privileges; seccomp needs it too."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def set_limits(limits: dict[str, int]) -> None:
    """CPU seconds, memory, file size, open files, threads; no core files. Soft and hard alike but CPU."""
    cpu = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    keys = {"AS": "memory_bytes", "DATA": "data_bytes", "FSIZE": "file_bytes", "NOFILE": "open_files"}
    for name, key in {**keys, "NPROC": "processes"}.items():
        if limits[key] > 0:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[key], limits[key]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _instruction(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, jump_true, jump_false, value)


def seccomp_program(*, allow_exec: bool) -> bytes:
    """The BPF filter: foreign architectures are killed, the denied calls fail with EPERM, new processes too.

    Threads (clone with CLONE_THREAD and no new namespace) are allowed; clone3 is reported as unknown so that libc falls
    back to clone, whose flags a filter can read. With `allow_exec` the one process may become another program, as it
    must to start node; there is never a second one, so that its limits are those of all that runs.
    """
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000
    program = [_instruction(load, 0, 0, 4), _instruction(equal, 1, 0, _AUDIT[_MACHINE]), _instruction(give, 0, 0, kill)]
    program.append(_instruction(load, 0, 0, 0))
    if _MACHINE == "x86_64":  # the x32 numbering of the same calls
        program += [_instruction(at_least, 0, 1, 0x40000000), _instruction(give, 0, 0, refuse | _ENOSYS)]
    denied = [_number(v) for v in (_DENIED if allow_exec else _DENIED | _EXEC).values()]
    for number in (n for n in denied if n >= 0):
        program += [_instruction(equal, 0, 1, number), _instruction(give, 0, 0, refuse | _EPERM)]
    program += [_instruction(equal, 0, 1, _number(_CLONE3)), _instruction(give, 0, 0, refuse | _ENOSYS)]
    program += [_instruction(equal, 0, 4, _number(_CLONE)), _instruction(load, 0, 0, 16)]
    program += [_instruction(any_bit, 1, 0, _CLONE_NEW), _instruction(any_bit, 1, 0, _CLONE_THREAD)]
    program += [_instruction(give, 0, 0, refuse | _EPERM), _instruction(give, 0, 0, allow)]
    return b"".join(program)


def install_seccomp(*, allow_exec: bool) -> bool:
    """Whether the kernel took the filter."""
    if _MACHINE not in _AUDIT:
        return False
    program = seccomp_program(allow_exec=allow_exec)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return bool(_LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0)


# ------------------------------------------------------------------------------------------------- process tree


def _load_role(request: dict[str, Any]) -> dict[str, Any]:
    """The confined Python role, read while its file can still be seen."""
    space: dict[str, Any] = {"__name__": "sandboxed_role"}
    for path in request["role_files"]:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), space)  # trusted: files of this package, named by the parent
    return space


def _confine(request: dict[str, Any], missing: list[str], status: int) -> None:
    """The last steps in the confined process, then the role or program. Does not return."""
    role = _load_role(request) if request["role_files"] else None
    if not missing:
        build_root(request)
        os.chdir("/tmp")
    else:
        os.chdir(request["root"])
    os.umask(0o077)
    os.setsid()
    _keep_descriptors(request, status)
    if not missing:
        drop_capabilities()
    no_new_privileges()
    set_limits(request["limits"])
    os.environ.clear()
    if request["seccomp"] and not install_seccomp(allow_exec=role is None):
        raise OSError("the kernel takes no seccomp filter")
    if role is None:
        os.execve(request["argv"][0], request["argv"], {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"})
    os.close(status)
    sys.path[:] = [p for p in sys.path if os.path.isabs(p)] + request["python_path"]
    site.setquit()  # exit, quit and help, which -S leaves out and programs use
    site.sethelper()
    role["main"](request["payload"], *request["fds"])
    os._exit(0)


def _keep_descriptors(request: dict[str, Any], status: int) -> None:
    """The request's streams as 0, 1 and 2, its other descriptors as they are, the status line; nothing else."""
    null = os.open("/dev/null", os.O_RDWR)
    for target, source in zip((0, 1, 2), request["streams"], strict=True):
        os.dup2(null if source is None else source, target)
    kept = {0, 1, 2, status, *request["fds"]}
    for fd in range(3, 256):
        if fd not in kept:
            try:
                os.close(fd)
            except OSError:
                continue


def _start_confined(request: dict[str, Any], missing: list[str], handlers: dict[int, Any]) -> int:
    """Fork the confined process, with the signal handlers that Python has. Returns its pid."""
    pid = os.fork()
    if pid == 0:
        status = os.dup(1)  # closed on exec, and before a Python role starts
        try:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            _confine(request, missing, status)
        except BaseException as error:
            os.write(status, json.dumps({"setup_error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        finally:
            os._exit(70)
    return pid


def _ignore_signals() -> dict[int, Any]:
    """Ignore what can be ignored, but for the end of children. Returns the handlers that were there."""
    handlers = {}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        handlers[int(number)] = signal.signal(number, signal.SIG_IGN)
    return handlers


def _start_init() -> int:
    """First process of the pid namespace: when it ends, the kernel kills every process left in it. Returns its pid."""
    pid = os.fork()
    if pid == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who lost their parents leave no zombies
        os.closerange(0, 256)
        while True:
            signal.pause()
    return pid


def _watch(pid: int) -> dict[str, Any]:
    """Wait for the confined process's end, or for the other side to want it; what it used, exactly."""
    ending = os.pidfd_open(pid)
    if not any(fd == ending for fd, _ in _poll(ending, 0)):
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    report = {"exit": os.waitstatus_to_exitcode(status), "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return report | {"peak_bytes": usage.ru_maxrss * 1024}


def _poll(*fds: int) -> list[tuple[int, int]]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll.poll()


def _say(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def main() -> NoReturn:
    """Serve one request."""
    request = json.loads(sys.stdin.buffer.readline())
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    missing = enter_namespaces(request["namespaces"]) if request["namespaces"] else ["all"]
    if missing and request["namespaces"]:
        _say(missing=missing)
        os._exit(71)
    handlers = _ignore_signals()
    init = None if missing else _start_init()
    pid = _start_confined(request, missing, handlers)
    for fd in {*request["fds"], *(s for s in request["streams"] if s is not None)}:
        os.close(fd)
    _say(pid=pid)
    report = _watch(pid)
    if init is not None:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
    _say(**report)
    os._exit(0)


if __name__ == "__main__":
    main()
