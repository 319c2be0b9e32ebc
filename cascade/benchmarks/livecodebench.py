"""LiveCodeBench code generation: contest problems by date (Jain et al. 2024, arXiv 2403.07974).

Source: hub `livecodebench/code_generation_lite` (its JSON-lines files, without its loading script), or local files of
the same schema. Split rule: all problems are test tasks; `start` and `end` choose a window of contest dates, so that
a model is tested on what came after its training. Shots: 0. Metric: pass@1 over all public and private tests (the
accepted harness averages n = 10 samples at temperature 0.2 and top_p 0.95). Code is the text between the last two fence
lines, as the harness takes it today (its first releases took the first two).

Judged as lcb_runner/evaluation/testing_util.py does it: its imports and recursion limit, 6 s for each test; programs
that read standard input are compared line by line, as text and then as decimals, what they write to standard error is
nobody's concern, and leaving by `sys.exit` is no failure; functions, a method of `class Solution` or a bare one, are
compared by equality, with a tuple for a list. Three things differ. The 6 s are of CPU time, so that a busy host flips
no verdict. Memory is limited, to 4 GB of address space, where the harness has no limit. And a program runs as it
stands, as `__main__`; the harness makes it the body of a function, where one that says `global` may fail.

Options:
    path: file or folder; left out, the hub
    release: 1 to 6: files up to that release (default 6)
    start, end: contest dates, e.g. 2024-08-01; left out, open
    difficulties: list of easy, medium, hard; left out, all
"""

from __future__ import annotations

import base64
import binascii
import datetime
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from pydantic import Field

from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import only_split, shuffled
from cascade.benchmarks.sources import HubSource, hub_rows, local_rows, require
from cascade.config_sections import Section
from cascade.errors import ConfigError, DataError
from cascade.scoring.python_tests import TestResult, run_tests
from cascade.scoring.sandbox import Limits
from cascade.scoring.sandbox_programs import run_python
from cascade.tasks import Completion, Message, Split, Task, Verdict

REPO, REVISION = "livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
LIMITS = Limits(cpu_seconds=6.0, memory_bytes=4 << 30)
DIFFICULTIES = {"easy": 1, "medium": 2, "hard": 3}
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
FROM_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
IMPORTS = "\n".join(
    (
        *(f"from {name} import *" for name in (*_MODULES, "builtins", "typing")),
        *(f"import {name}" for name in _MODULES),
        "sys.setrecursionlimit(50000)",
        "sys.set_int_max_str_digits(50000)",
    )
)
"""What the harness puts before every answer, in its order: later names win over earlier ones."""
COLUMNS = {"question_id", "question_content", "contest_date", "difficulty", "starter_code", "metadata"}


_COMPARING = """
def listed(value):
    return list(value) if isinstance(value, tuple) else value

def shown(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
"""
_CALLS = """
for number, case in enumerate(cases, 1):
    gave = listed(cascade_call(*case["arguments"]))
    assert gave == case["wanted"], f"test {number}: {shown(case)}, gave {shown(gave)}"
"""
"""The tests of all problems that ask for a function; the cases are data: as code they would take long to compile."""


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    release: int = Field(6, ge=1, le=6)
    start: datetime.date | None = None
    end: datetime.date | None = None
    difficulties: list[Literal["easy", "medium", "hard"]] | None = None


class LiveCodeBench:
    """See the module's docstring."""

    name = "livecodebench"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The problems of the window."""
        chosen = parse_options(Options, options, self.name)
        only_split(self.name, split, "test")
        rows = local_rows(chosen.path) if chosen.path is not None else _released(chosen.release)
        require(rows, COLUMNS | {"public_test_cases", "private_test_cases"}, self.name)
        kept = [row for row in rows if _in_window(row, chosen)]
        if not kept:
            raise ConfigError("livecodebench has no problem in that window of dates and difficulties")
        return shuffled([_task(row, domain) for row in kept], seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """Run every test until one fails."""
        code = between_fences(completion.text)
        if code is None:
            return Verdict(task.id, completion.model, completion.modifier, "unparsed", "", "no fenced code")
        judge = _judge_function if task.reference["function"] else _judge_program
        result = judge(code, task.reference)
        return Verdict(task.id, completion.model, completion.modifier, result.outcome, code, result.evidence)

    def reference_answer(self, task: Task) -> str:
        """
        Raises:
            DataError: always; LiveCodeBench publishes no solutions.
        """
        raise DataError(f"{task.id}: LiveCodeBench publishes no solutions")


def between_fences(text: str) -> str | None:
    """The text between the last two lines that hold a fence, as the accepted harness takes it."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else None


