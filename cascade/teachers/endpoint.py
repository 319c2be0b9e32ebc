"""One OpenAI-compatible endpoint: a single call, what its response or failure means, and whether it is well."""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2
import openai

from cascade.config import ANSWER_KEY, Endpoint, Teacher
from cascade.errors import TeacherError
from cascade.tasks import Message
from cascade.teachers.conversation import estimate_prompt_tokens, estimate_tokens
from cascade.teachers.ledger import RequestOutcome
from cascade.teachers.limits import Limiter

_DOWN_AFTER = 10
_REST_S = 15.0
_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_LONGEST_RETRY_AFTER_S = 600.0
REFUSED_IN_A_ROW = 20
"""After so many it is the endpoint that takes none, not the requests that are wrong."""
_PATIENCE = 1.1
_NOT_SENT: Any = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
"""Headers that the SDK would take from the environment, whoever is asked."""
_CUT = ("length", "model_length")
_BROKEN_OFF = ("error", "insufficient_system_resource", "abort")
"""Words of OpenRouter, DeepSeek and vLLM for a generation that failed on their side, in a response with status 200."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response that the endpoint gave and charges for, usable or not."""

    text: str
    outcome: RequestOutcome
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a response.

    Attributes:
        kind: "limited" (429: wait and ask again); "broken" (5xx, timeout, connection, nonsense: ask again); "refused"
            (this request is not accepted); "unusable" (key, account or model refused: the endpoint is out).
        retry_after: seconds that the endpoint asked to wait, None if it did not say.
        charged: whether the request may cost something all the same: it was sent, and nobody knows what became of it.
    """

    kind: Literal["limited", "broken", "refused", "unusable"]
    detail: str
    retry_after: float | None = None
    charged: bool = False


def api_key(endpoint: Endpoint) -> str:
    """The key for an endpoint from the environment, without the white space around it; "" if it has none.

    Raises:
        TeacherError: no header can carry it.
    """
    name = endpoint.api_key_env
    key = os.environ.get(name, "").strip() if name else ""
    for position, character in enumerate(key, 1):
        if not (character.isascii() and character.isprintable()):
            raise TeacherError(
                f"the environment variable {name} holds no API key: its character {position}, {character!r}, is not "
                "printable ASCII; set it to the key alone, on one line"
            )
    return key


class EndpointClient:
    """One endpoint with its limiter and its circuit breaker.

    After 10 failures in a row it rests (others are asked first) until a call succeeds or the rest is over. A refused
    key or an unknown model takes it out for good.

    Attributes:
        refusal: why the endpoint is out for good, "" if it is not.
        trouble: its last failure.
        answered_at: when it last gave a response, by the monotonic clock.
    """

    def __init__(self, endpoint: Endpoint, url: str, teacher: Teacher, limiter: Limiter) -> None:
        self.endpoint, self.limiter = endpoint, limiter
        self.refusal = self.trouble = ""
        self._url, self._teacher = url, teacher
        self._failures = self._refused = 0
        self._failed_at, self.answered_at = 0.0, -math.inf
        self._client: openai.AsyncOpenAI | None = None

    @property
    def has_answered(self) -> bool:
        """Whether it has given any response to this process."""
        return self.answered_at > -math.inf

    @property
    def is_down(self) -> bool:
        """Whether it has failed so often in a row that nobody seems to be there."""
        return self._failures >= _DOWN_AFTER

    @property
    def resting(self) -> bool:
        """Whether others should be asked first."""
        return self.is_down and time.monotonic() - self._failed_at < _REST_S

    def backoff(self, failures: int) -> float:
        """Seconds to wait after a request's n-th failure: exponential, with jitter of half to one."""
        return min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)

    async def complete(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Response | Failure:
        """One call, without retries."""
        began = time.monotonic()
        try:
            body = {"model": self._teacher.name, "messages": [m.as_dict() for m in messages], **parameters}
            # `chat.completions.create` would send the same, after checking types for a millisecond
            # and its timeout counts from byte to byte, which the blank lines of a busy endpoint put off for ever
            async with asyncio.timeout(_PATIENCE * self._teacher.timeout_s):
                raw = await self.api.post(
                    "/chat/completions", body=body, options={"headers": self._headers()}, cast_to=object
                )
            result: Response | Failure = read_response(raw, estimate_prompt_tokens(messages), time.monotonic() - began)
        except openai.APIStatusError as error:
            result = self.status(error)
        except openai.APIConnectionError as error:  # a timeout is one too
            result = self._broke_off(error)
        except TimeoutError:
            result = self._late()
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:  # before anything is sent
            result = Failure("refused", f"cannot be sent to {self._url}: {error}")
        except (openai.OpenAIError, ValueError) as error:
            result = Failure("broken", f"nonsense from {self._url}: {error}", charged=True)
        self.judge(result if isinstance(result, Failure) else None)
        return result

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    @property
    def api(self) -> openai.AsyncOpenAI:
        """The official client, opened at first use, with its own retries off."""
        if self._client is None:
            own = self.endpoint.base_url == ANSWER_KEY
            local = own or urlsplit(self._url).hostname in ("127.0.0.1", "localhost", "::1")
            self._client = openai.AsyncOpenAI(
                base_url=self._url,
                api_key=api_key(self.endpoint) or "none",
                max_retries=0,
                timeout=self._teacher.timeout_s,
                default_headers=_NOT_SENT,
                http_client=openai.DefaultAioHttpClient(trust_env=not local),  # half the CPU of the default
            )
        return self._client

    def _broke_off(self, error: openai.APIConnectionError) -> Failure:
        sent = _was_sent(error)
        if sent and isinstance(error, openai.APITimeoutError):
            return self._late()
        return Failure("broken", f"cannot reach {self._url}: {error.__cause__ or error}", charged=sent)

    def _late(self) -> Failure:
        return Failure("broken", f"no answer from {self._url} within {self._teacher.timeout_s:g} s", charged=True)

    def _headers(self) -> dict[str, openai.Omit]:
        """Headers not to send: the SDK wants a key, whoever is asked."""
        return {} if self.endpoint.api_key_env else {"Authorization": openai.Omit()}

    def status(self, error: openai.APIStatusError) -> Failure:
        """What an error status means."""
        status, said = error.status_code, _message(error)
        where = f"{self._url} (model {self._teacher.name})"
        if status == 401 or (status == 403 and not _is_flagged(error)):
            variable = self.endpoint.api_key_env
            mend = f"check the environment variable {variable}" if variable else "set api_key_env for this endpoint"
            return Failure("unusable", f"{where} refuses the API key ({status}: {said}); {mend}")
        if status == 404:
            return Failure("unusable", f"{where} knows no such model or path (404: {said}); check name and base_url")
        if status == 402 or (status == 429 and error.code == "insufficient_quota"):
            return Failure("unusable", f"{where} has no credit left ({status}: {said})")
        if status == 429:
            return Failure("limited", f"{where} is over its limit: {said}", retry_after(error.response.headers))
        if status in (408, 409, 425) or status >= 500:
            wait = retry_after(error.response.headers)
            return Failure("limited" if wait else "broken", f"{where} answered {status}: {said}", wait)
        return Failure("refused", f"{where} does not accept the request ({status}: {said})")

    def judge(self, failure: Failure | None) -> None:
        """Keep account of failures in a row: how a request ended, None with a response."""
        if failure is None:
            self._failures, self._refused, self.trouble = 0, 0, ""
            self.answered_at = time.monotonic()
            return
        self.trouble = failure.detail
        if failure.kind == "unusable":
            self.refusal = failure.detail
        elif failure.kind == "refused":
            self._failures, self._refused = 0, self._refused + 1
            if self._refused >= REFUSED_IN_A_ROW:
                self.refusal = f"{self._refused} requests in a row were refused, the last one so: {failure.detail}"
        elif failure.kind == "broken":
            self._failures, self._failed_at = self._failures + 1, time.monotonic()


def read_response(raw: Any, prompt_tokens: int, seconds: float) -> Response:
    """What a chat completion, as parsed JSON, says and costs. Tokens that the endpoint does not report are estimated.

    Reasoning that comes apart from the content is put before it, in <think>. Some count its tokens in the total alone.

    Args:
        prompt_tokens: the estimate of those of the request.

    Raises:
        ValueError: it is no whole chat completion, e.g. an error in a response with status 200.
    """
    choices = raw.get("choices") if isinstance(raw, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(message := choice.get("message"), dict):
        raise ValueError(f"not a chat completion: {str(raw)[:200]}")
    content, reason = _text(message.get("content")), str(choice.get("finish_reason") or "")
    if reason in _BROKEN_OFF:
        raise ValueError(f"the generation broke off ({reason}): {str(choice.get('error') or content)[:200]}")
    reasoning = _text(message.get("reasoning_content") or message.get("reasoning"))
    usage = _mapping(raw.get("usage"))
    cached = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
    cached = usage.get("prompt_cache_hit_tokens") if cached is None else cached  # DeepSeek's word for it
    prompt_tokens = _count(usage.get("prompt_tokens"), prompt_tokens)
    completion_tokens = _count(usage.get("completion_tokens"), estimate_tokens(reasoning + content))
    outcome: RequestOutcome = "answered"
    if reason in _CUT:
        outcome = "cut"
    elif not content.strip() or reason == "content_filter":
        outcome = "empty"
    return Response(
        text=f"<think>\n{reasoning}\n</think>\n{content}" if reasoning else content,
        outcome=outcome,
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        cached_tokens=_count(cached, 0),
        completion_tokens=max(completion_tokens, _count(usage.get("total_tokens"), 0) - prompt_tokens),
        seconds=seconds,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After (or retry-after-ms) header, given as a number or a date; None if it names no time to
    come, as a date does where the clocks differ.
    """
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds:
            seconds = float(milliseconds) / 1000
        elif value and value.strip().replace(".", "", 1).isdigit():
            seconds = float(value)
        elif value:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        else:
            return None
    except ValueError:
        return None
    return min(seconds, _LONGEST_RETRY_AFTER_S) if seconds > 0 else None


def _was_sent(error: openai.APIConnectionError) -> bool:
    """Whether a request that broke off had reached the endpoint, as far as one can tell."""
    unsent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
    return not isinstance(error.__cause__, unsent)


def _is_flagged(error: openai.APIStatusError) -> bool:
    """Whether it was this request's content that a moderator refused: OpenRouter says so with 403 and the reasons."""
    return bool(_mapping(_mapping(error.body).get("metadata")).get("reasons"))


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or error.message)[:300]


def _text(content: Any) -> str:
    """A message's text, in one piece or in parts, without lone surrogates: they can be neither stored nor tokenized."""
    if isinstance(content, list):
        content = "".join(str(_mapping(part).get("text") or "") for part in content)
    return str(content or "").encode("utf-8", "replace").decode()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise
