"""Users' own tasks: JSON lines, one task each, scored by what the line's `kind` says.

Source: a file, or a folder of `<split>.jsonl` files. Split rule: by file, or by the line's
`split`. Shots: none of its own. Metric: share of tasks passed.

Every line has: id (unique in the file), kind, and prompt (text) or messages ([{role, content}, …]). Optional: split,
category, difficulty (1 is easiest), max_tokens. By kind:

    exact            answer: text or number, or a list of accepted ones. Compared as numbers where they are numbers,
                     else without regard to case, blanks and a final full stop.
    multiple_choice  choices: list of texts; answer: index, letter or text of the right one. The choices are put under
                     the prompt as (A), (B), …
    unit_tests       tests: Python asserts (one text or a list); optional setup (trusted code run beside the
                     tests), solution (a right answer). The answer is code, in a fence or alone; it runs in the sandbox.
    function         language: python (default) or javascript (runs under node); function: its name; cases: list of
                     {"args": [values], "returns": value}, compared as JSON values; optional solution. The answer is
                     code that defines the function; it runs in the sandbox.
    calls            functions: list of descriptions in JSON Schema (name, parameters.properties, parameters.required);
                     expected: list of {function: {parameter: [accepted values]}}, "" among them marks an optional one;
                     an empty list means that no function must be called.
    open             no exact scorer: a model judges the answer (config section `judge`); optional rubric, what makes an
                     answer good, and answer, a good one. For training alone: what is measured must be exact.

Options:
    path: file or folder; in a folder, files whose name holds the split's
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from cascade.benchmarks.function_calls import Judged, judge_calls, reference_calls
from cascade.benchmarks.mbpp import SETUP
from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import shuffled
from cascade.benchmarks.sources import local_files, read_rows
from cascade.config_sections import Section
from cascade.errors import ConfigError, DataError
from cascade.scoring.calls import PYTHON_TYPES
from cascade.scoring.extraction import Reading, read_choice, read_number, read_text
from cascade.scoring.fences import read_code, read_javascript
from cascade.scoring.function_tests import run_cases
from cascade.scoring.python_tests import run_tests
from cascade.scoring.sandbox import Limits
from cascade.tasks import Completion, Message, Split, Task, Verdict

CALLS_PROMPT = """You can call these functions (JSON descriptions):
{functions}

Answer with the calls alone, in the form [function(parameter=value, ...), ...]. If none fits, say so in a sentence."""
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


class _Line(BaseModel):
    """What all kinds have."""

    model_config = ConfigDict(extra="forbid")

    id: str | int
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    split: Split | None = None
    category: str = ""
    difficulty: int = Field(1, ge=1)
    max_tokens: int = Field(256, gt=0)

    @model_validator(mode="after")
    def _asks_something(self) -> _Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        for message in self.messages or ():
            if set(message) != {"role", "content"}:
                raise ValueError("each message has exactly the keys role and content")
        return self

    def conversation(self) -> list[Message]:
        if self.messages is not None:
            return [Message(**m) for m in self.messages]
        return [Message("user", self.prompt or "")]


class Exact(_Line):
    kind: Literal["exact"]
    answer: str | int | float | list[str | int | float]


class MultipleChoice(_Line):
    kind: Literal["multiple_choice"]
    choices: list[str] = Field(min_length=2, max_length=26)
    answer: int | str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> MultipleChoice:
        self.index()
        return self

    def index(self) -> int:
        """Position of the right choice."""
        letters = [chr(65 + i) for i in range(len(self.choices))]
        if isinstance(self.answer, str):
            for names in (letters, self.choices):
                if self.answer in names:
                    return names.index(self.answer)
        elif 0 <= self.answer < len(self.choices):
            return self.answer
        raise ValueError(f"answer {self.answer!r} is no index, letter or text of the choices")


class UnitTests(_Line):
    kind: Literal["unit_tests"]
    tests: str | list[str]
    setup: str = ""
    solution: str = ""
    max_tokens: int = Field(512, gt=0)

    @field_validator("tests")
    @classmethod
    def _joined(cls, tests: str | list[str]) -> str:
        return tests if isinstance(tests, str) else "\n".join(tests)


class FunctionCase(BaseModel):
    model_config = ConfigDict(extra="forbid")

    args: list[Any]
    returns: Any


class Function(_Line):
    kind: Literal["function"]
    language: Literal["python", "javascript"] = "python"
    function: str = Field(pattern=r"^[A-Za-z_$][\w$]*$")
    cases: list[FunctionCase] = Field(min_length=1)
    solution: str = ""
    max_tokens: int = Field(512, gt=0)


class Calls(_Line):
    kind: Literal["calls"]
    functions: list[dict[str, Any]] = Field(min_length=1)
    expected: list[dict[str, dict[str, list[Any]]]]

    @model_validator(mode="after")
    def _functions_are_known(self) -> Calls:
        names = {f.get("name") for f in self.functions}
        for function in self.functions:
            if not isinstance(function.get("parameters", {}).get("properties"), dict):
                raise ValueError("each function needs name and parameters.properties")
        for call in self.expected:
            if len(call) != 1 or not set(call) <= names:
                raise ValueError(f"each expected call names one of the functions {sorted(map(str, names))}")
        self.functions_as_scored()
        return self

    def functions_as_scored(self) -> list[dict[str, Any]]:
        """The functions with the types of their parameters as `match_calls` names them."""
        functions = copy.deepcopy(self.functions)
        for function in functions:
            for name, schema in function["parameters"]["properties"].items():
                where = f"parameter {name} of {function['name']}"
                schema["type"] = _scored_type(schema.get("type"), where)
                if schema["type"] in ("array", "tuple"):
                    items = schema.get("items") or {}
                    schema["items"] = {**items, "type": _scored_type(items.get("type"), f"items of {where}")}
        return functions


def _scored_type(declared: Any, where: str) -> str:
    """A type of JSON Schema by BFCL's name for it."""
    known = {"number": "float", "object": "dict"} | {name: name for name in PYTHON_TYPES}
    if not isinstance(declared, str) or declared not in known:
        raise ValueError(f"{where} has the type {declared!r}; allowed are {', '.join(known)}")
    return known[declared]


