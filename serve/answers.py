"""OpenAI's protocol: what answers look like, whole and in parts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cascade.tasks import Route
from serve.events import TokenLogprob
from serve.protocol import ROUTED
from serve.tools import ToolCall

DONE = b"data: [DONE]\n\n"
_LINE_ENDS = tuple((character, f"\\u{ord(character):04x}") for character in "\x85\u2028\u2029")
"""What JSON may hold as it is, and some clients (httpx's `iter_lines`) take for the end of a line."""


def route_headers(route: Route) -> dict[str, str]:
    """Who answers, how sure the router is, and why."""
    return {
        "x-cascade-route": route.choice,
        "x-cascade-confidence": f"{route.confidence:.4f}",
        "x-cascade-reason": route.reason,
    }


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens of one request."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True)
class Said:
    """One finished answer: its index among the n, text, finish reason, and what else was asked for."""

    index: int
    text: str
    finish_reason: str
    logprobs: Sequence[TokenLogprob] | None = None
    calls: Sequence[ToolCall] = ()


@dataclass(frozen=True)
class Shape:
    """What all parts of one answer share; this one is a chat completion's.

    Attributes:
        model: that answers.
        promises_usage: its stream ends with the tokens used; until then every event says that they come.
    """

    request_id: str
    model: str
    created: int
    promises_usage: bool = False

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @classmethod
    def new(cls, request_id: str, model: str, promises_usage: bool = False) -> Shape:
        return cls(request_id, model, int(time.time()), promises_usage)

    def whole(self, said: Sequence[Said], used: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return self._of(self.kind, choices=[self.choice(s) for s in said], usage=used)

    def choice(self, said: Said) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.calls:
            message |= {"content": None, "tool_calls": [c.model_dump() for c in said.calls]}
        reason = "tool_calls" if said.calls else said.finish_reason
        logprobs = _chat_logprobs(said.logprobs)
        return {"index": said.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def first(self, index: int) -> bytes:
        """The event that opens an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def part(self, index: int, text: str, tokens: Sequence[TokenLogprob] | None, start: int = 0) -> bytes:
        """An event with more text.

        Args:
            start: letters of the answer's tokens before these.
        """
        return self._chunk(index, {"content": text}, None, _chat_logprobs(tokens))

    def last(self, said: Said) -> bytes:
        """The event that closes an answer; calls come whole, with the log-probabilities of what they were read from."""
        if not said.calls:
            return self._chunk(said.index, {}, said.finish_reason)
        calls = [c.model_dump() | {"index": i} for i, c in enumerate(said.calls)]
        logprobs = _chat_logprobs(said.logprobs)
        closing = self._chunk(said.index, {}, "tool_calls")
        return self._chunk(said.index, {"tool_calls": calls}, None, logprobs) + closing

    def used(self, used: dict[str, int]) -> bytes:
        """The last event of a stream whose client asked for usage."""
        return sse(self._of(self.chunk_kind, choices=[], usage=used))

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse(self._of(self.chunk_kind, choices=[choice]))

    def _of(self, kind: str, **more: Any) -> dict[str, Any]:
        fixed = {"id": f"{self.prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.model}
        return fixed | ({"usage": None} if self.promises_usage else {}) | more


class CompletionShape(Shape):
    """That of a (legacy) completion."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, said: Said) -> dict[str, Any]:
        return {
            "index": said.index,
            "text": said.text,
            "logprobs": None if said.logprobs is None else _legacy(said.logprobs),
            "finish_reason": said.finish_reason,
        }

    def first(self, index: int) -> bytes:
        return b""

    def part(self, index: int, text: str, tokens: Sequence[TokenLogprob] | None, start: int = 0) -> bytes:
        logprobs = None if tokens is None else _legacy(tokens, start)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return sse(self._of(self.kind, choices=[choice]))

    def last(self, said: Said) -> bytes:
        choice = {"index": said.index, "text": "", "logprobs": None, "finish_reason": said.finish_reason}
        return sse(self._of(self.kind, choices=[choice]))


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isascii():
        for character, escaped in _LINE_ENDS:
            text = text.replace(character, escaped)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


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


def _chat_logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    return None if tokens is None else {"content": [_entry(t) for t in tokens], "refusal": None}


def _entry(token: TokenLogprob) -> dict[str, Any]:
    rivals = [_one(text, logprob) for text, logprob in token.rivals]
    return _one(token.token, token.logprob) | {"top_logprobs": rivals}


def _one(text: str, logprob: float) -> dict[str, Any]:
    return {"token": _shown(text), "logprob": logprob, "bytes": list(text.encode("utf-8", "surrogateescape"))}


def _legacy(tokens: Sequence[TokenLogprob], start: int = 0) -> dict[str, Any]:
    return {
        "tokens": [_shown(t.token) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{_shown(text): logprob for text, logprob in t.rivals} for t in tokens],
        "text_offset": list(accumulate((len(t.token) for t in tokens), initial=start))[:-1],
    }


def _shown(token: str) -> str:
    """A token as text: bytes that are no whole character (see `TokenLogprob`) as a decoder shows them."""
    return token.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
