"""Function calls in answers: parsed without eval, matched as the Berkeley Function-Calling Leaderboard does.

A call is `Call(name, arguments)`. The rules are BFCL's (v4, AST category): the number of calls, the function's name,
all required parameters, no unknown ones, types (an int passes for a float), values among the accepted ones after
strings lose case, blanks and `,./-_*^`; "" among the accepted values marks an optional parameter; parallel calls
match in any order, each accepted call taking the first answer that fits it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
MAX_CHARS = 50_000
MAX_POWER = 10_000
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class CallSyntaxError(ValueError):
    """The text holds no list of function calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call with named arguments, values as literals (names and nested calls as their source text)."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Match:
    """Whether calls are the expected ones, and if not, why."""

    valid: bool
    reason: str = ""


VALID = Match(True)


# ------------------------------------------------------------------------------------------------- parsing


def parse_calls(text: str, *, lenient: bool = True, whole: bool = False) -> list[Call]:
    """Calls out of "[f(a=1), g(b='x')]".

    Args:
        text: the answer.
        lenient: look into fences and amid prose too; otherwise as BFCL reads it (brackets may be missing).
        whole: refuse what BFCL drops or alters without a word: arguments without a name, what `*` and `**` unpack,
            signs other than a minus, and what comes behind the first `MAX_CHARS` characters.

    Raises:
        CallSyntaxError: there is no call that can be read.
    """
    if whole and len(text) > MAX_CHARS:
        raise CallSyntaxError(f"more than {MAX_CHARS} characters")
    text = text[:MAX_CHARS].strip()
    errors = []
    for candidate in _candidates(text)[: None if lenient else 1]:
        try:
            return _parse(candidate, whole)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, TypeError) as error:
            errors.append(str(error))
    raise CallSyntaxError(errors[0] if errors else "no function call found")


def _candidates(text: str) -> list[str]:
    """The text as the accepted harness takes it first; then fenced blocks and bracketed stretches."""
    bare = text.strip("`\n ")
    whole = bare if bare.startswith("[") else "[" + bare
    found = [whole if whole.endswith("]") else whole + "]"]
    found += [m[1].strip() for m in re.finditer(r"```\w*\n(.*?)```", text, re.DOTALL)]
    start, end = text.find("["), text.rfind("]")
    if 0 <= start < end:
        found.append(text[start : end + 1])
    return found


def _parse(text: str, whole: bool) -> list[Call]:
    body = ast.parse(text.strip().strip("'"), mode="eval").body
    nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
    if not nodes:
        raise CallSyntaxError("an empty list of calls")
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call):
            raise CallSyntaxError(f"{ast.unparse(node)[:100]} is no function call")
        if whole and (node.args or any(map(_misread, ast.walk(node)))):
            raise CallSyntaxError(f"{ast.unparse(node)[:100]} is no call with named arguments alone")
        calls.append(_call(node))
    return calls


def _misread(node: ast.AST) -> bool:
    """Whether BFCL drops a part of it, or turns its sign round: of `+5` it makes -5."""
    if isinstance(node, ast.UnaryOp):
        return not isinstance(node.op, ast.USub)
    if isinstance(node, ast.Dict):
        return None in node.keys
    # A call within a call that has no named arguments is kept as text.
    return (
        isinstance(node, ast.Call) and bool(node.keywords) and bool(node.args or None in {k.arg for k in node.keywords})
    )


def _call(node: ast.Call) -> Call:
    """Positional arguments are dropped, as the accepted harness does: BFCL knows named ones alone."""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    arguments = {k.arg: _value(k.value) for k in node.keywords if k.arg is not None}
    return Call(".".join(reversed(parts)), arguments)


def _value(node: ast.expr) -> Any:
    """A literal; names, subscripts and calls without named arguments as source text."""
    if isinstance(node, ast.Constant):
        return "..." if node.value is Ellipsis else node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return -node.operand.value  # type: ignore[operator]
    if isinstance(node, ast.List):
        return [_value(v) for v in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(v) for v in node.elts)
    if isinstance(node, ast.Dict):
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp):
        return _arithmetic(node)
    if isinstance(node, ast.Call) and node.keywords:
        inner = _call(node)
        return {inner.name: inner.arguments}
    if isinstance(node, ast.Call | ast.Subscript):
        return ast.unparse(node)
    raise CallSyntaxError(f"{ast.unparse(node)[:100]} is no literal")


def _arithmetic(node: ast.BinOp) -> Any:
    """Arithmetic on numbers (a bounded power), or joined strings."""
    left, right, act = _value(node.left), _value(node.right), _OPERATORS.get(type(node.op))
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    strings = isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str)
    too_big = isinstance(node.op, ast.Pow) and numbers and (abs(right) > 64 or abs(left) > MAX_POWER)
    if act is None or not (numbers or strings) or too_big:
        raise CallSyntaxError(f"{ast.unparse(node)[:100]} is no literal")
    try:
        return act(left, right)
    except ZeroDivisionError as error:
        raise CallSyntaxError(str(error)) from None


def format_calls(calls: Sequence[Call]) -> str:
    """Calls in the form that `parse_calls` reads and BFCL's prompt asks for."""
    shown = [f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls]
    return f"[{', '.join(shown)}]"


# ------------------------------------------------------------------------------------------------- matching

