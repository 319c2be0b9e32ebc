"""What the engine keeps account of: jobs, and groups of jobs that one version of one modifier answers."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from cascade.models.generation import Batch
from cascade.models.prompts import Prompts
from cascade.models.rows import Request, Row
from cascade.routing.model import BASE
from serve.events import Delta, Event, TokenLogprob
from serve.live import Live
from serve.steering import Steering
from serve.text import TextStream

Key = tuple[str, str]
"""Domain ("base" for none) and version: what decides which numbers compute an answer."""
BARE: Key = (BASE, "")


def key_of(live: Live | None) -> Key:
    """What decides the numbers where this version answers; None for the base."""
    return BARE if live is None else (live.modifier.domain, live.modifier.version)


LANES = (1024, 4096)
"""Tokens up to which sequences are computed together; beside one that is far longer, each would be padded to it."""
GROWTH = 64
"""Tokens that a sequence gets room for beyond those that it has."""


@dataclass(eq=False)
class Job:
    """A piece of work inside the engine. `cancelled` is set by its consumer and read by the thread.

    Attributes:
        row: what has been made of the request, once it has run.
        gave_way: it has run, and made room for older ones when memory was short.
    """

    live: Live | None
    request: Request
    emit: Callable[[Event], None]
    text: TextStream
    steering: Steering
    stream: bool = True
    tokens_made: list[TokenLogprob] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    row: Row | None = None
    gave_way: bool = False

    @property
    def key(self) -> Key:
        return key_of(self.live)

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.request.prompt) if self.row is None else self.row.length

    @property
    def most(self) -> int:
        """Tokens that it may come to."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def room(self) -> int:
        """Tokens that it must find room for: those it has and some more; all of them if it had to give way before."""
        return self.most if self.gave_way else min(self.length + GROWTH, self.most)

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
class Lane:
    """Sequences of about one length, computed together: those that run, and prompts that will run beside them.

    Attributes:
        served: the turn of its group in which it was computed last.
    """

    batch: Batch
    prompts: list[Prompts] = field(default_factory=list)
    served: int = 0

    @property
    def rows(self) -> list[Row]:
        return [*self.batch.rows, *(row for prompts in self.prompts for row in prompts.rows)]

    @property
    def held(self) -> int:
        """Tokens in memory, padding included."""
        return len(self.batch.rows) * self.batch.columns + sum(len(p.rows) * p.columns for p in self.prompts)

    def room(self, jobs: Sequence[Job]) -> int:
        """Tokens that the lane must have room for if these jobs are in it, every row being padded to the longest."""
        columns = [self.batch.columns, *(p.columns for p in self.prompts), *(j.room for j in jobs)]
        return len(jobs) * max(columns) if jobs else 0

    def leave(self, indices: Container[int]) -> None:
        """Take rows out, by their `index`."""
        self.batch.leave(indices)
        for prompts in self.prompts:
            prompts.leave(indices)
        self.prompts = [p for p in self.prompts if p.rows]


class Group:
    """The jobs of one key: those that wait and those that run, with KV caches of their own.

    Attributes:
        running: by the index of their row.
        since: from when on it has been waiting for the slot, or has had it.
    """

    def __init__(self, live: Live | None, make_batch: Callable[[], Batch]) -> None:
        self.live = live
        self.lanes = [Lane(make_batch()) for _ in range(len(LANES) + 1)]
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.since = time.perf_counter()
        self._turn = self._prompted = 0
        self._by_age = True
        self._address = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def mixes(self) -> bool:
        """Whether rows may join while others run; else all that run began together, in the first lane."""
        return self.lanes[0].batch.shares

    @property
    def open(self) -> bool:
        """Whether rows can join now."""
        return self.mixes or not any(lane.rows for lane in self.lanes)

    @property
    def held(self) -> int:
        """Tokens in memory, padding included."""
        return sum(lane.held for lane in self.lanes)

    def computes_with(self, address: int) -> None:
        """Say where the modifier's numbers lie now: what was recorded while they lay elsewhere is void."""
        if address != self._address:
            self._address = address
            for lane in self.lanes:
                lane.batch.forget_graphs()

    def lane(self, length: int) -> Lane:
        """Where a sequence of so many tokens belongs."""
        return self.lanes[bisect_left(LANES, length) if self.mixes else 0]

    def room(self, coming: Job | None = None) -> int:
        """Tokens that must fit into memory for those that run to go on for a while, and for one more to come."""
        return sum(lane.room(self._jobs(lane, coming)) for lane in self.lanes)

    def _jobs(self, lane: Lane, coming: Job | None) -> list[Job]:
        """Jobs in a lane, and those that are about to be in it."""
        placed = {row.index: place for place in self.lanes for row in place.rows}
        jobs = [j for i, j in self.running.items() if placed.get(i, self.lane(j.length)) is lane]
        return [*jobs, coming] if coming is not None and self.lane(coming.length) is lane else jobs

    def leave(self, indices: Container[int]) -> list[Job]:
        """Take running jobs out, by the index of their rows; returns them."""
        gone = [index for index in self.running if index in indices]
        if gone:
            for lane in self.lanes:
                lane.leave(indices)
        return [self.running.pop(index) for index in gone]

    def forget_running(self) -> None:
        """Take the rows out whose clients have gone."""
        self.leave({index for index, job in self.running.items() if job.cancelled})

    def wait_again(self, job: Job) -> None:
        """Put a job that had begun among those that wait, in the order in which they came."""
        self.waiting = deque(sorted([*self.waiting, job], key=lambda j: j.arrived))

    def next_work(self) -> tuple[Lane, Prompts | None]:
        """What to compute now, where anything runs: a part of a prompt or a token for each row of a lane, in turns.

        Of several prompts it is by turns the one with the least to do and the oldest, so that neither a long one keeps
        short ones waiting nor many short ones a long one.
        """
        self._turn += 1
        prompts = [(lane, p) for lane in self.lanes for p in lane.prompts]
        lanes = [lane for lane in self.lanes if lane.batch.rows]
        if prompts and all(self._prompted <= lane.served for lane in lanes):
            self._prompted = self._turn
            self._by_age = not self._by_age
            return min(prompts, key=lambda lp: lp[1].rows[0].index if self._by_age else lp[1].left)
        lane = min(lanes, key=lambda lane: lane.served)
        lane.served = self._turn
        return lane, None

    def joined(self, lane: Lane, prompts: Prompts) -> None:
        """Let rows run whose prompts have been computed."""
        lane.prompts.remove(prompts)
        lane.batch.take(prompts)

    def sort(self, lane: Lane) -> None:
        """Let rows that have become too long for their lane go on in another."""
        if not self.mixes or lane is self.lanes[-1]:
            return
        for row in [r for r in lane.batch.rows if self.lane(r.length) is not lane]:
            lane.batch.hand_over({row.index}, self.lane(row.length).batch)
