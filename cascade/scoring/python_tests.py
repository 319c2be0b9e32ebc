"""Judging Python code by unit tests: the tests in one sandbox, the candidate in another, literals in between.

The candidate's process never holds tests or expected values, and what it returns reaches the tests as plain literals
alone. So objects that equal everything, frames, patched builtins, `os._exit(0)` and forged verdict lines reach nothing.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cascade.scoring.literals import from_line
from cascade.scoring.sandbox import Confined, Ended, Limits
from cascade.tasks import Outcome

CHECKER_EXTRA_CPU_S = 20.0
"""CPU seconds the tests' own process may take beyond the candidate's."""


@dataclass(frozen=True, slots=True)
class TestResult:
    """What the tests say: outcome, and what a person needs to mend the code."""

    __test__ = False
    outcome: Outcome
    evidence: str = ""
    cpu_seconds: float = 0.0


def run_tests(
    code: str,
    tests: str,
    *,
    setup: str = "",
    names: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> TestResult:
    """Run tests against code, each in a sandbox of its own.

    Args:
        code: the candidate; its top-level names can be called by the tests.
        tests: asserts or any program that raises when the candidate is wrong.
        setup: trusted code executed beside the tests first (imports, helper functions of the task).
        names: candidate's names that win over names of the setup (the entry point, say).
        aliases: name used in the tests -> candidate's name, e.g. {"candidate": "add"}.
        limits: for the candidate.

    Returns:
        "pass", "fail", "timeout", or "error" if the tests or the sandbox broke.

    Raises:
        SandboxError: the sandbox cannot be built here.
    """
    limits = limits or Limits()
    to_candidate, to_checker, verdict = os.pipe(), os.pipe(), os.pipe()
    payload = {"setup": setup, "tests": tests, "names": sorted(names), "aliases": dict(aliases or {})}
    opened = {*to_candidate, *to_checker, *verdict}
    checker_limits = replace(limits, cpu_seconds=limits.cpu_seconds + CHECKER_EXTRA_CPU_S)
    try:
        with (
            Confined(
                limits,
                roles=["literals", "candidate_role"],
                payload={"code": code},
                fds=(to_candidate[0], to_checker[1]),
            ) as candidate,
            Confined(
                checker_limits,
                roles=["literals", "checker_role"],
                payload=payload,
                fds=(to_candidate[1], to_checker[0], verdict[1]),
            ) as checker,
        ):
            for fd in (*to_candidate, *to_checker, verdict[1]):
                os.close(fd)
                opened.discard(fd)
            return _await_verdict(verdict[0], candidate, checker, limits)
    finally:
        for fd in opened:
            os.close(fd)


def _await_verdict(fd: int, candidate: Confined, checker: Confined, limits: Limits) -> TestResult:
    deadline = time.monotonic() + limits.wall
    line = b""
    while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                break
            line += chunk
    if not line.endswith(b"\n"):
        if time.monotonic() >= deadline:
            return TestResult("timeout", f"no end after {limits.wall:.0f} s of wall time: it sleeps or waits")
        ended = checker.wait(5.0)
        return TestResult("error", f"the tests' own process ended early ({ended.ending} {ended.code} {ended.detail})")
    report = from_line(line)
    ended = candidate.wait(1.0 if report["outcome"] != "gone" else 10.0)
    return _result(str(report["outcome"]), str(report["evidence"]), ended, limits)


def _result(outcome: str, evidence: str, ended: Ended, limits: Limits) -> TestResult:
    if ended.ending == "setup":
        return TestResult("error", f"the sandbox could not be built: {ended.detail}")
    if ended.ending == "cpu":
        return TestResult("timeout", f"over {limits.cpu_seconds:g} s of CPU time", ended.cpu_seconds)
    if outcome == "gone":
        reason = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        return TestResult("fail", f"{evidence} ({reason}, {ended.peak_bytes >> 20} MB)", ended.cpu_seconds)
    if outcome == "pass":
        return TestResult("pass", "", ended.cpu_seconds)
    return TestResult("error" if outcome == "error" else "fail", evidence, ended.cpu_seconds)
