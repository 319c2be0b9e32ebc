"""The engine: a base, one modifier slot, and one thread that does all computing.

That thread alone touches the model and the slot. Jobs are grouped by the version of the modifier that answers them;
each group has a batch, and so a KV cache, of its own, and only the group whose modifier is in the slot is computed. At
any step jobs join and leave its batch. When it has had the slot for `patience_s` while others wait, it is parked with
its cache and the group that has waited longest is next: nobody is computed under another's modifier, and nobody waits
for somebody else's long answer to end.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cascade.artifacts import Store
from cascade.compression.adapter import BaseRef
from cascade.compression.apply import LoraSlot
from cascade.errors import CascadeError
from cascade.models.base import LoadedBase, end_token_ids
from cascade.models.chat import prompt_text
from cascade.models.generation import Batch
from cascade.models.rows import Request, Row
from cascade.routing.model import BASE
from serve.events import Event, Failed, Finished, Started, Work
from serve.forms import Forms
from serve.jobs import BARE, Group, Job, Key
from serve.live import LiveModifiers
from serve.steering import Grammars, Steering
from serve.text import TextStream
from serve.threads import Threads, give_way

logger = logging.getLogger(__name__)

_STARVED_S = 2.0
"""A job that has waited so long for room is let in before any other joins."""
_SHUTTING_DOWN = Failed(503, "the server is shutting down", "shutting_down", retry_after_s=5)


@dataclass(frozen=True)
class Limits:
    """Bounds of one engine.

    Attributes:
        rows: sequences computed together.
        tokens: most tokens (prompt and answer) that the rows of all groups may come to, so that memory is bounded.
        waiting: jobs that may wait beyond those that join at the next step; more are refused with 429.
        patience_s: how long a group keeps the slot while another waits.
        answer_tokens: answer length where the request names none.
        step_s: a thread that has not finished one step in so long counts as hung.
    """

    rows: int = 32
    tokens: int = 32_768
    waiting: int = 64
    patience_s: float = 0.5
    answer_tokens: int = 512
    step_s: float = 120.0


class Engine:
    """Generates for many at once with one modifier at a time. Make it, `stream` from any event loop, `close` it.

    Attributes:
        modifiers: what is in use; `watch` it to follow the store.
    """

    def __init__(
        self,
        loaded: LoadedBase,
        store: Store,
        cache: Path,
        limits: Limits = Limits(),
        threads: int | None = None,
    ) -> None:
        """Prepare every modifier in use, and start the thread.

        Args:
            cache: local folder for modifiers in their serving form.
            threads: most that it computes with; None: as many as PyTorch is set to use now.
        """
        self._loaded, self._limits = loaded, limits
        # Callers tokenise in their own threads; a tokenizer is not safe to share with the one that decodes.
        self._encoder = copy.deepcopy(loaded.tokenizer)
        self._encoding = threading.Lock()
        self._slot = LoraSlot(loaded.model, base=BaseRef(loaded.name, loaded.sha256))
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
        vocabulary = int(loaded.model.config.vocab_size)
        self._grammars = Grammars(self._encoder, vocabulary, end_token_ids(loaded))
        self._groups: dict[Key, Group] = {}
        self._held: Key = BARE
        self._serial = 0
        self._most = threads or torch.get_num_threads()
        self._threads = Threads(self._most if loaded.device.type == "cpu" else 1)
        self._changed = threading.Condition()
        self._closed = False
        self._beat: float | None = None  # start of the step being computed, None while idle
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------- called from event loops

    async def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        """Events of a piece of work. Leaving the iteration, or cancelling the task, cancels the work."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens any more
                job.cancelled = True  # type: ignore[union-attr]

        job = await asyncio.to_thread(self._prepare, work, emit)
        if isinstance(job, Failed):
            yield job
            return
        refused = self._submit(job)
        if refused is not None:
            yield refused
            return
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            job.cancelled = True

    async def healthy(self) -> bool:
        """Whether the thread lives and no step has been computing for longer than the limit."""
        beat = self._beat
        hung = beat is not None and time.perf_counter() - beat > self._limits.step_s
        return self._thread.is_alive() and not hung

    @property
    def load(self) -> tuple[int, int]:
        """Rows running (parked ones included) and jobs waiting."""
        groups = list(self._groups.values())
        return sum(len(g.running) for g in groups), sum(len(g.waiting) for g in groups)

    @property
    def resident_bytes(self) -> int:
        """Weights in memory: the base's and the slot's."""
        base = sum(p.numel() * p.element_size() for p in self._loaded.model.parameters())
        return base + self._slot.resident_bytes

    def close(self) -> None:
        """End the thread; work that is not done fails."""
        self.modifiers.close()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)
        self._slot.remove()

    def _prepare(self, work: Work, emit: Callable[[Event], None]) -> Job | Failed:
        """Tokens of the prompt within the model's context, and the version that shall answer."""
        live = None if work.choice == BASE else self.modifiers.get(work.choice, work.variant)
        if live is None and work.choice != BASE:
            return Failed(503, f"there is no modifier {work.choice!r} that can be used", "modifier_unavailable")
        try:
            with self._encoding:
                text = prompt_text(self._encoder, work.messages) if work.prompt is None else work.prompt
                # A chat template writes the special tokens itself.
                prompt = list(self._encoder(text, add_special_tokens=work.prompt is not None).input_ids)
        except Exception as error:  # a template may refuse anything, in any way
            said = error.__cause__ or error
            return Failed(400, f"the model's chat template refuses these messages: {said}", "invalid_value", "messages")
        context = int(getattr(self._loaded.model.config, "max_position_embeddings", self._limits.tokens))
        room = min(context, self._limits.tokens) - len(prompt)
        wanted = work.max_tokens or min(self._limits.answer_tokens, max(room, 1))
        if wanted > room:
            message = (
                f"This model's maximum context length is {room + len(prompt)} tokens; your messages have {len(prompt)} "
                f"and {wanted} were asked for the answer."
            )
            return Failed(400, message, "context_length_exceeded", "messages")
        if not prompt:
            return Failed(400, "the prompt is empty", "invalid_value", "prompt")
        try:
            matcher = None if work.schema is None else self._grammars.matcher(work.schema)
        except CascadeError as error:
            return Failed(400, str(error), "invalid_value", "response_format")
        steering = Steering(self._loaded.tokenizer, matcher, work.logprobs)
        request = Request(prompt, wanted, work.stop, work.temperature, work.top_p, work.seed)
        return Job(live, request, emit, TextStream(self._loaded.tokenizer, request.stop), steering, work.stream)

    def _submit(self, job: Job) -> Failed | None:
        with self._changed:
            self._forget_waiting()
            if self._closed:
                return _SHUTTING_DOWN
            running, waiting = self.load
            if waiting - max(self._limits.rows - running, 0) >= self._limits.waiting:
                return Failed(429, "the server is busy, try again shortly", "overloaded", retry_after_s=1)
            group = self._groups.get(job.key)
            if group is None:
                group = self._groups[job.key] = Group(job.live, Batch(self._loaded))
            group.waiting.append(job)
            self._changed.notify()
        return None

    def _forget_waiting(self) -> None:
        """Drop waiting jobs whose clients have gone, and groups without jobs. The lock is held."""
        for key, group in list(self._groups.items()):
            if any(j.cancelled for j in group.waiting):
                group.waiting = deque(j for j in group.waiting if not j.cancelled)
            if not group.busy:
                del self._groups[key]

    # ------------------------------------------------------------------------------------- the one thread

    def _run(self) -> None:
        give_way()
        torch.set_num_threads(self._most)
        while True:
            self._forget_running()
            with self._changed:
                self._forget_waiting()
                while not (self._closed or self._groups):
                    self._changed.wait()
                if self._closed:
                    break
                key = self._next()
                group = self._groups[key]
            self._beat = time.perf_counter()
            try:
                self._turn(key, group)
            except Exception:
                logger.exception("a step failed; the work in it is given up")
                self._give_up(key, Failed(500, "the server could not compute this answer", "internal_error"))
            self._beat = None
        for key in list(self._groups):
            self._give_up(key, _SHUTTING_DOWN)

    def _forget_running(self) -> None:
        """Take the rows out whose clients have gone, from parked groups too."""
        for group in list(self._groups.values()):
            gone = {index for index, job in group.running.items() if job.cancelled}
            if gone:
                group.batch.leave(gone)
                group.running = {i: j for i, j in group.running.items() if i not in gone}

    def _next(self) -> Key:
        """The group to compute for now. The lock is held, and there is one."""
        now = time.perf_counter()
        able = {k: g for k, g in self._groups.items() if self._able(g)}
        held = able.pop(self._held, None)
        if held is not None and (not able or now - held.since <= self._limits.patience_s):
            return self._held
        longest = min(able, key=lambda k: able[k].since)
        if held is not None:
            held.since = now
        able[longest].since = now
        return longest

    def _able(self, group: Group) -> bool:
        """Whether there is anything to compute for a group; parked ones may leave it no room."""
        return bool(group.running) or self._has_room(group, group.waiting[0])

    def _turn(self, key: Key, group: Group) -> None:
        """See that the group's modifier is in the slot, let its waiting jobs in, and make one token for each."""
        swap_ms = 0.0
        if key != self._held:
            start = time.perf_counter()
            try:
                self._hold(key, group)
            except CascadeError as error:
                logger.exception("%s cannot be put into the slot", "/".join(key))
                self._give_up(key, Failed(503, str(error), "modifier_unavailable"))
                return
            swap_ms = (time.perf_counter() - start) * 1e3
        if group.batch.open:
            self._admit(group, swap_ms)
        if group.batch.rows:
            with self._threads.computing("step", len(group.batch.rows)):
                done = group.batch.step(lambda index, token: group.running[index].push(token))
            for row in done:
                job = group.running.pop(row.index)
                job.finish(row.text)
                job.emit(Finished(row.finish or "stop", len(row.tokens)))

    def _hold(self, key: Key, group: Group) -> None:
        """Put a group's modifier into the slot, or nothing for the base."""
        self._held, size = BARE, self._slot.resident_bytes
        self._slot.clear()
        if group.live is not None:
            assert group.live.form is not None
            self._slot.fill(group.live.form)
        if self._slot.resident_bytes != size:  # it grew, so it moved
            for other in self._groups.values():
                other.batch.forget_graphs()
        self._held = key

    def _admit(self, group: Group, swap_ms: float) -> None:
        """Let waiting jobs join the group's batch, as far as there is room."""
        joining: list[tuple[Row, Job]] = []
        with self._changed:
            if group.running and self._somebody_starves():
                return
            while group.waiting and self._has_room(group, group.waiting[0]):
                job = group.waiting.popleft()
                self._serial += 1
                group.running[self._serial] = job
                adjust = None if job.steering.is_idle else partial(_adjust, job)
                joining.append((Row.new(self._serial, job.request, self._loaded.device, adjust), job))
        for _, job in joining:
            waited = (time.perf_counter() - job.arrived) * 1e3
            job.emit(Started(job.key[1], len(job.request.prompt), waited, swap_ms))
        rows = [row for row, _ in joining]
        if rows:
            with self._threads.computing("prompts", len(rows) * max(len(row.own) for row in rows)):
                group.batch.join(rows)

    def _somebody_starves(self) -> bool:
        """Whether a group finds no room, so that nobody may take what becomes free before it does."""
        late = time.perf_counter() - _STARVED_S
        return any(not self._able(g) and g.waiting[0].arrived < late for g in self._groups.values())

    def _has_room(self, group: Group, job: Job) -> bool:
        """Whether the batch, and all batches together, stay within their bounds. The first one always may come in."""
        if not any(g.running for g in self._groups.values()):
            return True
        elsewhere = sum(g.room_taken for g in self._groups.values() if g is not group)
        return len(group.running) < self._limits.rows and elsewhere + group.with_one_more(job) <= self._limits.tokens

    def _give_up(self, key: Key, failure: Failed) -> None:
        """Fail all jobs of a group."""
        with self._changed:
            group = self._groups.pop(key, None)
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
