"""Users' own tasks: JSON lines, one task each, scored by what the line's `kind` says.

Source: a file, or a folder of `<split>.jsonl` files. Split rule: in a folder by the files' names,
then, as in a single file, by the lines' `split`. Shots: none of its own. Metric: share of tasks passed.

Every line has: id (unique in the file), kind, and prompt (text) or messages ([{role, content}, …]). Optional: split,
category, difficulty (1 is easiest), max_tokens. By kind:

    exact            answer: text or number, or a list of accepted ones. Compared as numbers where they are numbers,
                     else without regard to case, blanks beside marks, quotes around it and a final full stop.
    multiple_choice  choices: list of texts; answer: index, letter or text of the right one. The choices are put under
                     the prompt as (A), (B), …
    unit_tests       tests: Python asserts, or what pytest or unittest would call (one text or a list); optional setup
                     (trusted code run beside the tests), solution (a right answer), defines (list of names that the
                     answer must define; needed where the tests use more than one and there is no solution). The
                     answer is code, in a fence or alone; it runs in a sandbox, the tests in another, and plain values
                     (numbers, texts, lists, dicts, sets, tuples, exceptions) alone pass between them. So tests can not
                     call methods of an answer's objects, nor see what a function changes in place: ask for functions
                     that return what is tested. Helpers that the tests use must be imported by them or stand in setup.
    function         language: python (default) or javascript (runs under node); function: its name; cases: list of
                     {"args": [values], "returns": value}, compared as JSON values; optional solution. The answer is
                     code that defines the function; it runs in the sandbox.
    calls            functions: list of descriptions in JSON Schema (name, parameters.properties, parameters.required);
                     expected: list of {function: {parameter: [accepted values]}}, "" among them marks an optional one;
                     an empty list means that no function must be called.
    open             no exact scorer: a model judges the answer (config section `judge`); optional rubric, what makes an
                     answer good, and answer, a good one. For training alone: what is measured must be exact.

Loading refuses lines that nobody could pass, as far as that shows without running code: a right answer that its own
scorer does not take, tests that are no Python, that use names nobody defines, objects, or arguments changed in place.
Running every solution against its tests takes a fifth of a second each: `cascade check-tasks FILE` does it.

Options:
    path: file or folder; in a folder, files with the split among the words of their name (train.jsonl, train-2.jsonl)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cascade.benchmarks.function_calls import Judged, judge_calls, reference_calls
from cascade.benchmarks.jsonl_lines import LINES, Exact, Function, MultipleChoice, Open, UnitTests
from cascade.benchmarks.mbpp import SETUP
from cascade.benchmarks.offered_functions import with_functions
from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import shuffled
from cascade.benchmarks.sources import local_files, name_parts, read_rows
from cascade.config_sections import Section
from cascade.errors import ConfigError, DataError
from cascade.scoring.extraction import NUMBER, Reading, read_choice, read_number, read_text
from cascade.scoring.fences import read_code, read_javascript
from cascade.scoring.function_tests import run_cases
from cascade.scoring.python_tests import run_tests
from cascade.scoring.sandbox import Limits
from cascade.tasks import Completion, Message, Split, Task, Verdict

CHEAP = frozenset({"exact", "multiple_choice", "calls"})
"""Kinds whose right answers are scored when they are loaded."""


_TYPEWRITTEN = str.maketrans("“”„‘’−", '"""\'\'-')


class Options(Section):
    """What the config says under `options`."""

    path: str


class Jsonl:
    """See the module's docstring."""

    name = "jsonl"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The tasks of one split.

        Raises:
            DataError: names file, line and key of what breaks the schema.
        """
        path = parse_options(Options, options, self.name).path
        files = local_files(path)
        is_folder = Path(path).expanduser().is_dir()
        if is_folder:
            files = [f for f in files if split in name_parts(f)]
        tasks = [task for f in files for task in tasks_of(f, split, domain)]
        if not tasks:
            named = (
                f"in a folder only files named after the split are read: call one {split}.jsonl, or give a file as path"
            )
            raise ConfigError(
                f"{path} has no {split} tasks: {named if is_folder else f'give lines of it split: {split}'}"
            )
        return shuffled(tasks, seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """By the task's kind."""
        judge = {"exact": _exact, "multiple_choice": _choice, "unit_tests": _unit_tests, "calls": _calls}
        judge |= {"function": _function, "open": _open}
        outcome, answer, evidence = judge[task.reference["kind"]](task.reference, completion.text)
        return Verdict(task.id, completion.model, completion.modifier, outcome, answer, evidence)

    def reference_answer(self, task: Task) -> str:
        """A right answer, in the form asked for.

        Raises:
            DataError: a task that asks for code comes without its solution.
        """
        reference = task.reference
        if reference["kind"] == "exact":
            return str(reference["answers"][0])
        if reference["kind"] == "open":
            return str(reference["answer"])
        if reference["kind"] == "multiple_choice":
            return f"({chr(65 + reference['answer'])})"
        if reference["kind"] in {"unit_tests", "function"}:
            if not reference["solution"]:
                raise DataError(f"{task.id} has no solution; add one to the task file")
            return f"```{reference.get('language', 'python')}\n{reference['solution']}\n```"
        return reference_calls(reference["expected"], reference["functions"])


def tasks_of(file: Path, split: Split | None, domain: str) -> list[Task]:
    """The tasks of one file that belong to a split; all of them, lines without a split for training, if it is None.

    Raises:
        DataError: names file, line and key of what breaks the schema, or what cannot be solved.
    """
    tasks, seen = [], set[str]()
    for number, row in enumerate(read_rows(file), 1):
        try:
            line = LINES.validate_python(row)
        except ValidationError as error:
            problems = "; ".join(map(_problem, error.errors()))
            raise DataError(f"{file}, task {number} ({row.get('id', 'no id')}): {problems}") from None
        if str(line.id) in seen:
            raise DataError(f"{file}, task {number}: the id {line.id!r} appears twice")
        seen.add(str(line.id))
        if split is None or line.split in (None, split):
            tasks.append(_task(line, file, split or line.split or "train", domain))
            _require_solvable(tasks[-1], f"{file}, task {number} ({line.id})")
    return tasks


def _problem(error: Any) -> str:
    """One error of pydantic's: the key, and what is wrong with it. What concerns several keys names them itself."""
    key, said = ".".join(map(str, error["loc"][1:])), error["msg"].removeprefix("Value error, ")
    return said if len(error["loc"]) == 1 else f"{key or 'kind'}: {said}"


def _require_solvable(task: Task, where: str) -> None:
    """
    Raises:
        DataError: the task's own right answer does not pass, where that is cheap to know.
    """
    if task.reference["kind"] in CHEAP:
        answer = BENCHMARK.reference_answer(task)
        verdict = BENCHMARK.score(task, Completion(task.id, "reference", "", answer))
        if not verdict.passed:
            why = verdict.evidence or verdict.outcome
            raise DataError(f"{where}: its own right answer, {answer[:200]!r}, does not pass: {why}")


def _task(line: Any, file: Path, split: Split, domain: str) -> Task:
    messages, reference = line.conversation(), {"kind": line.kind}
    if isinstance(line, Exact):
        reference["answers"] = line.accepted()
    elif isinstance(line, MultipleChoice):
        lettered = "\n".join(f"({chr(65 + i)}) {c}" for i, c in enumerate(line.choices))
        messages[-1] = Message("user", f"{messages[-1].content}\n{lettered}")
        reference |= {"choices": line.choices, "answer": line.index()}
    elif isinstance(line, Open):
        if split != "train":
            raise DataError(f"{file}: {line.id} is of the kind open, which can only be trained on, not in {split}")
        reference |= {"rubric": line.rubric, "answer": line.answer}
    elif isinstance(line, UnitTests):
        reference |= {"tests": line.tests, "setup": line.setup, "solution": line.solution, "defines": line.names()}
    elif isinstance(line, Function):
        reference |= {"language": line.language, "function": line.function, "solution": line.solution}
        reference["cases"] = [case.model_dump() for case in line.cases]
    else:
        reference |= {"functions": line.functions_as_scored(), "expected": line.expected}
        messages = with_functions(messages, json.dumps(line.functions_as_offered(), indent=4))
    return Task(
        id=f"jsonl/{file.name.split('.')[0]}/{line.id}",
        benchmark="jsonl",
        domain=domain,
        split=split,
        messages=tuple(messages),
        reference=reference,
        difficulty=line.difficulty,
        category=line.category or line.kind,
        max_tokens=line.max_tokens,
    )


def _same(answer: str, accepted: str) -> bool:
    if NUMBER.fullmatch(answer) and NUMBER.fullmatch(accepted):
        try:
            return Decimal(answer.replace(",", "")) == Decimal(accepted.replace(",", ""))
        except InvalidOperation:
            return False
    return _words(answer) == _words(accepted)


def _words(text: str) -> str:
    """Without regard to case, typographic marks, blanks beside marks, and quotes and a full stop around it."""
    plain = re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.translate(_TYPEWRITTEN).casefold().split()))
    return plain.strip("\"'").rstrip(".").strip("\"'") or plain


def _exact(reference: Any, text: str) -> Judged:
    answers = [str(a) for a in reference["answers"]]
    bare = text.strip()
    numeric = all(NUMBER.fullmatch(a) for a in answers)

    def accepted(spelled: str) -> bool:
        return any(_same(spelled, a) for a in answers)

    reading = read_number(text) if numeric else read_text(text, accepted)
    if accepted(bare):
        reading = Reading(bare, "whole text", (bare,))
    if reading.ambiguous:
        return "fail", "", f"several different answers: {', '.join(reading.candidates[:6])}"
    if reading.answer is None:
        return "unparsed", "", "no answer found"
    if accepted(reading.answer):
        return "pass", reading.answer, ""
    return "fail", reading.answer, f"expected {answers[0]!r}"


def _choice(reference: Any, text: str) -> Judged:
    options = {chr(65 + i): c for i, c in enumerate(reference["choices"])}
    reading = read_choice(text, options)
    if reading.ambiguous:
        return "fail", "", f"several different answers: {', '.join(reading.candidates)}"
    if reading.answer is None:
        return "unparsed", "", "no choice named"
    right = chr(65 + reference["answer"])
    return ("pass", right, "") if reading.answer == right else ("fail", reading.answer, f"expected ({right})")


def _unit_tests(reference: Any, text: str) -> Judged:
    names = reference.get("defines", [])
    code = _program(text, names)
    if code is None:
        return "unparsed", "", f"no Python code that defines {', '.join(names)} found"
    setup = f"{SETUP}\n{reference['setup']}"
    result = run_tests(code, reference["tests"], setup=setup, names=names, limits=Limits())
    return result.outcome, code, result.evidence


def _program(text: str, names: list[str]) -> str | None:
    """The code that defines all the names; where they stand in several fences, the last definition of each holds."""
    if not names:
        return read_code(text)
    programs = {name: read_code(text, name) for name in names}
    found = [code for code in programs.values() if code is not None]
    if len(found) < len(programs):
        return None
    where = {n: max(m.start() for m in re.finditer(rf"\b{re.escape(n)}\b", text)) for n in names}
    return "\n\n".join(dict.fromkeys(programs[name] or "" for name in sorted(names, key=where.__getitem__)))


def _function(reference: Any, text: str) -> Judged:
    name, language = reference["function"], reference["language"]
    code = read_code(text, name) if language == "python" else read_javascript(text, name)
    if code is None:
        return "unparsed", "", f"no {language} code that defines {name} found"
    result = run_cases(code, language, name, reference["cases"], Limits())
    return result.outcome, code, result.evidence


def _calls(reference: Any, text: str) -> Judged:
    return judge_calls(text, reference["expected"], reference["functions"])


def _open(reference: Any, text: str) -> Judged:
    """No scorer: says nothing of the answer."""
    return "error", "", "this task has no exact scorer"


BENCHMARK = Jsonl()
