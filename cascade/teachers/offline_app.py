"""The offline teacher's HTTP side: the part of the OpenAI protocol that its clients use.

/v1/models, /v1/chat/completions (plain and streamed), /health, and /requests, which counts what was answered.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cascade.config import AnswerKey
from cascade.tasks import Message
from cascade.teachers.answer_key import Replayer, prompt_hash
from cascade.teachers.conversation import estimate_prompt_tokens, estimate_tokens

_WINDOW_S = 60.0
_CHUNK = 16


class OfflineModel(BaseModel):
    """One model of the offline teacher: its name, what it knows, how often it may be asked."""

    name: str
    ability: AnswerKey
    requests_per_minute: int


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _ChatMessage(BaseModel):
    role: str
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content)


class _ChatRequest(BaseModel):
    model: str
    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    seed: int | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @property
    def prompt(self) -> str:
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")


class _RequestWindow:
    """Counts requests over the last minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._times: deque[float] = deque()

    def admit(self, now: float) -> float:
        """0 if one more request is within the limit, else the seconds to wait."""
        while self._times and self._times[0] <= now - _WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self._per_minute:
            return self._times[0] + _WINDOW_S - now
        self._times.append(now)
        return 0.0


class OfflineTeacher:
    """The handlers and their state: limits and counts of each model."""

    def __init__(self, replayer: Replayer, models: Sequence[OfflineModel]) -> None:
        self._replayer = replayer
        self._models = {m.name: m for m in models}
        self._windows = {m.name: _RequestWindow(m.requests_per_minute) for m in models}
        self._answered: Counter[tuple[str, str, int]] = Counter()
        self._limited: Counter[str] = Counter()

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/health", self.health),
                Route("/requests", self.requests),
            ]
        )

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "answer-key"} for name in self._models]
        return JSONResponse({"object": "list", "data": data})

    async def requests(self, request: Request) -> Response:
        """Per model: requests answered, how many of them had been answered before, and how many met the limit."""
        counts = {name: {"answered": 0, "repeated": 0, "limited": self._limited[name]} for name in self._models}
        for (name, _, _), times in self._answered.items():
            counts[name]["answered"] += times
            counts[name]["repeated"] += times - 1
        return JSONResponse(counts)

    async def chat(self, request: Request) -> Response:
        try:
            body = _ChatRequest.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "invalid_request_error")
        model = self._models.get(body.model)
        if model is None:
            return _error(404, f"no model {body.model!r}; there are {', '.join(self._models)}", "model_not_found")
        if wait := self._windows[model.name].admit(time.monotonic()):
            self._limited[model.name] += 1
            headers = {"Retry-After": str(math.ceil(wait))}
            return _error(429, f"over {model.requests_per_minute} requests per minute", "rate_limit_exceeded", headers)
        attempt = body.seed or 0
        text = self._replayer.reply(model.name, model.ability, body.prompt, attempt)
        await asyncio.sleep(model.ability.latency_ms / 1000)
        self._answered[model.name, prompt_hash(body.prompt), attempt] += 1
        return _stream(body, text) if body.stream else JSONResponse(_completion(body, text))


def _completion(body: _ChatRequest, text: str) -> dict[str, Any]:
    text, reason = _within_limit(body, text)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
    return _head(body, "chat.completion") | {"choices": [choice], "usage": _usage(body, text)}


def _stream(body: _ChatRequest, text: str) -> StreamingResponse:
    text, reason = _within_limit(body, text)
    head = _head(body, "chat.completion.chunk")

    def event(delta: Mapping[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    async def events() -> AsyncIterator[str]:
        yield event({"role": "assistant", "content": ""})
        for start in range(0, len(text), _CHUNK):
            yield event({"content": text[start : start + _CHUNK]})
        yield event({}, reason)
        if body.stream_options.include_usage:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(body, text)})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _within_limit(body: _ChatRequest, text: str) -> tuple[str, Literal["stop", "length"]]:
    """The text cut at the request's limit of tokens, as counted by `estimate_tokens`, and why it ended."""
    limit = body.max_completion_tokens or body.max_tokens
    if limit is None or estimate_tokens(text) <= limit:
        return text, "stop"
    return text[: limit * 4], "length"


def _usage(body: _ChatRequest, text: str) -> dict[str, Any]:
    prompt = estimate_prompt_tokens(Message(m.role, m.text) for m in body.messages)
    completion = estimate_tokens(text)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _head(body: _ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": body.model}


def _error(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