class Open(_Line):
    kind: Literal["open"]
    rubric: str = ""
    answer: str = ""


_LINES: TypeAdapter[Any] = TypeAdapter(
    Annotated[Exact | MultipleChoice | UnitTests | Function | Calls | Open, Field(discriminator="kind")]
)


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
        if Path(path).expanduser().is_dir():
            files = [f for f in files if split in f.name.split(".")[0]]
        tasks = [task for f in files for task in _tasks(f, split, domain)]
        if not tasks:
            raise ConfigError(f"{path} has no {split} tasks: name files after the split or set the lines' split")
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


def _tasks(file: Path, split: Split, domain: str) -> list[Task]:
    tasks, seen = [], set[str]()
    for number, row in enumerate(read_rows(file), 1):
        try:
            line = _LINES.validate_python(row)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'kind'}: {e['msg']}" for e in error.errors())
            raise DataError(f"{file}, task {number} ({row.get('id', 'no id')}): {problems}") from None
        if str(line.id) in seen:
            raise DataError(f"{file}, task {number}: the id {line.id!r} appears twice")
        seen.add(str(line.id))
        if line.split is None or line.split == split:
            tasks.append(_task(line, file, split, domain))
    return tasks


def _task(line: Any, file: Path, split: Split, domain: str) -> Task:
    messages, reference = line.conversation(), {"kind": line.kind}
    if isinstance(line, Exact):
        reference["answers"] = line.answer if isinstance(line.answer, list) else [line.answer]
    elif isinstance(line, MultipleChoice):
        lettered = "\n".join(f"({chr(65 + i)}) {c}" for i, c in enumerate(line.choices))
        messages[-1] = Message("user", f"{messages[-1].content}\n{lettered}")
        reference |= {"choices": line.choices, "answer": line.index()}
    elif isinstance(line, Open):
        if split != "train":
            raise DataError(f"{file}: {line.id} is of the kind open, which can only be trained on, not in {split}")
        reference |= {"rubric": line.rubric, "answer": line.answer}
    elif isinstance(line, UnitTests):
        reference |= {"tests": line.tests, "setup": line.setup, "solution": line.solution}
    elif isinstance(line, Function):
        reference |= {"language": line.language, "function": line.function, "solution": line.solution}
        reference["cases"] = [case.model_dump() for case in line.cases]
    else:
        reference |= {"functions": line.functions_as_scored(), "expected": line.expected}
        described = CALLS_PROMPT.format(functions=json.dumps(line.functions, ensure_ascii=False))
        messages.insert(0, Message("system", described))
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
    return " ".join(text.casefold().split()).rstrip(".").strip("\"'")


def _exact(reference: Any, text: str) -> Judged:
    answers = [str(a) for a in reference["answers"]]
    bare = text.strip()
    numeric = all(NUMBER.fullmatch(a) for a in answers)
    reading = read_number(text) if numeric else read_text(text)
    if any(_same(bare, a) for a in answers):
        reading = Reading(bare, "whole text", (bare,))
    if reading.ambiguous:
        return "fail", "", f"several different answers: {', '.join(reading.candidates[:6])}"
    if reading.answer is None:
        return "unparsed", "", "no answer found"
    if any(_same(reading.answer, a) for a in answers):
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
    code = read_code(text)
    if code is None:
        return "unparsed", "", "no Python code found"
    setup = f"{SETUP}\n{reference['setup']}"
    result = run_tests(code, reference["tests"], setup=setup, limits=Limits())
    return result.outcome, code, result.evidence


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
