"""Runs inside a sandbox: the code under test. It defines what it defines and answers calls with literals.

Loaded by `sandbox_launcher` after `literals` in one namespace; standard library alone. Nothing of the checker is in
this process: no tests, no expected values.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

if __name__ != "sandboxed_role":
    from cascade.scoring.literals import decode, encode, from_line, to_line


class _Candidate:
    """The candidate's module and the objects that calls have left behind."""

    def __init__(self, code: str) -> None:
        self.module = types.ModuleType("candidate")  # not __main__: what follows that guard is no part of the answer
        self.kept: list[Any] = []
        sys.modules["candidate"] = self.module
        exec(compile(code, "<candidate>", "exec"), self.module.__dict__)

    def keep(self, value: Any) -> Any:
        self.kept.append(value)
        return {"$": "remote", "v": len(self.kept) - 1}

    def fetch(self, key: str | int) -> Any:
        return self.kept[key] if isinstance(key, int) else self.module.__dict__[key]

    def call(self, message: dict[str, Any]) -> dict[str, Any]:
        function = self.fetch(message["call"])
        arguments = [decode(a, self.fetch) for a in message["args"]]
        keywords = {k: decode(v, self.fetch) for k, v in message["kwargs"].items()}
        return {"value": encode(function(*arguments, **keywords), self.keep)}


def _failure(error: BaseException) -> dict[str, Any]:
    names = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
    text = str(error)[:500]
    return {"raised": names, "message": text, "text": f"{type(error).__name__}: {text}"}


def main(payload: dict[str, Any], requests: int, answers: int) -> None:
    """Define the candidate, then answer one call per line until the other side closes.

    Args:
        payload: {"code": source to execute}.
        requests: file descriptor to read calls from.
        answers: file descriptor to write to; its first line says whether the code could be executed.
    """
    sys.setrecursionlimit(5000)
    with os.fdopen(requests, "rb") as incoming:
        try:
            candidate = _Candidate(payload["code"])
            reply: dict[str, Any] = {"ready": True}
        except BaseException as error:
            reply = _failure(error)
        _write(answers, to_line(reply))
        for line in incoming if "ready" in reply else ():
            try:
                reply = candidate.call(from_line(line))
                data = to_line(reply)
            except BaseException as error:
                data = to_line(_failure(error))
            _write(answers, data)
    os._exit(0)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
