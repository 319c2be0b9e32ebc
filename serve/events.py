"""What passes between the gateway and the engine: a piece of work one way, its events the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from cascade.tasks import Message

Variant = Literal["current", "canary"]
"""Which of a domain's versions in use."""

NO_MODIFIER = "modifier_unavailable"
"""Code of a failure: no version of the modifier that was asked for can be used."""


@dataclass(frozen=True)
class Grammar:
    """What an answer is made to keep to.

    Attributes:
        kind: of the text: a JSON schema, or a grammar in llguidance's Lark.
        param: the request's parameter that asks for it.
    """

    kind: Literal["json_schema", "lark"]
    text: str
    param: str


@dataclass(frozen=True)
class Work:
    """One conversation to continue.

    Attributes:
        choice: "base" or a modifier's domain.
        messages: the conversation; one without a system message gets that of the version that answers.
        variant: which of the domain's versions, where the engine has not got `version`.
        version: of the modifier, as the gateway knows it; what answers is said in `Started`.
        stream: whether text is wanted as it is made; else all of it comes at the end.
        max_tokens: None for the server's default.
        prompt: raw text to continue, or its token ids, instead of messages.
        grammar: that the answer keeps to.
        logprobs: how many of the likeliest tokens to report beside each chosen one; None reports nothing.
        seed: of the sampling.
    """

    choice: str
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    variant: Variant = "current"
    version: str = ""
    stream: bool = True
    prompt: str | tuple[int, ...] | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Started:
    """The work has its modifier and joins the running batch.

    Attributes:
        version: of the modifier, "" for the base.
        queue_ms: from arrival in the engine until now, the swap included.
        swap_ms: time of the swap that was made for the group this work came in with; 0 without one.
    """

    version: str
    prompt_tokens: int
    queue_ms: float
    swap_ms: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, its natural log-probability, and those of the likeliest tokens in its place.

    Bytes of a token that are no whole character stand in its text as `surrogateescape` writes them.
    """

    token: str
    logprob: float
    rivals: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """More of the answer: text, and if asked for the tokens made since the last one (their text may be held back)."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is complete: finish reason "stop" or "length"."""

    finish_reason: str
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """There will be no (more) answer.

    Attributes:
        status: HTTP status that fits.
        retry_after_s: when it is worth trying again, None if never.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None


Event = Started | Delta | Finished | Failed


class Backend(Protocol):
    """Whatever generates: the engine itself, or a handle on its replicas."""

    def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        """Started, any number of Delta, then Finished; Failed may come instead at any point. Closing it cancels."""

    async def healthy(self) -> bool:
        """Whether work would be done."""
