"""Tools in, tool calls out: functions are described, and calls are read, as the Berkeley leaderboard (BFCL) does it.

That is what a modifier for function calling is trained on, and a prompt it has never seen would waste what it knows.
Calls are written as Python there, so a name that Python cannot read (`get-weather`, `3d`, `class`) goes by another one
between us and the model.
"""

from __future__ import annotations

import json
import keyword
import re
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cascade.benchmarks.offered_functions import with_functions
from cascade.scoring.calls import Call, CallSyntaxError, format_calls, parse_calls
from cascade.tasks import Message
from serve.call_grammar import calls_grammar
from serve.errors import ApiError
from serve.events import Grammar

MAX_TOOLS = MAX_CALLS = 128
MAX_DESCRIBED = 1_000_000
"""Characters that all tools' descriptions may have: indented as BFCL does it, nesting makes many of few."""
_NAME = r"^[A-Za-z0-9_.-]{1,64}$"


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The schema of its arguments."""
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(extra="forbid")
    name: str


class NamedTool(BaseModel):
    """The one tool that is to be called."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(BaseModel):
    """A call: `arguments` is JSON as text, which the official client may have read already."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=_NAME)
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True)


class ToolCall(BaseModel):
    """A call that the assistant made; clients that put streams together leave the index in."""

    model_config = ConfigDict(extra="forbid")
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, exclude=True)


@dataclass(frozen=True)
class _Alias:
    """A function, its name among us and the model, and the names of its arguments that differ there."""

    function: Function
    name: str
    arguments: dict[str, str]

    @property
    def described(self) -> dict[str, Any]:
        """As BFCL describes it."""
        schema = dict(self.function.arguments)
        if self.arguments:
            schema["properties"] = {self.arguments.get(k, k): v for k, v in schema["properties"].items()}
            if isinstance(required := schema.get("required"), list):
                schema["required"] = [self.arguments.get(k, k) for k in required if isinstance(k, str)]
        return {"name": self.name, "description": self.function.description or "", "parameters": schema}


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request, under names that the model can write.

    Attributes:
        single: whether at most one call is wanted.
        forced: whether there must be a call.
        only: the one tool that is to be called.
    """

    tools: Sequence[Tool] = ()
    single: bool = False
    forced: bool = False
    only: str | None = None
    _aliases: dict[str, _Alias] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = _renamed([t.function.name for t in self.tools], dotted=True)
        for function in (t.function for t in self.tools):
            properties = function.arguments.get("properties")
            arguments = _renamed(properties if isinstance(properties, dict) else ())
            self._aliases[function.name] = _Alias(function, names.get(function.name, function.name), arguments)

    def __bool__(self) -> bool:
        return bool(self.tools)

    def introduce(self, messages: list[Message]) -> list[Message]:
        """The conversation with the tools described in its system message, before what that says itself.

        Raises:
            ApiError: their descriptions are longer than `MAX_DESCRIBED`.
            RecursionError: one is nested too deeply.
        """
        if not self.tools:
            return messages
        functions = [self._aliases[t.function.name].described for t in self.tools]
        return with_functions(messages, _indented(functions))

    def shown(self, calls: Sequence[ToolCall]) -> str:
        """Calls in the form in which the model writes them."""
        return format_calls([self._plain(c.function) for c in calls])

    def _plain(self, called: CalledFunction) -> Call:
        alias, arguments = self._aliases.get(called.name), _arguments(called.arguments)
        names = _renamed(arguments) if alias is None else alias.arguments
        name = _safe(called.name, dotted=True) if alias is None else alias.name
        return Call(name, {names.get(k, k): v for k, v in arguments.items()})

    def read(self, text: str, cut_off: bool = False) -> list[ToolCall]:
        """The calls that an answer consists of; none if it is anything else, or calls what there is not.

        Args:
            cut_off: whether more may have been to come; then the list's end must be there.
        """
        if cut_off and not text.strip("`\n ").endswith("]"):
            return []
        aliases = {alias.name: alias for alias in self._aliases.values()}
        try:
            calls = parse_calls(text, lenient=False, whole=True)
            if any(c.name not in aliases for c in calls):
                return []
            return [_called(aliases[c.name], c) for c in (calls[:1] if self.single else calls)]
        except (CallSyntaxError, TypeError, ValueError):
            return []

    @property
    def grammar(self) -> Grammar | None:
        """What an answer keeps to that must be a call; None where any answer will do."""
        return Grammar("lark", self._calls_grammar(), "tool_choice") if self.forced else None

    def grammar_beside(self, schema: str) -> Grammar:
        """What an answer keeps to that is either a call or JSON of a schema."""
        return Grammar("lark", self._calls_grammar(schema), "response_format")

    def _calls_grammar(self, otherwise: str | None = None) -> str:
        aliases = [a for name, a in self._aliases.items() if self.only in (None, name)]
        functions = [(a.name, a.described["parameters"]) for a in aliases]
        return calls_grammar(functions, single=self.single or self.only is not None, otherwise=otherwise)


def _indented(functions: Sequence[dict[str, Any]]) -> str:
    """Functions as JSON, given up as soon as it is too long."""
    parts, length = list[str](), 0
    for part in json.JSONEncoder(indent=4).iterencode(functions):
        parts.append(part)
        length += len(part)
        if length > MAX_DESCRIBED:
            message = f"The tools' descriptions have more than {MAX_DESCRIBED} characters, indented."
            raise ApiError(400, message, code="invalid_value", param="tools")
    return "".join(parts)


def _called(alias: _Alias, call: Call) -> ToolCall:
    """
    Raises:
        TypeError, ValueError: an argument is nothing that JSON has, an infinite number for instance.
    """
    back = {mine: theirs for theirs, mine in alias.arguments.items()}
    arguments = json.dumps({back.get(k, k): v for k, v in call.arguments.items()}, allow_nan=False)
    called = CalledFunction(name=alias.function.name, arguments=arguments)
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=called)


def _renamed(names: Iterable[str], dotted: bool = False) -> dict[str, str]:
    """Those of the names that Python cannot read, with what they are called instead."""
    taken = {name for name in names if _safe(name, dotted) == name}
    return {name: _unused(_safe(name, dotted), taken) for name in names if _safe(name, dotted) != name}


def _safe(name: str, dotted: bool = False) -> str:
    """A name that Python reads as just that; dots part it if it may be `dotted`."""
    parts = []
    for part in name.split(".") if dotted else [name]:
        plain = part if part == unicodedata.normalize("NFKC", part) and part.isidentifier() else None
        plain = plain or re.sub(r"\W|^(?=\d)|^$", "_", part, flags=re.ASCII)
        parts.append(f"{plain}_" if keyword.iskeyword(plain) else plain)
    return ".".join(parts)


def _unused(name: str, taken: set[str]) -> str:
    """The name, or with a number after it if it is taken; it is taken from then on."""
    number, found = 2, name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}
