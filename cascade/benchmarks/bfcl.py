"""Berkeley Function-Calling Leaderboard v4, single-turn categories and multi-turn base (Patil et al., ICML 2025).

Source: wheel `bfcl-eval==2026.3.23` (Apache-2.0), taken without its dependencies and never installed, or a local copy
of its `data` folder (for multi-turn with the code of the tools beside it, as in the wheel). Split rule
(`split_rule: ids`): the SHA-256 of the task's id decides: its first 8 hex digits as a number modulo 10 are 0 or 1 for
train, 2 for validation, else test; BFCL itself publishes no training data. `split_rule: none` keeps everything in test,
which is what published scores are of. Shots: 0. Metric: BFCL's AST check (see `cascade.scoring.calls`); in irrelevance
categories an answer passes that holds no call, in live_relevance one that holds any (so weak a check that
none of its tasks is for training). Multi-turn tasks are conversations with stateful tools: see
`cascade.benchmarks.bfcl_multi_turn`.

"Simple" scores are unweighted means over languages on the leaderboard and live scores are weighted by size: reports
break down by category, so both can be had.

Options:
    path: folder that holds BFCL_v4_<category>.json and possible_answer/; left out, the wheel
    categories: list; left out, all of CATEGORIES
    split_rule: ids | none
    lenient: read calls in fences and amid prose too (default false: as the leaderboard reads them)
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cascade.benchmarks import bfcl_multi_turn as multi_turn
from cascade.benchmarks.function_calls import Judged, first_call, judge_calls, reference_calls
from cascade.benchmarks.offered_functions import with_functions
from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import only_split, shuffled
from cascade.benchmarks.sources import read_json_lines
from cascade.config_sections import Section
from cascade.errors import ConfigError, DataError
from cascade.scoring.calls import CallSyntaxError, format_calls, match_calls, parse_calls
from cascade.scoring.foreign_calls import NESTED, converter, parse_foreign_calls, to_source
from cascade.tasks import Completion, Message, Split, Task, Verdict

CATEGORIES: dict[str, int] = {
    "simple_python": 1,
    "simple_java": 2,
    "simple_javascript": 2,
    "multiple": 2,
    "parallel": 3,
    "parallel_multiple": 4,
    "irrelevance": 2,
    "live_simple": 2,
    "live_multiple": 3,
    "live_parallel": 4,
    "live_parallel_multiple": 4,
    "live_irrelevance": 3,
    "live_relevance": 3,
    multi_turn.CATEGORY: 5,
}
"""Category -> difficulty."""
RELEVANCE = "live_relevance"
HINTS = {"java": "Java 8 SDK", "javascript": "JavaScript", "python": "Python 3"}
"""Language -> how the prompt names its syntax."""


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    categories: list[str] | None = None
    split_rule: Literal["ids", "none"] = "ids"
    lenient: bool = False


class Bfcl:
    """See the module's docstring."""

    name = "bfcl"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The tasks of the chosen categories that belong to the split."""
        chosen = parse_options(Options, options, self.name)
        unknown = set(chosen.categories or ()) - set(CATEGORIES)
        if unknown:
            raise ConfigError(f"bfcl has no categories {sorted(unknown)} here; it has {', '.join(CATEGORIES)}")
        if chosen.split_rule == "none":
            only_split(f"{self.name} with split_rule none", split, "test")
        folder = multi_turn.data_folder(chosen.path)
        tasks = []
        for category in chosen.categories or CATEGORIES:
            rows = _category(folder, category)
            kept = [r for r in rows if chosen.split_rule == "none" or split_of(r["id"]) == split]
            if category == RELEVANCE and split == "train":
                continue
            tasks += [_task(row, category, split, domain, chosen) for row in kept]
        return shuffled(tasks, seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """The leaderboard's check."""
        reference = task.reference
        if task.category == multi_turn.CATEGORY:
            return multi_turn.score(task, completion)
        if task.category == RELEVANCE:
            outcome, answer, evidence = _judge_relevance(completion.text)
        elif language_of(task.category) == "python":
            outcome, answer, evidence = judge_calls(
                completion.text, reference["expected"], reference["functions"], lenient=reference["lenient"]
            )
        else:
            outcome, answer, evidence = _judge_foreign(task, completion.text)
        return Verdict(task.id, completion.model, completion.modifier, outcome, answer, evidence)

    def reply(self, task: Task, said: Sequence[Message]) -> tuple[Message, ...]:
        """Results of calls, or the next question, of a multi-turn task."""
        return multi_turn.reply(task, said)

    def reference_answer(self, task: Task) -> str:
        """The accepted calls with the first accepted values; of a conversation, where it stands."""
        if task.category == multi_turn.CATEGORY:
            return multi_turn.reference_answer(task)
        expected, functions = task.reference["expected"], task.reference["functions"]
        if task.category == RELEVANCE:
            return f"[{functions[0]['name']}()]"
        language = language_of(task.category)
        if language == "python" or not expected:
            return reference_calls(expected, functions)
        call = first_call(expected[0], {f["name"]: f["parameters"].get("required", []) for f in functions})
        properties = functions[0]["parameters"]["properties"]
        shown = ", ".join(f"{k}={to_source(v, properties[k], language)}" for k, v in call.arguments.items())
        return f"[{call.name}({shown})]"


