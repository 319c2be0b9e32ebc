"""Tools in, tool calls out: functions are described, and calls are read, as the Berkeley leaderboard (BFCL) does it.

That is what a modifier for function calling is trained on, and a prompt it has never seen would waste what it knows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cascade.benchmarks.bfcl import SYSTEM_PROMPT
from cascade.scoring.calls import Call, CallSyntaxError, format_calls, parse_calls
from cascade.tasks import Message

_NAME = r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=_NAME)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class CalledFunction(BaseModel):
    """A call: `arguments` is JSON as text."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=_NAME)
    arguments: str


class ToolCall(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(extra="forbid")
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @staticmethod
    def shown(calls: Sequence[ToolCall]) -> str:
        """Calls in the form in which the model writes them."""
        return format_calls([Call(c.function.name, _arguments(c.function.arguments)) for c in calls])


def with_tools(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation with the tools described in its system message, before what that says itself."""
    if not tools:
        return messages
    functions = [t.function.model_dump(include={"name", "description", "parameters"}) for t in tools]
    described = SYSTEM_PROMPT.format(functions=json.dumps(functions, indent=4))
    own = [m.content for m in messages if m.role == "system"]
    return [Message("system", "\n\n".join([described, *own])), *(m for m in messages if m.role != "system")]


def read_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """The calls that an answer consists of; none if it is anything else, or calls what there is not."""
    names = {t.function.name for t in tools}
    try:
        calls = parse_calls(text, lenient=False)
        if not calls or any(c.name not in names for c in calls):
            return []
        return [
            ToolCall(
                id=f"call_{uuid.uuid4().hex[:24]}",
                function=CalledFunction(name=c.name, arguments=json.dumps(c.arguments)),
            )
            for c in calls
        ]
    except (CallSyntaxError, TypeError, ValueError):
        return []


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}
