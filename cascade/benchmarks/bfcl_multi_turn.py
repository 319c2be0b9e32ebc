"""BFCL's multi-turn base category: several questions in a row, answered by steps of calls of stateful tools.

Belongs to `cascade.benchmarks.bfcl`, which names source, split rule and options. A conversation goes as in the accepted
harness: an answer that holds calls is a step, their results come back as the next user message, and an answer without
calls ends the turn; then the next question comes. More than 20 steps in a turn end the conversation. Metric: state and
results after every turn (see `cascade.scoring.stateful_tools`).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cascade.benchmarks.sources import read_json_lines, wheel_folder
from cascade.errors import DataError
from cascade.scoring.calls import Call, CallSyntaxError, format_calls, parse_calls
from cascade.scoring.stateful_tools import Tools, ToolsBroken, ToolsExhausted, Turn, match_turns, play, source_of
from cascade.tasks import Completion, Message, Task, Verdict

WHEEL = ("bfcl-eval", "2026.3.23", "bfcl_eval/", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a")
CATEGORY = "multi_turn_base"
MAX_STEPS = 20
"""Steps with calls that a turn may have; one more ends the conversation."""
END_OF_TURN = "Done."
"""How reference answers end a turn; any text without calls does."""
_PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
_CLASSES = {
    "GorillaFileSystem": ("gorilla_file_system", "gorilla_file_system"),
    "MathAPI": ("math_api", "math_api"),
    "MessageAPI": ("message_api", "message_api"),
    "TwitterAPI": ("posting_api", "posting_api"),
    "TicketAPI": ("ticket_api", "ticket_api"),
    "TradingBot": ("trading_bot", "trading_bot"),
    "TravelAPI": ("travel_booking", "travel_booking"),
    "VehicleControlAPI": ("vehicle_control", "vehicle_control"),
}
"""Class -> its module, and the file of its functions' descriptions."""


def data_folder(path: str | None) -> Path:
    """BFCL's `data`: the folder that the user names, or the wheel's."""
    return Path(path).expanduser() if path is not None else wheel_folder(*WHEEL) / "data"


def descriptions(folder: Path, classes: Sequence[str]) -> list[dict[str, Any]]:
    """What the classes' functions are described as, in the harness's order.

    Args:
        folder: BFCL's `data`.

    Raises:
        DataError: a class is unknown, or its file cannot be read.
    """
    functions: list[dict[str, Any]] = []
    for name in classes:
        if name not in _CLASSES:
            raise DataError(f"bfcl {CATEGORY} uses the tools {name!r}, which are not known here")
        functions += read_json_lines(folder / "multi_turn_func_doc" / f"{_CLASSES[name][1]}.json")
    return functions


