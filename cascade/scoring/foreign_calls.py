"""Java and JavaScript function calls, for BFCL's categories of those languages: parsed by brackets and quotes alone.

`[Name.space(a="x", b=5L, c=new int[]{1, 2})]` becomes a `Call` whose values are source text, string literals without
their quotes. `to_value` turns the text into a Python value of the declared type by BFCL's rules; a text that is no
literal of that type stays text and counts as a variable's name. Nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from cascade.scoring.calls import MAX_CHARS, Call, CallSyntaxError, Converter, Typed

Language = Literal["java", "javascript"]
JAVA_TYPES: dict[str, type] = {
    "byte": int,
    "short": int,
    "integer": int,
    "long": int,
    "float": float,
    "double": float,
    "boolean": bool,
    "char": str,
    "Array": list,
    "ArrayList": list,
    "HashMap": dict,
    "String": str,
    "any": str,
}
JAVASCRIPT_TYPES: dict[str, type] = {
    "integer": int,
    "Bigint": int,
    "float": float,
    "Boolean": bool,
    "array": list,
    "dict": dict,
    "String": str,
    "any": str,
}
TYPES: dict[str, dict[str, type]] = {"java": JAVA_TYPES, "javascript": JAVASCRIPT_TYPES}
NESTED = frozenset({"Array", "ArrayList", "array"})
_CALL = re.compile(r"([\w$.]+)\s*\((.*)\)\s*;?", re.DOTALL)
_GENERIC = re.compile(r"<[\w\s,.?<>\[\]]{0,200}>(?=\s*[({])")
"""Java's type arguments, whose commas separate nothing."""
_PAIR = re.compile(r"\s*([\w$]+)\s*=(?!=)(.*)", re.DOTALL)