def language_of(category: str) -> Literal["python", "java", "javascript"]:
    """The language of a category's functions."""
    if category == "simple_java":
        return "java"
    return "javascript" if category == "simple_javascript" else "python"


def _judge_foreign(task: Task, text: str) -> Judged:
    language = language_of(task.category)
    assert language != "python"
    try:
        calls = parse_foreign_calls(text)
    except CallSyntaxError as error:
        return "unparsed", "", f"no calls could be read: {error}"
    shown = "; ".join(f"{c.name}({', '.join(f'{k}={v}' for k, v in c.arguments.items())})" for c in calls)
    result = match_calls(calls, task.reference["expected"], task.reference["functions"], converter(language))
    return ("pass", shown, "") if result.valid else ("fail", shown, result.reason)


def _judge_relevance(text: str) -> Judged:
    """Whether there is a call at all."""
    try:
        shown = format_calls(parse_calls(text, lenient=False))
    except CallSyntaxError as error:
        return "unparsed", "", f"no calls could be read: {error}"
    return "pass", shown, ""


def split_of(task_id: str) -> Split:
    """The published rule: see the module's docstring."""
    point = int(hashlib.sha256(task_id.encode()).hexdigest()[:8], 16) % 10
    return "train" if point < 2 else ("validation" if point == 2 else "test")


def _category(folder: Path, category: str) -> list[dict[str, Any]]:
    """Rows with id, question, function and expected calls ([] where none are published)."""
    rows = read_json_lines(folder / f"BFCL_v4_{category}.json")
    answers: dict[str, Any] = {}
    if "relevance" not in category:
        published = read_json_lines(folder / "possible_answer" / f"BFCL_v4_{category}.json")
        answers = {row["id"]: row["ground_truth"] for row in published}
    for row in rows:
        if "relevance" not in category and row["id"] not in answers:
            raise DataError(f"bfcl {category}: {row['id']} has no possible answer")
        row["expected"] = answers.get(row["id"], [])
        if category == multi_turn.CATEGORY:
            row["function"] = multi_turn.descriptions(folder, row["involved_classes"])
    return rows


def _described(function: Mapping[str, Any], language: Literal["python", "java", "javascript"]) -> dict[str, Any]:
    """A function's description as BFCL shows it: Java and JavaScript parameters are declared as strings."""
    shown: dict[str, Any] = copy.deepcopy(dict(function))
    shown["description"] += f" Note that the provided function is in {HINTS[language]} syntax."
    if language == "python":
        return shown
    name = {"java": "Java", "javascript": "JavaScript"}[language]
    for schema in shown["parameters"]["properties"].values():
        declared = schema["type"]
        if declared == "any":
            note = f" This parameter can be of any type of {name} object in string representation."
        else:
            note = f" This is {name} {declared} type parameter in string representation."
        if declared in NESTED:
            element = schema.pop("items")["type"]
            note += f" The list elements are of type {element}; they are not in string representation."
        if declared == "dict" and "properties" in schema:
            entries = json.dumps(schema.pop("properties"))
            note += (
                f" The dictionary entries have the following schema; they are not in string representation. {entries}"
            )
        schema["description"] += note
        schema["type"] = "string"
    return shown


def _task(row: Mapping[str, Any], category: str, split: Split, domain: str, options: Options) -> Task:
    functions = [_described(f, language_of(category)) for f in row["function"]]
    turn = row["question"][0]
    said = [Message(m["role"], m["content"]) for m in turn]
    messages = with_functions(said, json.dumps(functions, indent=4))
    several = category == multi_turn.CATEGORY
    return Task(
        id=f"bfcl/{row['id']}",
        benchmark="bfcl",
        domain=domain,
        split=split,
        messages=tuple(messages),
        reference=multi_turn.reference_of(row, options.path)
        if several
        else {"expected": row["expected"], "functions": row["function"], "lenient": options.lenient},
        difficulty=CATEGORIES[category],
        category=category,
        max_tokens=512,
        max_turns=len(row["question"]) * (multi_turn.MAX_STEPS + 2) if several else 1,
    )


BENCHMARK = Bfcl()
