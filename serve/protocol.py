"""OpenAI's protocol: what requests may hold, and errors in its shape.

A parameter that would change the answer and is not supported is refused by name, never ignored; one that is set to
the value that means "off" is fine, since clients send those by themselves.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cascade.tasks import Message
from serve.errors import ApiError
from serve.events import Grammar
from serve.messages import ChatMessage
from serve.tools import MAX_TOOLS, NamedTool, Tool, Toolbox

MAX_BODY_BYTES = 4_000_000
MAX_VALUES, MAX_NAMES = 200_000, 2_000
"""Values in a body, and names in any one object of it: so many errors there can be at most."""
MAX_STOPS = 4
MAX_CHOICES = 8
MAX_ANSWERS = 32
"""Prompts of a request times answers to each."""
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

    @cached_property
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
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    router_threshold: float | None = Field(None, ge=0, le=1)
    router_mode: Literal["default", "turbo", "max-quality"] | None = None

    @field_validator("stop")
    @classmethod
    def _stops_say_something(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop sequence may not be empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def answers(self) -> int:
        """How many are wanted in all."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with the tokens used."""
        return bool(self.stream) and self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """The body of a chat completion request.

    Attributes:
        max_tokens, max_completion_tokens: the most tokens to answer with; the second is the newer name.
        tools: functions that the model may call; they are described as BFCL does it, which modifiers for function
            calling are trained on.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True

    @field_validator("top_logprobs")
    @classmethod
    def _are_wanted(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs to be true")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _chooses_what_there_is(cls, value: str | NamedTool | None, info: ValidationInfo) -> str | NamedTool | None:
        names = {t.function.name for t in info.data.get("tools") or ()}
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise ValueError("it names a function that is not among the tools")
        if value == "required" and not names:
            raise ValueError("there are no tools of which one could be required")
        return value

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, None for as many as the server allows."""
        return self.max_completion_tokens or self.max_tokens

    @cached_property
    def box(self) -> Toolbox:
        """The tools that may be used."""
        choice = self.tool_choice
        return Toolbox(
            [] if choice == "none" else self.tools or [],
            single=self.parallel_tool_calls is False,
            forced=choice not in (None, "none", "auto"),
            only=choice.function.name if isinstance(choice, NamedTool) else None,
        )

    @cached_property
    def asked(self) -> list[Message]:
        """What the router reads: the messages as text, tools described in front.

        What tools answered keeps its role, so that it passes for nobody's question.

        Raises:
            ApiError, RecursionError: see `Toolbox.introduce`.
        """
        return self.box.introduce([m.plain(self.box) for m in self.messages])

    @cached_property
    def conversation(self) -> list[Message]:
        """What the model reads: as `asked`, but what tools answered is the user's turn, since it knows no such role."""
        return [Message("user", m.content) if m.role == "tool" else m for m in self.asked]

    @cached_property
    def grammar(self) -> Grammar | None:
        """What the answer must keep to."""
        schema = None if self.response_format is None else self.response_format.schema_text
        if schema is None or self.box.forced:
            return self.box.grammar
        return self.box.grammar_beside(schema) if self.box else Grammar("json_schema", schema, "response_format")

    @property
    def rivals(self) -> int | None:
        """How many log-probabilities are wanted beside that of each token, None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_VALUES, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """The body of a (legacy) completion request: raw text to continue, without any chat template.

    Attributes:
        prompt: one or several, each as text or as token ids; each gets `n` answers, those to the first come first.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]
    )
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt")
    @classmethod
    def _few_answers(cls, value: Any, info: ValidationInfo) -> Any:
        several = isinstance(value, list) and not isinstance(value[0], int)
        if (len(value) if several else 1) * (info.data.get("n") or 1) > MAX_ANSWERS:
            raise ValueError(f"at most {MAX_ANSWERS} answers are given to a request: prompts times n")
        return value

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]  # type: ignore[arg-type]
        return [p if isinstance(p, str) else tuple(p) for p in self.prompt]  # type: ignore[arg-type]

    @property
    def answers(self) -> int:
        """How many are wanted in all."""
        return len(self.prompts) * (self.n or 1)

    @cached_property
    def asked(self) -> list[Message]:
        """What the router reads: all texts, since a request has one route."""
        return [Message("user", "\n\n".join(p for p in self.prompts if isinstance(p, str)))]

    @property
    def grammar(self) -> None:
        """Raw text keeps to nothing."""
        return

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

    @field_validator("answer")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("no task can be made of a blank answer")
        return value


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
    _check_size(raw)
    known = {k: v for k, v in raw.items() if k not in _IGNORED}
    for name in [k for k in known if k not in kind.model_fields]:
        _refuse_unless_off(name, known.pop(name))
    try:
        return kind.model_validate_json(json.dumps(known))
    except ValidationError as error:
        raise _as_api_error(error) from None
    except (ValueError, RecursionError):  # a lone surrogate, which no text can be made of; or nesting without end
        raise ApiError(400, "the request holds what cannot be read", code="invalid_json") from None


def _check_size(raw: dict[str, Any]) -> None:
    """Refuse what is large not by its texts but by the number of values: each costs far more than its few bytes."""
    left, waiting = MAX_VALUES, [(name, value) for name, value in raw.items() if isinstance(value, list | dict)]
    while waiting:
        name, value = waiting.pop()
        left -= len(value)
        if left < 0 or (isinstance(value, dict) and len(value) > MAX_NAMES):
            message = f"'{name}' has too many values: {MAX_VALUES} are allowed, and {MAX_NAMES} in one object."
            raise ApiError(400, message, code="invalid_value", param=name)
        inner = value.values() if isinstance(value, dict) else value
        waiting += [(name, v) for v in inner if isinstance(v, list | dict)]


_KINDS = frozenset({"str", "int", "NamedTool"})


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
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union, what is wrong with the alternative of the right type.
    first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
    # What pydantic calls the alternatives of a union are no names in the body.
    place = [str(p) for p in first["loc"] if not (isinstance(p, str) and (p in _KINDS or "[" in p))]
    param = place[0] if place else None
    for part in place[1:]:
        param = f"{param}[{part}]" if part.isdigit() else f"{param}.{part}"
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid value for '{param}': {message}.", code="invalid_value", param=param)