Description = Mapping[str, Any]
"""A function's documentation: name, and parameters with properties (type, items) and required names."""
Accepted = Mapping[str, Mapping[str, Sequence[Any]]]
"""One accepted call: {function name: {parameter: [accepted values]}}."""

Typed = tuple[Any, type, type | None]
"""A value, the type it should have, and the type of a list's elements if declared."""
Converter = Callable[[Any, Mapping[str, Any]], Typed]
"""Turns an argument as parsed and its parameter's schema into a `Typed`."""


def match_calls(
    calls: Sequence[Call],
    accepted: Sequence[Accepted],
    functions: Sequence[Description],
    convert: Converter | None = None,
) -> Match:
    """Whether the calls are the accepted ones, in any order.

    Args:
        calls: what the model called.
        accepted: one entry per call that is wanted.
        functions: descriptions of the functions that were offered.
        convert: for other languages than Python; see `Converter`.
    """
    if len(calls) != len(accepted):
        return Match(False, f"{len(calls)} calls, expected {len(accepted)}")
    by_name = {f["name"]: f for f in functions}
    left = list(range(len(calls)))
    for wanted in accepted:
        name = next(iter(wanted))
        reasons = []
        for index in left:
            result = match_call(calls[index], wanted, by_name[name], convert)
            if result.valid:
                left.remove(index)
                break
            reasons.append(result.reason)
        else:
            return Match(False, reasons[0] if len(accepted) == 1 else f"no call fits {name}: {'; '.join(reasons[:3])}")
    return VALID


def match_call(call: Call, accepted: Accepted, function: Description, convert: Converter | None = None) -> Match:
    """Whether one call is an accepted one."""
    name, values = next(iter(accepted.items()))
    if call.name != function["name"]:
        return Match(False, f"called {call.name or 'nothing'}, expected {name}")
    properties, required = function["parameters"]["properties"], function["parameters"].get("required", [])
    for parameter in required:
        if parameter not in call.arguments:
            return Match(False, f"required parameter {parameter!r} is missing")
    for parameter, value in call.arguments.items():
        if parameter not in properties or parameter not in values:
            return Match(False, f"unexpected parameter {parameter!r}")
        result = _match_argument(parameter, value, values[parameter], properties[parameter], convert)
        if not result.valid:
            return result
    for parameter, options in values.items():
        if parameter not in call.arguments and "" not in options:
            return Match(False, f"parameter {parameter!r} is missing")
    return VALID


def _typed(value: Any, schema: Mapping[str, Any]) -> Typed:
    """A Python argument: tuples where declared count as lists, an int passes for a float."""
    declared = schema["type"]
    nested = PYTHON_TYPES[schema["items"]["type"]] if declared in {"array", "tuple"} else None
    if declared == "tuple" and type(value) is tuple:
        value = list(value)
    if declared == "float" and type(value) is int:
        value = float(value)
    return value, PYTHON_TYPES[declared], nested


def _match_argument(
    name: str, value: Any, accepted: Sequence[Any], schema: Mapping[str, Any], convert: Converter | None
) -> Match:
    declared = schema["type"]
    value, expected, nested = (convert or _typed)(value, schema)
    fits, is_variable = _fits_type(value, accepted, expected, nested)
    if not fits:
        return Match(False, f"{name}={value!r} is not of type {declared}")
    if not is_variable and expected is dict:
        good = any(a != "" and _dict_matches(value, a) for a in accepted)
    elif not is_variable and expected is list and nested is dict:
        good = any(_dicts_match(value, a) for a in accepted)
    elif not is_variable and expected is str:
        good = _plain(value) in [_plain(a) for a in accepted if type(a) is str]
    elif not is_variable and expected is list:
        good = [_plain(v) for v in value] in [[_plain(v) for v in a] for a in accepted]
    else:
        good = value in accepted
    return VALID if good else Match(False, f"{name}={value!r} is none of {list(accepted)!r}"[:400])


def _fits_type(value: Any, accepted: Sequence[Any], expected: type, nested: type | None) -> tuple[bool, bool]:
    """(whether the type is right, whether the value stands for a variable).

    Where the accepted values are of another type than declared, they are names of variables, and a value of that
    type is right as well. Lists are checked one level deep.
    """
    named = next((type(a) for a in accepted if a != ""), None)
    is_variable = named is not None and named is not expected
    if type(value) is expected:
        if nested is None:
            return True, is_variable
        items: Any = value
        for option in accepted:
            if type(option) is not list or all(_fits_type(v, option, nested, None)[0] for v in items):
                return True, is_variable
        return False, False
    return (named is not None and type(value) is named), True


def _plain(value: Any) -> Any:
    """A string without case, blanks and the marks that BFCL ignores; anything else as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value


def _dict_matches(value: Mapping[Any, Any], accepted: Mapping[Any, Sequence[Any]]) -> bool:
    for key, item in value.items():
        if key not in accepted or _plain(item) not in [_plain(a) for a in accepted[key]]:
            return False
    return all(key in value or "" in options for key, options in accepted.items())


def _dicts_match(value: Sequence[Any], accepted: Any) -> bool:
    if not isinstance(accepted, list) or len(value) != len(accepted):
        return False
    return all(a != "" and _dict_matches(v, a) for v, a in zip(value, accepted, strict=True))