def _released(release: int) -> list[dict[str, Any]]:
    names = ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, release + 1))]
    source = HubSource(REPO, REVISION, {name: name for name in names})
    return [row for name in names for row in hub_rows(source, name)]


def _in_window(row: Mapping[str, Any], options: Options) -> bool:
    given = str(row["contest_date"])
    try:
        date = datetime.date.fromisoformat(given[:10])
    except ValueError as error:
        raise DataError(f"livecodebench {row['question_id']}: contest_date {given!r} is no date") from error
    late = options.start is None or date >= options.start
    early = options.end is None or date <= options.end
    return late and early and (options.difficulties is None or row["difficulty"] in options.difficulties)


class _TextOnly(pickle.Unpickler):
    """Reads pickled text; refuses every class and function that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused: {module}.{name}")


def test_cases(stored: str) -> list[dict[str, str]]:
    """Test cases as stored: JSON text, or that text pickled, compressed and in base64.

    Raises:
        DataError: neither form.
    """
    try:
        return list(json.loads(stored))
    except ValueError:
        pass
    try:
        text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(stored)))).load()
        return list(json.loads(text))
    except (ValueError, TypeError, zlib.error, binascii.Error, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"livecodebench test cases cannot be read: {error}") from error


test_cases.__test__ = False  # type: ignore[attr-defined]


def _task(row: Mapping[str, Any], domain: str) -> Task:
    starter = row["starter_code"] or ""
    metadata = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
    form = f"{WITH_STARTER if starter else FROM_STDIN}\n```python\n{starter or '# YOUR CODE HERE'}\n```"
    prompt = f"### Question:\n{row['question_content']}\n\n### Format: {form}\n\n"
    prompt += "### Answer: (use the provided format with backticks)\n\n"
    cases = test_cases(row["public_test_cases"]) + test_cases(row["private_test_cases"])
    reference = {
        "inputs": [case["input"] for case in cases],
        "outputs": [case["output"] for case in cases],
        "function": (metadata or {}).get("func_name", "") if starter else "",
    }
    return Task(
        id=f"livecodebench/{row['question_id']}",
        benchmark="livecodebench",
        domain=domain,
        split="test",
        messages=(Message("system", SYSTEM), Message("user", prompt)),
        reference=reference,
        difficulty=DIFFICULTIES.get(row["difficulty"], 1),
        category=row["difficulty"],
        max_tokens=2000,
    )


def _judge_function(code: str, reference: Mapping[str, Any]) -> TestResult:
    """Calls of the function named, one line of input per argument, all on one instance."""
    name = reference["function"]
    owner = "Solution()." if "class Solution" in code else ""
    cases = [
        {"arguments": [json.loads(line) for line in given.split("\n") if line.strip()], "wanted": json.loads(wanted)}
        for given, wanted in zip(reference["inputs"], reference["outputs"], strict=True)
    ]
    each = LIMITS.cpu_seconds
    return run_tests(
        f"{IMPORTS}\n{code}\ncascade_call = {owner}{name}\n",
        _CALLS,
        setup=_COMPARING,
        data={"cases": cases},
        limits=replace(LIMITS, cpu_seconds=each * (len(cases) + 1), call_cpu_seconds=each),
    )


def _judge_program(code: str, reference: Mapping[str, Any]) -> TestResult:
    for number, (given, wanted) in enumerate(zip(reference["inputs"], reference["outputs"], strict=True), 1):
        output = run_python(f"{IMPORTS}\n{code}", given, LIMITS)
        if output.ended.ending == "setup":
            return TestResult("error", f"the sandbox could not be built: {output.ended.detail}")
        if output.ended.timed_out and not output.flooded:
            return TestResult("timeout", f"test {number} took over {LIMITS.cpu_seconds:g} s of CPU time, or waited")
        if output.ended.code != 0:
            return TestResult("fail", f"test {number} ended with code {output.ended.code}: {output.last_error}")
        if not same_output(output.text, wanted):
            shown = f"input {given[:200]!r}, expected {wanted[:200]!r}, wrote {output.text[:200]!r}"
            return TestResult("fail", f"test {number}: {shown}")
    return TestResult("pass")


def same_output(written: str, wanted: str) -> bool:
    """Equal line by line without blanks at the ends, as text or as decimals."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (written, wanted))
    return len(ours) == len(theirs) and all(a == b or _same_decimals(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_decimals(a: str, b: str) -> bool:
    try:
        return [Decimal(x) for x in a.split()] == [Decimal(x) for x in b.split()]
    except InvalidOperation:
        return False


BENCHMARK = LiveCodeBench()