def _scan(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, character, bracket depth after it) of what stands outside of quotes and type arguments.

    Raises:
        CallSyntaxError: a quote is never closed, or a bracket closes that was never opened.
    """
    depth, quote, position = 0, "", 0
    while position < len(text):
        char = text[position]
        if quote:
            position += char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'`":
            quote = char
        elif char == "<" and (generic := _GENERIC.match(text, position)):
            position = generic.end() - 1
        else:
            depth += (char in "([{") - (char in ")]}")
            if depth < 0:
                raise CallSyntaxError("brackets do not match")
            yield position, char, depth
        position += 1
    if quote:
        raise CallSyntaxError("quotes do not match")


def split_top(text: str, mark: str = ",") -> list[str]:
    """Split at a mark outside of quotes and brackets.

    Raises:
        CallSyntaxError: brackets or quotes do not match.
    """
    parts, start, depth = [], 0, 0
    for position, char, depth in _scan(text):
        if char == mark and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if depth:
        raise CallSyntaxError("brackets do not match")
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]


def parse_foreign_calls(text: str) -> list[Call]:
    """Calls out of "[f(a=1, b="x")]"; the outer brackets may be missing.

    Raises:
        CallSyntaxError: there is no call, or an argument is named twice.
    """
    bare = text[:MAX_CHARS].strip("`\n ").removeprefix("java\n").removeprefix("javascript\n").strip()
    bare = bare.removeprefix("[").removesuffix("]")  # either may be missing, as in the accepted harness
    calls = [_parse_call(part) for part in split_top(bare)]
    if not calls:
        raise CallSyntaxError("an empty list of calls")
    return calls


def _parse_call(text: str) -> Call:
    match = _CALL.fullmatch(text)
    if not match:
        raise CallSyntaxError(f"{text[:100]} is no function call")
    arguments: dict[str, Any] = {}
    for part in split_top(match[2]):
        pair = _PAIR.fullmatch(part)
        if pair is None:
            continue  # BFCL knows named arguments alone
        if pair[1] in arguments:
            raise CallSyntaxError(f"argument {pair[1]} is given twice")
        arguments[pair[1]] = _unquoted(pair[2].strip())
    return Call(match[1], arguments)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _number(pattern: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    compiled = re.compile(pattern)
    return lambda text: convert(text.rstrip("lLfFn")) if compiled.fullmatch(text) else text


_INTEGER = _number(r"-?\d+", int)
_BOOLEAN: Callable[[str], Any] = lambda text: text == "true" if text in ("true", "false") else text  # noqa: E731
_SCALARS: dict[str, dict[str, Callable[[str], Any]]] = {
    "java": {
        "byte": _INTEGER,
        "short": _INTEGER,
        "integer": _INTEGER,
        "long": _number(r"-?\d+[lL]", int),
        "float": _number(r"-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]", float),
        "double": _number(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", float),
        "boolean": _BOOLEAN,
    },
    "javascript": {
        "integer": _INTEGER,
        "float": _number(r"-?\d+(\.\d+)?", float),
        "Bigint": _number(r"-?\d+n", int),
        "Boolean": _BOOLEAN,
        "String": _unquoted,
    },
}


def to_value(text: str, declared: str, nested: str | None, language: Language) -> Any:
    """The Python value of a literal of a declared type; the text itself if it is none.

    Args:
        text: source text, a string literal's quotes already removed.
        declared: type name in the function's description, e.g. "HashMap".
        nested: type name of the elements of a list, if declared.
        language: whose rules hold.
    """
    if declared in {"Array", "ArrayList"}:
        return _java_list(text, declared, nested)
    if declared == "HashMap":
        return _java_map(text)
    if declared == "array":
        return _javascript_array(text, nested)
    if declared == "dict":
        return _javascript_object(text)
    return _SCALARS[language].get(declared, str)(text)


def converter(language: Language) -> Converter:
    """How `cascade.scoring.calls.match_calls` types the arguments of a language."""

    def convert(value: Any, schema: Mapping[str, Any]) -> Typed:
        declared, types = schema["type"], TYPES[language]
        nested = schema["items"]["type"] if declared in NESTED else None
        typed = to_value(value, declared, nested, language)
        return typed, types[declared], types[nested] if nested else None

    return convert


def untyped(text: str) -> Any:
    """A literal without a declared type."""
    if text in ("true", "false"):
        return text == "true"
    if text[:1] in ('"', "'") and text[-1:] == text[:1]:
        return text[1:-1]
    if re.fullmatch(r"-?\d+[lL]", text):
        return int(text[:-1])
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _element(text: str, nested: str | None, language: Language) -> Any:
    if nested is None:
        return untyped(text)
    if nested in {"char", "String"} and text[:1] in ('"', "'"):
        return _unquoted(text)
    return to_value(text, nested, None, language)


def _java_list(text: str, declared: str, nested: str | None) -> Any:
    if declared == "Array":
        match = re.search(r"new\s+\w+\s*\[\s*\]\s*\{(.*)\}", text, re.DOTALL)
        # BFCL keeps the quotes of strings in an array, so that only bare ones equal its accepted values
        typed = "any" if nested == "String" else nested
        return [_element(e, typed, "java") for e in split_top(match[1])] if match else text
    match = re.search(r"new\s+ArrayList<\w*>\s*\(\s*(?:Arrays\.asList|List\.of)\((.*)\)\s*\)", text, re.DOTALL)
    if match:
        return [_element(e, nested, "java") for e in split_top(match[1])]
    added = re.search(r"new\s+ArrayList<\w*>\s*\(\)\s*\{\{(.*)\}\}", text, re.DOTALL)
    if added:
        return [_element(e.strip(), nested, "java") for e in re.findall(r"add\((.+?)\)\s*;", added[1])]
    return [] if re.search(r"new\s+ArrayList<\w*>\s*\(\)", text) else text


def _java_map(text: str) -> Any:
    match = re.search(r"new\s+HashMap<.*?>\s*\(\)\s*\{\{(.*)\}\}", text, re.DOTALL)
    if match:
        pairs = [split_top(p) for p in re.findall(r"put\((.*?)\)\s*;", match[1], re.DOTALL)]
        return {_unquoted(p[0]): untyped(p[1]) for p in pairs if len(p) == 2}
    return {} if re.search(r"new\s+HashMap<.*?>\s*\(\)", text) else text


def _leading_group(text: str, opening: str) -> str | None:
    """What is inside the bracket that a text opens with; what follows its end is ignored, as BFCL does."""
    match = re.match(opening, text)
    try:
        end = next((p for p, _, depth in _scan(text) if depth == 0 and p >= match.end()), None) if match else None
    except CallSyntaxError:
        return None
    return text[match.end() : end] if match and end is not None else None


def _javascript_array(text: str, nested: str | None) -> Any:
    inside = _leading_group(text, r"\[|new\s+Array\(")
    if inside is None:
        return text
    elements = split_top(inside)
    if any(e.startswith("[") for e in elements):
        return [_javascript_array(e, None) for e in elements]
    return [_element(e, nested, "javascript") for e in elements]


def _javascript_object(text: str) -> Any:
    inside = _leading_group(text, r"\{")
    if inside is None:
        return text
    pairs = [split_top(part, ":") for part in split_top(inside)]
    return {_unquoted(p[0]): _nested_javascript(":".join(p[1:])) for p in pairs if len(p) > 1}


def _nested_javascript(text: str) -> Any:
    if text.startswith("["):
        return _javascript_array(text, None)
    return _javascript_object(text) if text.startswith("{") else untyped(text)


# ------------------------------------------------------------------------------------------------- writing


def to_source(value: Any, schema: Mapping[str, Any], language: Language) -> str:
    """A value as source text that `to_value` reads back; variables (a text where another type is declared) bare."""
    declared = str(schema["type"])
    expected = TYPES[language][declared]
    if declared == "any" or (isinstance(value, str) and expected is not str):
        return _quoted(value) if declared == "any" and not re.fullmatch(r"[\w$.]+", str(value)) else str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return _list_source(value, schema, language)
    if isinstance(value, dict):
        return _dict_source(value, language)
    suffix = {"long": "L", "float": "f" if language == "java" else "", "Bigint": "n"}.get(declared, "")
    return f"{value}{suffix}" if isinstance(value, int | float) else _quoted(value)


def _quoted(value: Any) -> str:
    return '"' + str(value) + '"'


def _list_source(value: list[Any], schema: Mapping[str, Any], language: Language) -> str:
    nested = schema.get("items", {}).get("type")
    elements = ", ".join(
        _plain_source(v) if nested in {None, "any"} or isinstance(v, list) else to_source(v, {"type": nested}, language)
        for v in value
    )
    if language == "javascript":
        return f"[{elements}]"
    if schema["type"] == "Array":
        bare = ", ".join(map(str, value)) if nested == "String" else elements
        return f"new Object[]{{{bare}}}"
    return f"new ArrayList<>(Arrays.asList({elements}))"


def _dict_source(value: dict[str, Any], language: Language) -> str:
    if language == "javascript":
        return "{" + ", ".join(f'"{k}": {_plain_source(v)}' for k, v in value.items()) + "}"
    puts = " ".join(f'put("{k}", {_plain_source(v)});' for k, v in value.items())
    return f"new HashMap<String, Object>() {{{{ {puts} }}}}"


def _plain_source(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_plain_source, value))}]"
    if isinstance(value, dict):
        return _dict_source(value, "javascript")
    return _quoted(value) if isinstance(value, str) else str(value)
