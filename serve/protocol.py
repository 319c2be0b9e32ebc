"""OpenAI's chat protocol: what requests may hold, what answers look like, and errors in its shape.

A parameter that would change the answer and is not supported is refused by name, never ignored; one that is set to
the value that means "off" is fine, since clients send those by themselves.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cascade.tasks import Message, Route

MAX_BODY_BYTES = 4_000_000
MAX_STOPS = 4
ROUTED = "cascade"
"""The model id that lets the router choose."""

_OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
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

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    Attributes:
        status: HTTP status.
        param: name of the parameter at fault, if one is.
        code: OpenAI's word for it.
        retry_after_s: sent as Retry-After.
        known_headers: what was known of the route when it failed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s
        self.known_headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        kinds = {404: "invalid_request_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class TextPart(BaseModel):
    """A part of a message's content; text is the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a request. A final one of role `assistant` is continued."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(_ROLES[self.role], text)


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """The body of a chat completion request.

    Attributes:
        model: "cascade" routes; "base" or a modifier's domain is taken at its word.
        max_tokens, max_completion_tokens: the most tokens to answer with; the second is the newer name.
        seed: sampling is deterministic; without a seed one is drawn per request.
        router_threshold: (Cascade's own) confidence below which the base answers, instead of the router's.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    router_threshold: float | None = Field(None, ge=0, le=1)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop sequences are allowed")
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop sequence may not be empty")
        return value

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, None for as many as the server allows."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def conversation(self) -> list[Message]:
        return [m.plain() for m in self.messages]


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read and check the body of a chat completion request.

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
    for name in [k for k in known if k not in ChatRequest.model_fields]:
        _refuse_unless_off(name, known.pop(name))
    try:
        return ChatRequest.model_validate_json(json.dumps(known))
    except ValidationError as error:
        raise _as_api_error(error) from None
    except ValueError:  # a lone surrogate, which no text can be made of
        raise ApiError(400, "the request holds characters that are not valid Unicode", code="invalid_json") from None


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


# ------------------------------------------------------------------------------------------------- answers


def route_headers(route: Route) -> dict[str, str]:
    """Who answers, how sure the router is, and why."""
    return {
        "x-cascade-route": route.choice,
        "x-cascade-confidence": f"{route.confidence:.4f}",
        "x-cascade-reason": route.reason,
    }


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class AnswerShape(BaseModel):
    """What all parts of one answer share: id, time and the model that answers."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, request_id: str, model: str) -> AnswerShape:
        return cls(id=f"chatcmpl-{request_id}", created=int(time.time()), model=model)

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """A chat completion."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._of("chat.completion", choices=[choice], usage=usage.model_dump())

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        """An event of a streamed chat completion."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse(self._of("chat.completion.chunk", choices=[choice]))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last event of a stream whose client asked for usage."""
        return sse(self._of("chat.completion.chunk", choices=[], usage=usage.model_dump()))

    def _of(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **more}


DONE = b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def model_list(versions: dict[str, str], created: int) -> dict[str, Any]:
    """The answer of /v1/models.

    Args:
        versions: current version per modifier.
        created: start of the server, seconds since 1970.
    """
    ids = [(ROUTED, ""), ("base", ""), *sorted(versions.items())]
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "cascade"} | ({"version": v} if v else {})
        for name, v in ids
    ]
    return {"object": "list", "data": data}
