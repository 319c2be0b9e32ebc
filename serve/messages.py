"""The messages of a conversation as OpenAI's clients send them, answers that come back to us included."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cascade.tasks import Message
from serve.tools import MAX_CALLS, Toolbox, ToolCall

MAX_PARTS = 1000


class TextPart(BaseModel):
    """A part of a message's content; text is the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a request. A final one of role `assistant` is continued.

    Attributes:
        refusal: what a model said instead of an answer; read as one.
        annotations, audio, function_call: clients send back whole what an assistant said; what we never say may be
            there, but empty.
        parsed: what the official client has read out of the content; it is in the content still.
    """

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("a message needs content, unless it is the assistant's and has tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to messages of the role tool")
        return self

    def plain(self, box: Toolbox) -> Message:
        """As text alone, under one of the roles system, user, assistant and tool."""
        parts = (self.refusal or "") if self.content is None else self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        if self.tool_calls:
            text += box.shown(self.tool_calls)
        return Message("system" if self.role == "developer" else self.role, text)
