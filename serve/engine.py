"""The engine: a base, a slot in which one modifier takes part, and one thread that does all computing.

That thread alone touches the model and the slot. Jobs are grouped by the version of the modifier that answers them;
each group has KV caches of its own, and only the group whose modifier is in the slot is computed. At any step jobs join
and leave its batches; prompts are computed in parts, between the steps. When it has had the slot for `patience_s` while
others wait, it is parked with its caches and the group that has waited longest is next: nobody is computed under
another's modifier, and nobody waits for somebody else's long answer to end. See `serve.schedule`. The slot may keep
more modifiers than the one that takes part (`Limits.max_loaded_modifiers`): these come back without being read again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from cascade.compression.adapter import BaseRef
from cascade.compression.apply import LoraSlot
from cascade.errors import CascadeError
from cascade.models.base import LoadedBase, end_token_ids
from cascade.models.caches import Prefix
from cascade.models.generation import Batch
from cascade.models.prompts import Prompts
from cascade.models.rows import Request, Row
from cascade.routing.model import BASE
from cascade.store import Store
from serve.encoder import Encoder
from serve.events import NO_MODIFIER, Event, Failed, Finished, Started, Work
from serve.forms import Forms
from serve.grammars import Grammars
from serve.jobs import BARE, Group, Job, Key, Lane, key_of
from serve.kept import Kept
from serve.limits import Limits
from serve.live import Live, LiveModifiers
from serve.outbox import Outbox
from serve.schedule import Chunks, Schedule
from serve.steering import Steering
from serve.text import TextStream
from serve.threads import Threads, give_way

logger = logging.getLogger(__name__)

_CHUNK = {"cpu": 256, "gpu": 2048}
"""Tokens of prompts that are computed at a time, to begin with."""
_LEAST = 1e-6
"""Temperatures and shares of probability below take the likeliest token: what is next to 0 is 0, or infinite, in the
numbers that are computed with, and a row whose probabilities are none would fail all that run beside it."""
_MOST_FAILURES = 3
"""Turns that fail, and no token made between, before the engine says that it is ill: after some errors of a GPU a
process can compute nothing any more."""
_SHUTTING_DOWN = Failed(503, "the server is shutting down", "shutting_down", retry_after_s=5)


class Engine:
    """Generates for many at once with one modifier at a time. Make it, `stream` from any event loop, `close` it.

    Attributes:
        modifiers: what is in use; `watch` it to follow the store.
        swapped: told how many milliseconds each swap took, parked groups' included.
    """

    def __init__(
        self,
        loaded: LoadedBase,
        store: Store,
        cache: Path,
        limits: Limits | None = None,
        threads: int | None = None,
    ) -> None:
        """Prepare every modifier in use, and start the thread.

        Args:
            cache: local folder for modifiers in their serving form.
            threads: most that it computes with; None: as many as PyTorch is set to use now.
        """
        self._loaded, self._limits = loaded, limits or Limits()
        vocabulary = int(loaded.model.config.vocab_size)
        context = min(loaded.context or self._limits.tokens, self._limits.tokens)
        self._encoder = Encoder(
            loaded.tokenizer, vocabulary=vocabulary, context=context, answer_tokens=self._limits.answer_tokens
        )
        base = BaseRef(loaded.name, loaded.sha256)
        self._slot = LoraSlot(loaded.model, adapters=self._limits.max_loaded_modifiers, base=base)
        forms = Forms(
            store,
            cache,
            base_sha256=loaded.sha256,
            dtype=self._slot.dtype,
            int8=self._slot.int8,
            check=self._slot.check,
            pin=loaded.device.type == "cuda",
        )
        forms.remove_old()
        self.modifiers = LiveModifiers(store, forms.open)
        self.swapped: Callable[[float], None] = lambda milliseconds: None
        sizes = [live.form.layout.nbytes for live in self.modifiers.in_use() if live.form]
        self._slot.reserve(max(sizes, default=0), len(sizes))
        self._grammars = Grammars(self._encoder.tokenizer, vocabulary, end_token_ids(loaded))
        self._kept = Kept(self._limits.kept_bytes)
        self._schedule = Schedule(self._limits, self._new_group)
        self._chunks = Chunks(_CHUNK["cpu" if loaded.device.type == "cpu" else "gpu"])
        self._serial = 0
        self._most = threads or torch.get_num_threads()
        self._threads = Threads(self._most if loaded.device.type == "cpu" else 1)
        self._changed = threading.Condition()
        self._closed = False
        self._failures = 0  # turns that failed since a token was last made
        self._beat: float | None = None  # start of the step being computed, None while idle
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------- called from event loops

    async def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        """Events of a piece of work. Leaving the iteration, or cancelling the task, cancels the work."""
        loop, outbox = asyncio.get_running_loop(), Outbox()

        def emit(event: Event) -> None:
            try:
                outbox.put(event)
            except RuntimeError:  # the loop is closed: nobody listens any more
                job.cancelled = True  # type: ignore[union-attr]

        job = await loop.run_in_executor(self._grammars.pool_for(work.grammar), self._prepare, work, emit)
        if isinstance(job, Failed):
            yield job
            return
        refused = self._submit(job)
        if refused is not None:
            yield refused
            return
        try:
            while True:
                event = await outbox.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            job.cancelled = True

    async def healthy(self) -> bool:
        """Whether the thread lives, no step has been computing for longer than the limit, and not all of them fail."""
        beat = self._beat
        hung = beat is not None and time.perf_counter() - beat > self._limits.step_s
        return self._thread.is_alive() and not hung and self._failures < _MOST_FAILURES

    @property
    def load(self) -> tuple[int, int]:
        """Rows running (parked ones included) and jobs waiting."""
        return self._schedule.load

    @property
    def resident_bytes(self) -> int:
        """Weights in memory: the base's and the slot's."""
        base = sum(p.numel() * p.element_size() for p in self._loaded.model.parameters())
        return base + self._slot.resident_bytes

    def close(self) -> None:
        """End the thread; work that is not done fails."""
        self.modifiers.close()
        self._grammars.close()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)
        self._slot.remove()

    def _prepare(self, work: Work, emit: Callable[[Event], None]) -> Job | Failed:
        """Tokens of the prompt within the model's context, and the version that shall answer."""
        live = None if work.choice == BASE else self.modifiers.get(work.choice, work.variant, work.version)
        if live is None and work.choice != BASE:
            return Failed(503, f"there is no modifier {work.choice!r} that can be used", NO_MODIFIER)
        encoded = self._encoder.encode(work, live)
        if isinstance(encoded, Failed):
            return encoded
        try:
            matcher = None if work.grammar is None else self._grammars.matcher(work.grammar)
        except CascadeError as error:
            return Failed(400, str(error), "invalid_value", work.grammar.param if work.grammar else None)
        steering = Steering(self._loaded.tokenizer, matcher, work.logprobs)
        temperature = 0.0 if work.temperature < _LEAST else work.temperature
        top_p = max(work.top_p, _LEAST)
        request = Request(encoded.tokens, encoded.answer_tokens, work.stop, temperature, top_p, work.seed)
        return Job(live, request, emit, TextStream(self._loaded.tokenizer, request.stop), steering, work.stream)

    def _submit(self, job: Job) -> Failed | None:
        with self._changed:
            if self._closed:
                return _SHUTTING_DOWN
            refused = self._schedule.add(job)
            if refused is None:
                self._changed.notify()
        return refused

    def _new_group(self, live: Live | None) -> Group:
        key = key_of(live)
        return Group(live, partial(Batch, self._loaded, partial(self._keep, key)))

    def _keep(self, key: Key, prefix: Prefix) -> None:
        """Keep what an answer left in the cache, while its version is in use."""
        if key in self._in_use():
            self._kept.keep(key, prefix)

    def _in_use(self) -> set[Key]:
        return {BARE, *map(key_of, self.modifiers.in_use())}

    # ------------------------------------------------------------------------------------- the one thread

    def _run(self) -> None:
        give_way()
        torch.set_num_threads(self._most)
        while True:
            for key, group in list(self._schedule.groups.items()):
                self._attempt(key, group.forget_running)
            with self._changed:
                self._schedule.forget_waiting()
                self._schedule.forget_groups()
                while not (self._closed or self._schedule.groups):
                    self._changed.wait()
                if self._closed:
                    break
                key = self._schedule.next()
                group = self._schedule.groups[key]
            self._beat = time.perf_counter()
            self._attempt(key, partial(self._turn, key, group))
            self._beat = None
        for key in list(self._schedule.groups):
            self._give_up(key, _SHUTTING_DOWN)

    def _attempt(self, key: Key, work: Callable[[], None]) -> None:
        """Do something for a group, whose jobs are given up where it fails."""
        try:
            work()
        except Exception:
            logger.exception("a step failed; the work in it is given up")
            self._failures += 1
            self._give_up(key, Failed(500, "the server could not compute this answer", "internal_error"))

    def _turn(self, key: Key, group: Group) -> None:
        """See that the group's modifier is in the slot, let waiting jobs in, and compute one thing: a part of a prompt
        or one token for each row of a lane. So nobody who leaves or waits is noticed late."""
        swap_ms = 0.0
        if key != self._schedule.held:
            start = time.perf_counter()
            try:
                self._hold(key, group)
            except CascadeError as error:
                logger.exception("%s cannot be put into the slot", "/".join(key))
                self._give_up(key, Failed(503, str(error), NO_MODIFIER))
                return
            swap_ms = (time.perf_counter() - start) * 1e3
            self.swapped(swap_ms)
        self._admit(group, swap_ms)
        if not group.running:  # all have left meanwhile
            return
        lane, prompts = group.next_work()
        if prompts is not None:
            self._compute(key, group, lane, prompts)
            return
        with self._changed:
            self._schedule.make_room(lane)
        if lane.batch.rows:
            self._step(group, lane)

    def _step(self, group: Group, lane: Lane) -> None:
        """One token for each row of a lane."""
        with self._threads.computing("step", len(lane.batch.rows)):
            done = lane.batch.step(lambda index, token: group.running[index].push(token))
        self._failures = 0
        for row in done:
            job = group.running.pop(row.index)
            job.finish(row.text)
            job.emit(Finished(row.finish or "stop", len(row.tokens)))
        group.sort(lane)

    def _compute(self, key: Key, group: Group, lane: Lane, prompts: Prompts) -> None:
        """A part of some prompts; their rows run when all is computed."""
        tokens, start = min(self._chunks.tokens, prompts.left), time.perf_counter()
        with self._threads.computing("prompts", tokens):
            done = prompts.advance(tokens)
        self._chunks.took(tokens, time.perf_counter() - start)
        if done:
            if group.mixes:
                for place in range(len(prompts.rows)):
                    self._keep(key, prompts.prefix(place))
            group.joined(lane, prompts)

    def _hold(self, key: Key, group: Group) -> None:
        """Let a group's modifier take part, or none for the base."""
        self._schedule.held = BARE
        self._slot.clear()
        if group.live is not None and not self._slot.select(key):
            assert group.live.form is not None
            self._slot.retain(self._in_use())
            self._slot.fill(group.live.form, key)
        group.computes_with(self._slot.address)
        self._schedule.held = key

    def _admit(self, group: Group, swap_ms: float) -> None:
        """Let waiting jobs begin, as far as there is room."""
        joining: list[Row] = []
        with self._changed:
            while (job := self._schedule.joining(group)) is not None:
                self._serial += 1
                group.running[self._serial] = job
                if job.row is None:
                    adjust = None if job.steering.is_idle else partial(_adjust, job)
                    job.row = Row.new(self._serial, job.request, self._loaded.device, adjust)
                    waited = (time.perf_counter() - job.arrived) * 1e3
                    job.emit(Started(job.key[1], len(job.request.prompt), waited, swap_ms))
                job.row.index = self._serial
                joining.append(job.row)
        if joining:
            self._kept.retain(self._in_use())
            for bundle in self._bundles(group, joining):
                rows, known = zip(*bundle, strict=True)
                group.lane(rows[0].length).prompts.append(Prompts(self._loaded, rows, known))

    def _bundles(self, group: Group, rows: Sequence[Row]) -> list[list[tuple[Row, Prefix | None]]]:
        """Rows, with what is known of their beginnings, whose prompts can be computed in one pass; a longer one is
        computed alone, in parts."""
        found: list[list[tuple[Row, Prefix | None]]] = []
        longest = 0
        for row in rows:
            known = self._kept.find(key_of(group.live), row.own) if group.mixes else None
            left = row.length - len(known or ())
            longest = max(longest, left)
            together = bool(found) and group.lane(row.length) is group.lane(found[-1][0][0].length)
            if together and (not group.mixes or (len(found[-1]) + 1) * longest <= self._chunks.tokens):
                found[-1].append((row, known))
            else:
                found.append([(row, known)])
                longest = left
        return found

    def _give_up(self, key: Key, failure: Failed) -> None:
        """Fail all jobs of a group."""
        with self._changed:
            group = self._schedule.groups.pop(key, None)
        for job in [] if group is None else [*group.running.values(), *group.waiting]:
            job.emit(failure)


def _adjust(job: Job, logits: torch.Tensor) -> torch.Tensor:
    """The job's steering; one that fails ends its own job alone."""
    try:
        return job.steering.adjust(logits)
    except CascadeError as error:
        job.emit(Failed(400, str(error), "invalid_value", "response_format"))
        job.cancelled = True
        return logits
