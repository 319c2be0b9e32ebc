"""A grammar of function calls as Python writes them, `[f(a=1), g(b='x')]`, made of the functions' JSON schemas.

Arguments come in the order of the schema, those that are not required may be left out. Of schemas it keeps to types,
enumerations, nested objects, lists, alternatives and references; what it does not know may be any value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_RULES = 3000
"""Beyond so many, values may be any: what compiling costs is bounded."""
_BASICS = r"""
value: STRING | NUMBER | BOOL | "None" | list | dict
list: "[" (value (SEP value)*)? "]"
dict: "{" (STRING COLON value (SEP STRING COLON value)*)? "}"
STRING: /'([^'\\\x00-\x1f\x7f]|\\[\\'"nrt])*'/ | /"([^"\\\x00-\x1f\x7f]|\\[\\'"nrt])*"/
INT: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/
BOOL: "True" | "False"
SEP: /, ?/
COLON: /: ?/
"""
_AS_ALONE = {"x-guidance": {"whitespace_flexible": False}}
"""Has a JSON schema within a grammar compiled as `serve.compiles` does one by itself."""
_TYPES = {
    "string": "STRING",
    "integer": "INT",
    "number": "NUMBER",
    "float": "NUMBER",
    "boolean": "BOOL",
    "null": '"None"',
}


def calls_grammar(
    functions: Sequence[tuple[str, Mapping[str, Any]]], *, single: bool, otherwise: str | None = None
) -> str:
    """The grammar (llguidance's Lark) of at least one call.

    Args:
        functions: name and schema of the arguments of each.
        single: exactly one call.
        otherwise: JSON schema of what may be said instead.
    """
    calls: list[tuple[str, list[str]]] = []
    for name, schema in functions:
        made = _Rules(schema, len(calls))
        arguments = made.members(schema, lambda key: f"{key}=")
        calls.append((f"{_quoted(name + '(')} {arguments} {_quoted(')')}", made.lines))
    lines = ["start: calls" if otherwise is None else "start: calls | answer"]
    if otherwise is not None:
        lines.append(f"answer: %json {json.dumps(json.loads(otherwise) | _AS_ALONE)}")
    lines.append(f'calls: "[" call {"" if single else "(SEP call)* "}"]"')
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(calls))))
    for i, (call, rules) in enumerate(calls):
        lines += [f"call_{i}: {call}", *rules]
    return "\n".join(lines) + "\n" + _BASICS


class _Rules:
    """Rules for the values of one function's arguments.

    Attributes:
        lines: the rules that have been made.
    """

    def __init__(self, root: Mapping[str, Any], number: int) -> None:
        self.lines: list[str] = []
        self._root, self._number, self._made = root, number, 0
        self._references: dict[str, str] = {}

    def members(self, schema: Mapping[str, Any], begun: Any) -> str:
        """A rule for the members of an object, in order, parted by commas.

        Args:
            begun: makes what is written before a member's value of its key.
        """
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            return '""'
        required = schema.get("required")
        needed = set(map(str, required)) if isinstance(required, list) else set()
        head = tail = '""'
        for key, value in reversed(properties.items()):
            member = f"{_quoted(begun(key))} {self.value(value)}"
            if key in needed:
                head, tail = self._rule(f"{member} {tail}"), self._rule(f"SEP {member} {tail}")
            else:
                head, tail = self._rule(f"{member} {tail} | {head}"), self._rule(f"(SEP {member})? {tail}")
        return head

    def value(self, schema: Any) -> str:
        """A rule, or a terminal, for a value."""
        if not isinstance(schema, dict) or self._made > _MAX_RULES:
            return "value"
        if isinstance(schema.get("$ref"), str):
            return self._reference(schema["$ref"])
        options = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(options, list) and options:
            return self._rule(" | ".join(_quoted(repr(option)) for option in options))
        several = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(several, list) and several:
            return self._rule(" | ".join(self.value(option) for option in several))
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            return self._rule(" | ".join(self.value({**schema, "type": one}) for one in kind))
        if kind in ("array", "tuple") and isinstance(schema.get("items"), dict):
            item = self.value(schema["items"])
            optional = "" if schema.get("minItems") else "?"
            return self._rule(f'"[" ({item} (SEP {item})*){optional} "]"')
        if kind in ("object", "dict"):
            inner = self.members(schema, lambda key: f"{key!r}: ")
            return "dict" if inner == '""' else self._rule(f'"{{" {inner} "}}"')
        return _TYPES.get(kind, "value") if isinstance(kind, str) else "value"

    def _reference(self, target: str) -> str:
        """The rule of a part of the schema, made once, so that it may refer to itself."""
        if target not in self._references:
            found: Any = self._root if target.startswith("#/") else None
            for part in target.removeprefix("#/").split("/"):
                found = found.get(part) if isinstance(found, dict) else None
            name = self._references[target] = self._name()
            self.lines.append(f"{name}: {self.value(found)}")
        return self._references[target]

    def _rule(self, content: str) -> str:
        name = self._name()
        self.lines.append(f"{name}: {content}")
        return name

    def _name(self) -> str:
        self._made += 1
        return f"r_{self._number}_{self._made}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
