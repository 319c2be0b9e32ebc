"""Tasks that want function calls: a right answer in their form, and the verdict on an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade.scoring.calls import Call, CallSyntaxError, format_calls, match_calls, parse_calls
from cascade.tasks import Outcome

Judged = tuple[Outcome, str, str]
"""Outcome, answer and evidence."""


def reference_calls(expected: list[dict[str, dict[str, list[Any]]]], functions: list[dict[str, Any]]) -> str:
    """The expected calls with the first accepted values; what may be left out and is not required is left out."""
    if not expected:
        return "None of the functions fits."
    required = {f["name"]: f["parameters"].get("required", []) for f in functions}
    return format_calls([first_call(call, required) for call in expected])


def first_call(accepted: dict[str, dict[str, list[Any]]], required: Mapping[str, list[str]]) -> Call:
    """The call with the first accepted value of each parameter that must be given."""
    name, values = next(iter(accepted.items()))
    needed = {k: v for k, v in values.items() if "" not in v or k in required[name]}
    return Call(name, {k: _first_value(v) for k, v in needed.items()})


def _first_value(accepted: list[Any]) -> Any:
    """The first accepted value that is not the mark of an optional one; inside dicts the same."""
    value = next((a for a in accepted if a != ""), "")
    return _plain_value(value)


def _plain_value(value: Any) -> Any:
    """Accepted dicts hold lists of accepted values per key; a real value holds one."""
    if isinstance(value, dict):
        return {k: _first_value(v) if isinstance(v, list) else v for k, v in value.items() if not _optional(v)}
    return [_plain_value(v) for v in value] if isinstance(value, list) else value


def _optional(accepted: Any) -> bool:
    return isinstance(accepted, list) and "" in accepted


def judge_calls(text: str, expected: Any, functions: Any, *, lenient: bool = True) -> Judged:
    """Outcome, answer and evidence of calls in a text; with nothing expected, of there being none."""
    try:
        calls = parse_calls(text, lenient=lenient)
    except CallSyntaxError as error:
        if not expected and (text.strip() or not lenient):
            return "pass", text.strip()[:200], ""
        return "unparsed", "", f"no calls could be read: {error}"
    shown = format_calls(calls)
    if not expected:
        return "fail", shown, "no function fits, but one was called"
    result = match_calls(calls, expected, functions)
    return ("pass", shown, "") if result.valid else ("fail", shown, result.reason)
