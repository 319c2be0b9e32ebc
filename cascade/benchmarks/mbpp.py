"""MBPP: short Python functions from a sentence and three asserts (Austin et al. 2021, arXiv 2108.07732).

Source: hub `google-research-datasets/mbpp`, configuration "full" (CC-BY-4.0), or a local file or folder in its schema
or as published (`mbpp.jsonl`). Split rule, by task id as published: test 11-510, validation 511-600, train 601-974;
ids 1-10 are prompts alone. Shots: 3, ids 2, 3 and 4. Metric: pass@1, all asserts hold.

In completion form the answer is run as it is, as lm-evaluation-harness does: a fence in it is a syntax error there and
here. Two things are milder than there: `test_setup_code` is executed (of the test split, id 367 alone has any, and
cannot be solved without), and names of `SETUP` that the asserts use need no import by the answer. In chat form the code
is read from the answer's fences.

Options:
    path: file or folder; left out, the hub.
    form: completion | chat
    shots: 0 to 3
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import shuffled
from cascade.benchmarks.sources import HubSource, chosen_files, hub_rows, read_rows, require
from cascade.config_sections import Section
from cascade.errors import DataError
from cascade.scoring.fences import read_code
from cascade.scoring.python_tests import run_tests
from cascade.scoring.sandbox import Limits
from cascade.tasks import Completion, Message, Split, Task, Verdict

HUB = HubSource("google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", {"all": "full/"})
IDS: dict[Split, range] = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
SHOT_IDS = (2, 3, 4)
LIMITS = Limits(cpu_seconds=15.0)


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    form: Literal["completion", "chat"] = "completion"
    shots: int = Field(3, ge=0, le=3)


class Mbpp:
    """See the module's docstring."""

    name = "mbpp"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The tasks of the split's ids."""
        chosen = parse_options(Options, options, self.name)
        by_id = _rows_by_id(chosen.path)
        examples = [by_id[i] for i in SHOT_IDS if i in by_id][: chosen.shots]
        tasks = [_task(by_id[i], split, domain, chosen.form, examples) for i in IDS[split] if i in by_id]
        return shuffled(tasks, seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """Run the task's asserts."""
        found = _code(completion.text, task.reference["tests"])
        code = completion.text.replace("\r\n", "\n") if task.form == "completion" else found
        if code is None or not code.strip():
            return Verdict(task.id, completion.model, completion.modifier, "unparsed", "", _NOTHING)
        setup = task.reference["setup"]
        result = run_tests(
            f"{code}\n{setup}",
            "\n".join(task.reference["tests"]),
            setup=SETUP,
            names=_defined(task.reference["code"]),
            limits=LIMITS,
        )
        if found is None and result.outcome == "fail":
            return Verdict(task.id, completion.model, completion.modifier, "unparsed", "", _NOTHING)
        return Verdict(task.id, completion.model, completion.modifier, result.outcome, code, result.evidence)

    def reference_answer(self, task: Task) -> str:
        """The published solution, in the form that the examples show."""
        code: str = task.reference["code"]
        return f"{code}\n" if task.form == "completion" else f"```python\n{code}\n```"


def _rows_by_id(path: str | None) -> dict[int, Mapping[str, Any]]:
    """
    Raises:
        DataError: a row breaks the schema.
    """
    if path is None:
        sources = {"mbpp": hub_rows(HUB, "all")}
    else:
        sources = {str(f): read_rows(f) for f in chosen_files(path, without="sanitized")}
    by_id: dict[int, Mapping[str, Any]] = {}
    for where, rows in sources.items():
        require(rows, {"task_id", "text", "code", "test_list"}, where)
        for number, row in enumerate(rows, 1):
            if isinstance(row["task_id"], bool) or not re.fullmatch(r"\d+", str(row["task_id"])):
                raise DataError(f"{where}, row {number}: task_id {row['task_id']!r} must be a whole number")
            texts = all(isinstance(row[key], str) for key in ("text", "code"))
            if not texts or not _are_texts(row["test_list"]) or not isinstance(row.get("test_setup_code") or "", str):
                raise DataError(
                    f"{where}, row {number} (task_id {row['task_id']}): text, code and test_setup_code must be texts, "
                    "and test_list a list of one assert or more"
                )
            by_id[int(row["task_id"])] = row
    return by_id


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


SETUP = "import math, collections, re, cmath, sys"
_NOTHING = "no Python code that defines the function under test found"


def tested_names(tests: list[str]) -> list[str]:
    """Names called in the asserts, most frequent first."""
    called = [name for test in tests for name in re.findall(r"([A-Za-z_]\w*)\s*\(", test)]
    return sorted(set(called), key=lambda n: (-called.count(n), called.index(n)))


def _defined(code: str) -> set[str]:
    """Names that the published solution defines: those alone may stand for builtins of the same name (`sum`)."""
    return set(re.findall(r"^(?:def|class)\s+(\w+)", code, re.MULTILINE))


def _code(text: str, tests: list[str]) -> str | None:
    """The program that defines what is tested: after "[BEGIN]", in a fence, or the whole text; None if none does."""
    body = text.split("[BEGIN]")[-1].split("[DONE]")[0].replace("\r\n", "\n")
    for name in tested_names(tests):
        if re.search(rf"^\s*(?:def|class)\s+{name}\b|^{name}\s*=", body, re.MULTILINE):
            return read_code(body, name) or body
    return None


def _prompt(row: Mapping[str, Any]) -> str:
    tests = "\n".join(row["test_list"][:3])
    head = f"You are an expert Python programmer, and here is your task: {row['text']}"
    return f"{head} Your code should pass these tests:\n\n{tests}\n"


def _task(
    row: Mapping[str, Any], split: Split, domain: str, form: Literal["completion", "chat"], examples: list[Any]
) -> Task:
    if form == "completion":
        shown = "".join(f"{_prompt(e)}[BEGIN]\n{e['code']}\n[DONE]\n\n" for e in examples)
        messages: tuple[Message, ...] = (Message("user", f"{shown}{_prompt(row)}[BEGIN]\n"),)
    else:
        pairs = [(Message("user", _prompt(e)), Message("assistant", f"```python\n{e['code']}\n```")) for e in examples]
        messages = (*(m for pair in pairs for m in pair), Message("user", _prompt(row)))
    reference = {"tests": list(row["test_list"]), "setup": row.get("test_setup_code") or "", "code": row["code"]}
    return Task(
        id=f"mbpp/{row['task_id']}",
        benchmark="mbpp",
        domain=domain,
        split=split,
        messages=messages,
        reference=reference,
        category="python functions",
        form=form,
        stop=("[DONE]",) if form == "completion" else (),
        max_tokens=512,
    )


BENCHMARK = Mbpp()
