"""Runs inside a sandbox: a whole program that reads standard input and writes standard output.

Loaded by `sandbox_launcher`; standard library alone.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import traceback
import types
from typing import Any


def main(payload: dict[str, Any]) -> None:
    """Execute {"code": source} as `__main__`.

    Like the interpreter it waits at the end for threads that are no daemons, and calls what `atexit` was given.

    Ends with 1 after an exception, which goes to standard error, else with 0: a program that leaves by `sys.exit`, with
    whatever code, is judged by what it has written, as LiveCodeBench judges it.
    """
    sys.stdin = io.TextIOWrapper(open(0, "rb"), encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stdout = written = io.TextIOWrapper(open(1, "wb"), encoding="utf-8", errors="replace")  # noqa: SIM115
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.setrecursionlimit(50_000)
    code = 0
    try:
        exec(compile(payload["code"], "<program>", "exec"), module.__dict__)
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc(limit=-3)
        code = 1
    if threading := sys.modules.get("threading"):
        with contextlib.suppress(BaseException):
            threading._shutdown()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, written):  # the program may have put others in their places, or closed them
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
