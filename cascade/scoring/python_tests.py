"""Judging Python code by unit tests: the tests in one sandbox, the candidate in another, literals in between.

The candidate's process never holds tests or expected values, and what it returns reaches the tests as plain literals
alone. So objects that equal everything, frames, patched builtins, `os._exit(0)` and forged verdict lines reach nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cascade.scoring.literals import ANSWERED, from_line
from cascade.scoring.sandbox import STEP_S, Confined, Ended, Limits, Patience
from cascade.tasks import Outcome

CHECKER_CPU_S = 10.0
"""CPU seconds that the tests' own process may take, most of which only a hostile answer can make it need."""
CHECKER_CPU_S_PER_MB = 1.0
"""And for each MB of data that the tests bring: ten times what passing it on and comparing takes."""
GRACE_S = 2.0
"""Seconds for a candidate that no longer answers to end by itself, so that one can say why."""


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
    data: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
) -> TestResult:
    """Run tests against code, each in a sandbox of its own.

    Args:
        code: the candidate; its top-level names can be called by the tests.
        tests: asserts or any program that raises when the candidate is wrong.
        setup: trusted code executed beside the tests first (imports, helper functions of the task).
        names: candidate's names that win over names of the setup (the entry point, say).
        aliases: name used in the tests -> candidate's name, e.g. {"candidate": "add"}.
        data: name used in the tests -> its value, as JSON has it. Large values belong here: literals in the tests take
            their own CPU time to be compiled.
        limits: for the candidate.

    Returns:
        "pass", "fail", "timeout", or "error" if the tests or the sandbox broke.

    Raises:
        SandboxError: the sandbox cannot be built here.
    """
    limits = limits or Limits()
    to_candidate, to_checker, verdict, go_on = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    payload = {
        "setup": setup,
        "tests": tests,
        "names": sorted(names),
        "aliases": dict(aliases or {}),
        "data": dict(data or {}),
        "announce": limits.call_cpu_seconds is not None,
    }
    opened = {*to_candidate, *to_checker, *verdict, *go_on}
    try:
        with (
            Confined(
                limits,
                roles=["literals", "candidate_role"],
                payload={"code": code},
                fds=(to_candidate[0], to_checker[1]),
            ) as candidate,
            Confined(
                replace(limits, cpu_seconds=_checker_cpu_s(data or {})),
                roles=["literals", "checker_role"],
                payload=payload,
                fds=(to_candidate[1], to_checker[0], verdict[1]),
                streams=(go_on[0], None, None),
            ) as checker,
        ):
            for fd in (*to_candidate, *to_checker, verdict[1], go_on[0]):
                os.close(fd)
                opened.discard(fd)
            return _Trial(candidate, checker, limits, go_on[1]).verdict(verdict[0])
    finally:
        for fd in opened:
            os.close(fd)


def _checker_cpu_s(data: Mapping[str, Any]) -> float:
    return CHECKER_CPU_S + CHECKER_CPU_S_PER_MB * len(json.dumps(dict(data))) / 1e6


class _Trial:
    """A candidate and the process that tests it, until there is a verdict."""

    def __init__(self, candidate: Confined, checker: Confined, limits: Limits, go_on: int) -> None:
        """`go_on`: file descriptor on which the tests wait after an answer that they announce."""
        self.candidate, self.checker, self.limits, self.go_on = candidate, checker, limits, go_on
        self.answered_at, self.slow_call = 0.0, False

    def verdict(self, fd: int) -> TestResult:
        """What the tests' process writes to `fd`, unless a limit is reached first or shows in the final account."""
        line = self._last_line(fd)
        report = from_line(line) if line.endswith(b"\n") else None
        checker = self.checker.end() if report is None else None  # first: the candidate's end would tell it something
        gone = report is not None and report["outcome"] == "gone"  # its own end tells why, which takes a moment
        candidate = self.candidate.wait(GRACE_S) if gone else self.candidate.end()
        self._look_at_call(candidate.cpu_seconds)
        if reached := self._limit_reached(candidate):
            return reached
        if checker is not None:
            return _without_verdict(checker, candidate)
        assert report is not None
        return _result(str(report["outcome"]), str(report["evidence"]), candidate)

    def _last_line(self, fd: int) -> bytes:
        """The verdict's line; what there is of it if no more comes in time."""
        patience, line = Patience(self.limits.wall, self.candidate, self.checker), b""
        while not self.slow_call and (left := patience.left()) > 0 and not line.endswith(b"\n"):
            if select.select([fd], [], [], min(left, STEP_S))[0]:
                chunk = os.read(fd, 1 << 16)
                if not chunk:
                    break
                line += chunk
            self._look_at_call(used := self.candidate.cpu_seconds())
            if line == ANSWERED:
                self.answered_at, line = used, b""
                with contextlib.suppress(
                    BrokenPipeError
                ):  # the tests' process has just ended; it said why, or will not
                    os.write(self.go_on, b"\n")
        return line

    def _look_at_call(self, used: float) -> None:
        limit = self.limits.call_cpu_seconds
        self.slow_call |= limit is not None and used - self.answered_at >= limit

    def _limit_reached(self, ended: Ended) -> TestResult | None:
        if ended.ending == "setup":
            return TestResult("error", f"the sandbox could not be built: {ended.detail}")
        if ended.ending == "cpu":
            return TestResult("timeout", f"over {self.limits.cpu_seconds:g} s of CPU time", ended.cpu_seconds)
        if self.slow_call:
            each = f"a call took over {self.limits.call_cpu_seconds:g} s of CPU time"
            return TestResult("timeout", each, ended.cpu_seconds)
        return None


def _without_verdict(checker: Ended, candidate: Ended) -> TestResult:
    """The tests' process was ended, or ended without a word: for what it was given to judge, or for its own sake."""
    used = candidate.cpu_seconds
    if checker.ending == "cpu":
        return TestResult("timeout", f"its answers made the tests compute for {checker.cpu_seconds:.0f} s", used)
    if checker.ending == "wall":
        return TestResult("timeout", "no end in time: it sleeps or waits", used)
    if checker.code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
        return TestResult("fail", "its answers brought the tests' own process down", used)
    reason = f"{checker.ending} {checker.code} {checker.detail}".strip()
    return TestResult("error", f"the tests' own process ended early ({reason})")


def _result(outcome: str, evidence: str, ended: Ended) -> TestResult:
    if outcome == "gone":
        reason = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        return TestResult("fail", f"{evidence} ({reason}, {ended.peak_bytes >> 20} MB)", ended.cpu_seconds)
    if outcome == "pass":
        return TestResult("pass", "", ended.cpu_seconds)
    return TestResult("error" if outcome == "error" else "fail", evidence, ended.cpu_seconds)
