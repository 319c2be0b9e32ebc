"""What a teacher is told of a failed answer, so that it can mend it: never the answer itself.

A scorer's evidence is written for people: it names the expected answer, or the hidden test with its expected value. A
teacher that reads it repeats it, and its answer then proves nothing. So evidence is not passed on. What may be told is
made anew: how the teacher's own answer was read, what its own program raised, and the hidden test's *call* without
what the call should give. Two more rules:

- Where the answer is one of a few (a choice, yes or no), "wrong" gives the right one away after a few rounds. Such a
  task is sent back only if nothing could be read out of the answer, never because it was wrong.
- A piece that holds a value of the reference which neither the task nor the teacher had named is left out.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from typing import Any

from cascade import benchmarks
from cascade.errors import CascadeError
from cascade.tasks import Json, Task, Verdict

_CLOSED = frozenset(
    ["yes", "no", "true", "false", "valid", "invalid", "heads", "tails", "left", "right", "correct", "incorrect"]
)
_LETTER = re.compile(r"\(?[A-Za-z]\)?")
_SHOWN = 600
_PARAMETER = re.compile(r"(?:required )?parameter '[^']*' is missing|unexpected parameter '[^']*'")
_VALUE = re.compile(r"(\w+)=.* is (?:none of .*|not of type (\w+))", re.DOTALL)
_CALLS = re.compile(r"\d+ calls, expected .*|called .*, expected .*|no call fits .*|no function fits, .*", re.DOTALL)
_RAISED = re.compile(r"(\w+): ?(.*)", re.DOTALL)
_TOKEN = re.compile(r"[^\W_]+(?:\.\d+)?")
_NO_VALUES = frozenset({"kind", "entry_point", "name", "type", "description", "setup", "language", "functions"})
"""Keys of references under which no value stands that an answer is compared with."""


def feedback(task: Task, verdict: Verdict) -> str | None:
    """What to tell a teacher of its failed answer, or None if nothing may be told that would help.

    Args:
        verdict: on the teacher's answer; not a pass.
    """
    if benchmarks.needs_judge(task):
        return None  # mended until a judge likes it, an answer would be fitted to the judge
    if verdict.outcome == "unparsed":
        return "No answer could be read out of what you wrote. Answer again, in the form that the task asks for."
    if verdict.outcome == "timeout":
        return "Your program was stopped: it needed more time than is allowed. Write a faster one, whole."
    if verdict.outcome != "fail" or has_few_answers(task):
        return None
    if (called := _of_calls(task, verdict)) is not None:
        return f"{called} Answer again with all calls."
    if names := _defined_names(verdict.answer):
        return f"{_of_code(task, verdict, names)} Mend it and write the whole program again."
    read = verdict.answer.strip()[:_SHOWN]
    said = f"Your answer was read as: {read}\nIt is not correct." if read else "That is not correct."
    return f"{said} Work through the task again, step by step, and give a corrected answer."


def has_few_answers(task: Task) -> bool:
    """Whether the right answer is one of so few that being told "wrong" gives it away."""
    reference = task.reference if isinstance(task.reference, dict) else {}
    if task.choices or "choices" in reference or "texts" in reference:
        return True
    try:
        right = benchmarks.get(task.benchmark).reference_answer(task).strip()
    except CascadeError:
        return False  # unit tests without a solution
    return bool(_LETTER.fullmatch(right)) or right.strip(".").casefold() in _CLOSED


def _of_calls(task: Task, verdict: Verdict) -> str | None:
    """Why calls were refused, without the function, the number or the values that are right; None if not calls."""
    evidence = verdict.evidence
    if _PARAMETER.fullmatch(evidence) and not _leaks(task, verdict, evidence):
        return f"The calls are not right: {evidence}."
    if match := _VALUE.fullmatch(evidence):
        wanted = f"of type {match[2]}" if match[2] else "the right one"
        piece = f"the value of the parameter {match[1]!r} is not {wanted}"
        return f"The calls are not right{'' if _leaks(task, verdict, match[1]) else ': ' + piece}."
    known = _PARAMETER.fullmatch(evidence) or _CALLS.fullmatch(evidence)
    return "The calls are not right: their number, a function or an argument does not fit." if known else None


def _of_code(task: Task, verdict: Verdict, names: set[str]) -> str:
    """Which call went wrong, or what the program raised itself."""
    line, _, rest = verdict.evidence.partition("\n")
    if line.startswith("the code cannot be executed"):
        return f"{line[:_SHOWN]}."
    shown = ", ".join(_calls_of(line, names))[:_SHOWN]
    if any(_words(value) & _words(shown) for value in _compared_constants(line)):
        shown = ""  # what goes in is also what should come out
    raised = "" if line.startswith("raise") else _own_error(rest)
    if raised and _leaks(task, verdict, raised.partition(":")[2]):
        raised = raised.partition(":")[0]
    if raised:
        return f"{shown or 'A hidden test'} raised {raised}."
    return f"{shown} gives a wrong result." if shown else "A hidden test fails: the result is wrong for some input."


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined_names(code: str) -> set[str]:
    """Names of the functions and classes that a program defines; none if it is no program."""
    tree = _parse(code)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {node.name for node in tree.body if isinstance(node, kinds)} if tree else set()
    return defined | {"candidate"} if defined else set()


def _calls_of(line: str, names: set[str]) -> list[str]:
    """The calls to the candidate's own names in a line of a test, outermost alone, as source."""
    tree = _parse(line)
    return [] if tree is None else list(dict.fromkeys(ast.unparse(node) for node in _outermost(tree, names)))


