"""Runs inside a sandbox of its own: the tests. It calls the candidate in the other sandbox and judges literals.

Loaded by `sandbox_launcher` after `literals` in one namespace; standard library alone. Names that the tests use and
neither define nor import belong to the candidate: they become `_Function`s, which can be called and passed on.
"""

from __future__ import annotations

import ast
import builtins
import os
import sys
from typing import Any

if __name__ != "sandboxed_role":
    from cascade.scoring.literals import ANSWERED, decode, encode, from_line, to_line

MAX_LINE = 64 * 2**20
"""Longest answer read, in bytes."""
_STEERING = (StopIteration, StopAsyncIteration)
"""Exceptions that loops and `map` take for an end: raised by a candidate, they would skip what is left of the tests."""


class CandidateGone(BaseException):
    """The candidate's process has ended or no longer speaks the protocol: no test can go on."""


class CandidateError(Exception):
    """The candidate raised something that is no builtin exception."""


def _refuse(value: Any) -> Any:
    raise TypeError(f"only literals and the candidate's own values can be passed to it, not {type(value).__name__}")


class _Channel:
    """Calls over a pair of pipes, one line each way.

    Attributes:
        gone: why there is nobody to answer any more; tests that catch everything cannot hide it.
    """

    def __init__(self, requests: int, answers: int, verdict: int | None = None) -> None:
        """`verdict`: where to announce every answer, so that its time is taken while nobody computes; None: nowhere."""
        self.requests, self.answers, self.verdict = requests, os.fdopen(answers, "rb"), verdict
        self.gone: CandidateGone | None = None

    def receive(self) -> dict[str, Any]:
        line = self.answers.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise self._lost("the candidate's process ended" if len(line) < MAX_LINE else "an answer is too long")
        if self.verdict is not None:
            os.write(self.verdict, ANSWERED)
            os.read(0, 1)
        try:
            return from_line(line)
        except (ValueError, RecursionError) as error:
            raise self._lost(f"the candidate broke the protocol: {error}") from None

    def _lost(self, reason: str) -> CandidateGone:
        self.gone = self.gone or CandidateGone(reason)
        return self.gone

    def call(self, key: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        message = {
            "call": key,
            "args": [_encode(a) for a in args],
            "kwargs": {k: _encode(v) for k, v in kwargs.items()},
        }
        view = memoryview(to_line(message))
        try:
            while view:
                view = view[os.write(self.requests, view) :]
        except BrokenPipeError:
            raise self._lost("the candidate's process ended") from None
        reply = self.receive()
        if "raised" in reply:
            raise _exception(reply)
        try:
            return decode(reply["value"], lambda k: _Function(self, k))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise self._lost(f"the candidate broke the protocol: {error!r}") from None


def _encode(value: Any) -> Any:
    return value.encoded() if type(value) is _Function else encode(value, _keep_function)


def _keep_function(value: Any) -> Any:
    return value.encoded() if type(value) is _Function else _refuse(value)


class _Function:
    """A name or a kept object of the candidate. Equal to nothing but itself; has no attributes to read."""

    __slots__ = ("_channel", "_key")

    def __init__(self, channel: _Channel, key: str | int) -> None:
        self._channel, self._key = channel, key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.call(self._key, args, kwargs)

    def encoded(self) -> dict[str, Any]:
        return {"$": "remote", "v": self._key}

    def __bool__(self) -> bool:
        raise TypeError("the candidate returned no plain value; its truth cannot be judged")


def _exception(reply: dict[str, Any]) -> BaseException:
    """The candidate's exception as the nearest builtin one; those that steer loops or end processes as no such one."""
    text = str(reply.get("text", ""))
    for name in reply["raised"] if isinstance(reply["raised"], list) else ():
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, _STEERING):
            break
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(str(reply.get("message", text)))
            except TypeError:  # e.g. UnicodeDecodeError wants five arguments
                break
    return CandidateError(text)


def free_names(source: str, known: set[str]) -> set[str]:
    """Names that a program reads and neither binds nor finds among `known`."""
    read: set[str] = set()
    bound: set[str] = set(known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound


def _location(error: BaseException, source: str) -> str:
    """The last line of the tests that was running."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    return lines[line - 1].strip()[:300] if 0 < line <= len(lines) else ""


def _run(payload: dict[str, Any], channel: _Channel) -> dict[str, Any]:
    first = channel.receive()
    if not first.get("ready"):
        return {"outcome": "fail", "evidence": f"the code cannot be executed: {first.get('text', '')}"}
    space: dict[str, Any] = {"__name__": "__tests__"}
    exec(compile(payload["setup"], "<setup>", "exec"), space)
    space |= payload["data"]
    program = payload["tests"]
    candidate_names = free_names(program, set(dir(builtins)) | set(space)) | set(payload["names"]) - set(
        payload["data"]
    )
    space |= {name: _Function(channel, name) for name in candidate_names}
    space |= {alias: _Function(channel, name) for alias, name in payload["aliases"].items()}
    try:
        exec(compile(program, "<tests>", "exec"), space)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        return {"outcome": "fail", "evidence": f"{_location(error, program)}\n{text}".strip()[:800]}
    if channel.gone is not None:
        raise channel.gone
    return {"outcome": "pass", "evidence": ""}


def main(payload: dict[str, Any], requests: int, answers: int, verdict: int) -> None:
    """Run the tests and write one line with the outcome.

    Args:
        payload: {"setup": trusted code run here first, "data": names of the tests' own and their values, which no name
            of the candidate replaces, "tests": code, "names": the candidate's names that shadow the
            setup's, "aliases": name in the tests -> candidate's name, "announce": whether to write `ANSWERED` to
            `verdict` after every answer and to wait for a byte on standard input}.
        requests, answers: file descriptors to the candidate.
        verdict: file descriptor for the outcome.
    """
    sys.setrecursionlimit(20_000)
    try:
        report = _run(payload, _Channel(requests, answers, verdict if payload["announce"] else None))
    except CandidateGone as error:
        report = {"outcome": "gone", "evidence": str(error)}
    except BaseException as error:
        report = {"outcome": "error", "evidence": f"the tests themselves broke: {type(error).__name__}: {error}"}
    os.write(verdict, to_line(report))
    os._exit(0)
