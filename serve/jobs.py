"""What the engine keeps account of: jobs, and groups of jobs that one version of one modifier answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cascade.models.generation import Batch
from cascade.models.rows import Request
from cascade.routing.model import BASE
from serve.events import Delta, Event, TokenLogprob
from serve.live import Live
from serve.steering import Steering
from serve.text import TextStream

Key = tuple[str, str]
"""Domain ("base" for none) and version: what decides which numbers compute an answer."""
BARE: Key = (BASE, "")


@dataclass(eq=False)
class Job:
    """A piece of work inside the engine. `cancelled` is set by its consumer and read by the thread."""

    live: Live | None
    request: Request
    emit: Callable[[Event], None]
    text: TextStream
    steering: Steering
    stream: bool = True
    tokens_made: list[TokenLogprob] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False

    @property
    def key(self) -> Key:
        return BARE if self.live is None else (self.live.modifier.domain, self.live.modifier.version)

    @property
    def tokens(self) -> int:
        """Tokens that it may come to."""
        return len(self.request.prompt) + self.request.max_tokens

    def push(self, token: int) -> bool:
        """Take over a token; False if nobody wants more."""
        if self.cancelled:
            return False
        noted = self.steering.took(token)
        if noted is not None:
            self.tokens_made.append(noted)
        text = self.text.push(token)
        if text and self.stream:
            self._send(text)
        return True

    def finish(self, whole: str) -> None:
        """Send what has not been sent of the answer."""
        rest = self.text.finish(whole) if self.stream else whole
        if rest or self.tokens_made:
            self._send(rest)

    def _send(self, text: str) -> None:
        self.emit(Delta(text, tuple(self.tokens_made)))
        self.tokens_made.clear()


@dataclass(eq=False)
class Group:
    """The jobs of one key: those that wait and those that run, with a batch and a KV cache of their own.

    Attributes:
        since: from when on it has been waiting for the slot, or has had it.
    """

    live: Live | None
    batch: Batch
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[int, Job] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def room_taken(self) -> int:
        """Tokens that the cache may come to, every row being padded to the longest."""
        return len(self.running) * max((j.tokens for j in self.running.values()), default=0)

    def with_one_more(self, job: Job) -> int:
        """`room_taken` if this job ran too."""
        return (len(self.running) + 1) * max(job.tokens, *(j.tokens for j in self.running.values()), 0)
