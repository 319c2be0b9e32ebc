# ruff: noqa: E501
"""Calls parsed without eval in three languages, and matched by BFCL's rules."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cascade.scoring.calls import Call, CallSyntaxError, format_calls, match_calls, parse_calls
from cascade.scoring.foreign_calls import parse_foreign_calls, split_top, to_value

FUNCTION = {
    "name": "f",
    "parameters": {
        "properties": {"a": {"type": "float"}, "s": {"type": "string"}, "l": {"type": "array", "items": {"type": "integer"}}},
        "required": ["a"],
    },
}  # fmt: skip
ACCEPTED = [{"f": {"a": [1.0], "s": ["April 1, 2024", ""], "l": [[1, 2], ""]}}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[f(a=1)]", [Call("f", {"a": 1})]),
        ("f(a=-1.5, b='x')", [Call("f", {"a": -1.5, "b": "x"})]),
        ("[a.b.f(x=[1, {'k': (2, None)}]), g()]", [Call("a.b.f", {"x": [1, {"k": (2, None)}]}), Call("g", {})]),
        ("```python\n[f(a=True)]\n```", [Call("f", {"a": True})]),
        ("Here you are: [f(a=1)]. Done.", [Call("f", {"a": 1})]),
        ("[f(a=2 + 3 * 4, b=name, c=x[0], d=g(1))]", [Call("f", {"a": 14, "b": "name", "c": "x[0]", "d": "g(1)"})]),
    ],
)
def test_parsing(text: str, expected: list[Call]) -> None:
    assert parse_calls(text) == expected


@pytest.mark.parametrize(
    "text", ["", "no calls", "[]", "[1, 2]", "f(", "[f(a=lambda: 1)]", "[f(a=9**9**9**9)]", "[f(a=1/0)]", "(" * 9000]
)
def test_what_is_no_call(text: str) -> None:
    start = time.process_time()
    with pytest.raises(CallSyntaxError):
        parse_calls(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"a": 1}, True),
        ({"a": 1.0, "s": "april 1 2024"}, True),
        ({"a": 1, "l": [1, 2]}, True),
        ({"a": 1, "l": [2, 1]}, False),
        ({"a": 1, "l": ["1", "2"]}, False),
        ({"a": "1"}, False),
        ({"a": True}, False),
        ({}, False),
        ({"a": 1, "z": 1}, False),
        ({"a": 1, "s": "May 1"}, False),
    ],
)
def test_matching(arguments: dict[str, Any], valid: bool) -> None:
    assert match_calls([Call("f", arguments)], ACCEPTED, [FUNCTION]).valid is valid
    assert not match_calls([Call("g", arguments)], ACCEPTED, [FUNCTION]).valid
    assert not match_calls([Call("f", arguments)] * 2, ACCEPTED, [FUNCTION]).valid


def test_parallel_calls_match_in_any_order_and_say_why_not() -> None:
    accepted = [{"f": {"a": [1.0]}}, {"f": {"a": [2.0]}}]
    calls = [Call("f", {"a": 2}), Call("f", {"a": 1})]
    assert match_calls(calls, accepted, [FUNCTION]).valid
    assert parse_calls(format_calls(calls)) == calls
    wrong = match_calls([Call("f", {"a": 2}), Call("f", {"a": 2})], accepted, [FUNCTION])
    assert "a=2.0 is none of [1.0]" in wrong.reason


def test_java_and_javascript_values() -> None:
    text = '[A.b(x="a, b", n=5L, m=new HashMap<String, List<Integer>>() {{ put("k", 1); }}, l=new int[]{1, 2})]'
    call = parse_foreign_calls(text)[0]
    assert (call.name, call.arguments["x"], call.arguments["n"]) == ("A.b", "a, b", "5L")
    assert to_value(call.arguments["n"], "long", None, "java") == 5
    assert to_value(call.arguments["m"], "HashMap", None, "java") == {"k": 1}
    assert to_value(call.arguments["l"], "Array", "integer", "java") == [1, 2]
    assert to_value("variable", "integer", None, "java") == "variable"
    assert to_value('{"a": [1, "x"], b: {c: true}}', "dict", None, "javascript") == {"a": [1, "x"], "b": {"c": True}}
    assert to_value("[[1, 2], [3]]", "array", "float", "javascript") == [[1, 2], [3]]


def test_brackets_and_quotes_must_match_and_cost_little() -> None:
    assert split_top('a, "b, c", d(e, f)') == ["a", '"b, c"', "d(e, f)"]
    for text in ('f(a="x)', "f(a=(1)", "f(a=1))", "f", ""):
        with pytest.raises(CallSyntaxError):
            parse_foreign_calls(text)
    start = time.process_time()
    for text in ("[" * 40_000, "<" * 40_000, "{" * 40_000 + "}" * 40_000, "'" * 40_000):
        to_value(text, "array", None, "javascript")
        to_value(text, "dict", None, "javascript")
        to_value(text, "ArrayList", None, "java")
    assert time.process_time() - start < 3