def reference_of(row: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """What a task of this category is judged by.

    Args:
        row: with id, question, initial_config, involved_classes, function and expected (calls as source, per turn).
        path: the option of that name; the tools' code lies beside that folder.
    """
    return {
        "id": row["id"],
        "questions": [[m["content"] for m in turn] for turn in row["question"]],
        "expected": row["expected"],
        "initial": row["initial_config"],
        "classes": row["involved_classes"],
        "parameters": {f["name"]: list(f["parameters"]["properties"]) for f in row["function"]},
        "path": path,
    }


# ------------------------------------------------------------------------------------------------- the conversation


@dataclass
class Conversation:
    """Where a conversation stands, read out of the answers alone.

    Attributes:
        turns: the steps of the turns so far, the present one last; a step is its calls as source.
        over: all turns have ended, or one had too many steps.
    """

    total: int
    turns: list[list[list[str]]] = field(default_factory=lambda: [[]])
    over: bool = False

    @property
    def complete(self) -> bool:
        """Whether there is something to judge in every turn."""
        return len(self.turns) == self.total

    def hear(self, answer: str) -> bool:
        """Take in one answer; whether it was a step with calls."""
        step = calls_in(answer)
        if step:
            self.turns[-1].append(step)
            self.over = len(self.turns[-1]) > MAX_STEPS
        elif self.complete:
            self.over = True
        else:
            self.turns.append([])
        return bool(step)


def calls_in(answer: str) -> list[str]:
    """The calls of an answer as source; none if it cannot be read as calls, which ends the turn."""
    try:
        return [source_of(call) for call in parse_calls(answer, lenient=False)]
    except CallSyntaxError:
        return []


def reply(task: Task, said: Sequence[Message]) -> tuple[Message, ...]:
    """What follows the last answer: the results of its calls, the next question, or nothing.

    Raises:
        DataError, SandboxError: the tools' code cannot be had, or not be confined.
    """
    talk = Conversation(len(task.reference["questions"]))
    called = [talk.hear(m.content) for m in said if m.role == "assistant"]
    if talk.over:
        return ()
    if not called[-1]:
        return tuple(Message("user", q) for q in task.reference["questions"][len(talk.turns) - 1])
    try:
        results = play(_tools(task), talk.turns, _label(task, "model"))[-1].steps[-1]
    except ToolsBroken as error:
        results = tuple(f"Error during execution: {error}" for _ in talk.turns[-1][-1])
    shown = zip(talk.turns[-1][-1], results, strict=True)
    return (Message("user", repr([{"role": "tool", "name": c, "content": r} for c, r in shown])),)


# ------------------------------------------------------------------------------------------------- the verdict


def score(task: Task, completion: Completion) -> Verdict:
    """State and results after every turn."""
    talk = Conversation(len(task.reference["questions"]))
    for message in completion.said:
        if message.role == "assistant" and not talk.over:
            talk.hear(message.content)
    shown = "\n".join("; ".join(call for step in steps for call in step) or "(no call)" for steps in talk.turns)

    def verdict(outcome: Any, evidence: str = "") -> Verdict:
        return Verdict(task.id, completion.model, completion.modifier, outcome, shown, evidence)

    if not any(talk.turns):
        return verdict("unparsed", "no calls could be read in any answer")
    if not talk.complete:
        return verdict("fail", f"the conversation ended in turn {len(talk.turns)} of {talk.total}")
    try:
        expected = _expected(json.dumps(task.reference))
    except ToolsBroken as error:
        return verdict("error", f"the reference calls cannot be run: {error}")
    try:
        result = match_turns(play(_tools(task), talk.turns, _label(task, "model")), expected)
    except ToolsExhausted as error:
        return verdict("timeout", str(error))
    except ToolsBroken as error:
        return verdict("error", str(error))
    return verdict("pass" if result.valid else "fail", result.reason)


@lru_cache(maxsize=512)
def _expected(reference_json: str) -> tuple[Turn, ...]:
    reference = json.loads(reference_json)
    turns = [[calls] if calls else [] for calls in reference["expected"]]
    return play(_tools_of(reference), turns, f"ground_truth_{reference['id']}")


def _label(task: Task, who: str) -> str:
    return f"{who}_{task.reference['id']}"


def _tools(task: Task) -> Tools:
    return _tools_of(task.reference)


def _tools_of(reference: Mapping[str, Any]) -> Tools:
    files = {name: _CLASSES[name][0] for name in reference["classes"]}
    modules = {f"{_PACKAGE}.{m}": _source(reference["path"], m) for m in ("long_context", *files.values())}
    classes = {name: f"{_PACKAGE}.{module}" for name, module in files.items()}
    return Tools(modules, classes, reference["initial"])


@lru_cache(maxsize=64)
def _source(path: str | None, module: str) -> str:
    file = data_folder(path).parent / "eval_checker" / "multi_turn_eval" / "func_source_code" / f"{module}.py"
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"bfcl {CATEGORY} needs the code of its tools beside the data: {error}. "
            "Without the option 'path' both come from the wheel"
        ) from error


# ------------------------------------------------------------------------------------------------- the right answers


def reference_answer(task: Task) -> str:
    """The right answer where a conversation stands: the calls of its turn at once, then the end of the turn."""
    talk = Conversation(len(task.reference["questions"]))
    for message in task.messages:
        if message.role == "assistant":
            talk.hear(message.content)
    expected = task.reference["expected"][len(talk.turns) - 1]
    if talk.turns[-1] or not expected:
        return END_OF_TURN
    return format_calls([_named(source, task.reference["parameters"]) for source in expected])


def _named(source: str, parameters: Mapping[str, list[str]]) -> Call:
    """A reference call with the names of arguments that it gives by position."""
    node = ast.parse(source, mode="eval").body
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    positional = dict(zip(parameters[node.func.id], map(ast.literal_eval, node.args), strict=False))
    return Call(node.func.id, {**positional, **{str(k.arg): ast.literal_eval(k.value) for k in node.keywords}})
