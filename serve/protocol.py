"""OpenAI's protocol: what requests may hold, and errors in its shape.

A parameter that would change the answer and is not supported is refused by name, never ignored; one that is set to
the value that means "off" is fine, since clients send those by themselves.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cascade.tasks import Message
from serve.errors import ApiError
from serve.tools import Tool, ToolCall, with_tools

MAX_BODY_BYTES = 4_000_000
MAX_STOPS = 4
MAX_CHOICES = 8
MAX_SCHEMA = 100_000
"""Characters of a JSON schema."""
ROUTED = "cascade"
"""The model id that lets the router choose."""

_OFF: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "web_search_options": (),
    "moderation": (),
}
"""Parameters of the protocol that are not supported, with the values that ask for nothing."""

_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Parameters that never change an answer."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "user"}


class TextPart(BaseModel):
    """A part of a message's content; text is the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a request. A final one of role `assistant` is continued."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content, unless it is the assistant's and has tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to messages of the role tool")
        return self

    def plain(self) -> Message:
        """As text alone; what tools answered is the user's turn to a model that knows no such role."""
        parts = [] if self.content is None else self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        if self.tool_calls:
            text += ToolCall.shown(self.tool_calls)
        return Message(_ROLES[self.role], text)


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(BaseModel):
    """The schema of a `response_format`; it is always kept to, whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: str = Field("answer", max_length=64)
    description: str | None = None
    body: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form that an answer must have."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and the other way round")
        if self.schema_text and len(self.schema_text) > MAX_SCHEMA:
            raise ValueError(f"a schema may have {MAX_SCHEMA} characters")
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON schema, None where any text will do."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.body)


class GenerationRequest(BaseModel):
    """What the bodies of all requests for text share.

    Attributes:
        model: "cascade" routes; "base" or a modifier's domain is taken at its word.
        n: answers to the same request.
        seed: sampling is deterministic; without a seed one is drawn per request.
        router_threshold: (Cascade's own) confidence below which the base answers, instead of the router's.
        router_mode: (Cascade's own) "turbo" asks a modifier only where it is surely better, "max-quality" wherever it
            may be.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    router_threshold: float | None = Field(None, ge=0, le=1)
    router_mode: Literal["default", "turbo", "max-quality"] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop sequences are allowed")
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop sequence may not be empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """The body of a chat completion request.

    Attributes:
        max_tokens, max_completion_tokens: the most tokens to answer with; the second is the newer name.
        tools: functions that the model may call; they are described as BFCL does it, which modifiers for function
            calling are trained on.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, None for as many as the server allows."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def usable_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def conversation(self) -> list[Message]:
        """The messages as text, tools described in front."""
        return with_tools([m.plain() for m in self.messages], self.usable_tools)

    @property
    def rivals(self) -> int | None:
        """How many log-probabilities are wanted beside that of each token, None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """The body of a (legacy) completion request: raw text to continue, without any chat template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with."""
        return self.max_tokens

    @property
    def rivals(self) -> int | None:
        """See `ChatRequest.rivals`."""
        return self.logprobs


class Feedback(BaseModel):
    """The body of a feedback request: was the answer to a request good, and what would have been right?"""

    model_config = ConfigDict(extra="forbid", strict=True)
    request_id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")
    rating: Literal["good", "bad"]
    comment: str | None = Field(None, max_length=2000)
    answer: str | None = Field(None, max_length=20_000)


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: bytes) -> Body:
    """Read and check the body of a request.

    Raises:
        ApiError: 400 naming the parameter; 413 if the body is too large.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ApiError(413, f"the request body has {len(body)} bytes; at most {MAX_BODY_BYTES} are allowed")
    try:
        raw = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, "the request body must be a JSON object", code="invalid_json")
    known = {k: v for k, v in raw.items() if k not in _IGNORED}
    for name in [k for k in known if k not in kind.model_fields]:
        _refuse_unless_off(name, known.pop(name))
    try:
        return kind.model_validate_json(json.dumps(known))
    except ValidationError as error:
        raise _as_api_error(error) from None
    except (ValueError, RecursionError):  # a lone surrogate, which no text can be made of; or nesting without end
        raise ApiError(400, "the request holds what cannot be read", code="invalid_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_unless_off(name: str, value: Any) -> None:
    if name not in _OFF:
        raise ApiError(400, f"Unrecognized request argument supplied: {name}", code="unknown_parameter", param=name)
    if value is not None and value not in _OFF[name]:
        raise ApiError(
            400,
            f"Unsupported parameter: '{name}' is not supported by this server. Leave it out.",
            code="unsupported_parameter",
            param=name,
        )


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(p) for p in first["loc"] if p not in ("str", "list[str]", "list[TextPart]")]
    param = place[0] if place else None
    for part in place[1:]:
        param = f"{param}[{part}]" if part.isdigit() else f"{param}.{part}"
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid value for '{param}': {message}.", code="invalid_value", param=param)
