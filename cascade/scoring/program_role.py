"""Runs inside a sandbox: a whole program that reads standard input and writes standard output.

Loaded by `sandbox_launcher`; standard library alone.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import types
from typing import Any


def main(payload: dict[str, Any]) -> None:
    """Execute {"code": source} as `__main__`; ends with its exit code, 1 after an exception."""
    sys.stdin = io.TextIOWrapper(open(0, "rb"), encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb"), encoding="utf-8", errors="replace")  # noqa: SIM115
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.setrecursionlimit(50_000)
    code = 0
    try:
        exec(compile(payload["code"], "<program>", "exec"), module.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc(limit=-3, file=sys.stdout)
        code = 1
    sys.stdout.flush()
    os._exit(code)