def _outermost(node: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _outermost(child, names)


def _own_error(text: str) -> str:
    """What the candidate raised, if it is a builtin error. An assertion's words may hold what is expected."""
    match = _RAISED.fullmatch(text) or _RAISED.fullmatch(f"{text}: ")
    kind = getattr(builtins, match[1], None) if match else None
    if match is None or not isinstance(kind, type) or not issubclass(kind, Exception) or kind is AssertionError:
        return ""
    return f"{match[1]}: {match[2][:_SHOWN]}".rstrip(": ")


def _leaks(task: Task, verdict: Verdict, piece: str) -> bool:
    """Whether a text names a value of the reference that neither the task nor the answer has named."""
    known = _words(verdict.answer) | {w for m in task.messages for w in _words(m.content)}
    secret = {w for value in _values(task.reference) for w in _words(value)} - known
    return bool(secret & _words(piece))


def _words(text: str) -> set[str]:
    return {w.casefold() for w in _TOKEN.findall(text)}


def _values(reference: Json, key: str = "") -> Iterator[str]:
    """Every value in a reference that an answer is compared with; of test programs, what the asserts compare with."""
    if isinstance(reference, dict):
        for name, inner in reference.items():
            yield from _values(inner, str(name))
    elif isinstance(reference, list):
        for inner in reference:
            yield from _values(inner, key)
    elif isinstance(reference, str) and ("\n" in reference.strip() or reference.lstrip().startswith("assert")):
        yield from _compared_constants(reference)
    elif key not in _NO_VALUES and reference is not None and not isinstance(reference, bool):
        yield str(reference)


def _compared_constants(source: str) -> Iterator[str]:
    """Constants in the asserts of a test program that are no part of a call."""
    tree = _parse(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Assert):
            yield from _outside_calls(node.test)


def _outside_calls(node: ast.AST) -> Iterator[str]:
    value: Any = getattr(node, "value", None)
    if isinstance(node, ast.Constant) and not isinstance(value, bool) and value is not None:
        yield str(value)
    if not isinstance(node, ast.Call):
        for child in ast.iter_child_nodes(node):
            yield from _outside_calls(child)
