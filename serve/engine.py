"""The engine: a base, one modifier slot, and one thread that does all computing.

That thread alone touches the model and the slot, and swaps only while no row is running: a modifier is never changed
under somebody's generation, and no cache outlives the modifier that filled it. Work for the modifier in the slot joins
the running batch at any step. When other work has waited longer than `patience_s`, nobody joins any more: the batch
runs dry, and the one who has waited longest is next.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from cascade.compression.adapter import BaseRef
from cascade.compression.apply import LoraSlot
from cascade.errors import CascadeError
from cascade.models.base import LoadedBase
from cascade.models.generation import Batch, Request, Row
from cascade.routing.model import BASE
from serve.events import Delta, Event, Failed, Finished, Started, Work
from serve.live import LiveModifiers
from serve.text import TextStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bounds of one engine.

    Attributes:
        rows: sequences computed together.
        tokens: most tokens (prompt and answer) that the rows of a batch may come to, so that memory is bounded.
        waiting: work that may wait; more is refused with 429.
        patience_s: after waiting so long, work for another modifier ends the joining of the running batch.
        answer_tokens: answer length where the request names none.
        step_s: a thread that has not finished one step in so long counts as hung.
    """

    rows: int = 32
    tokens: int = 32_768
    waiting: int = 64
    patience_s: float = 2.0
    answer_tokens: int = 512
    step_s: float = 120.0


@dataclass(eq=False)
class _Job:
    """A piece of work inside the engine. `cancelled` is set by its consumer and read by the thread."""

    choice: str
    request: Request
    emit: Callable[[Event], None]
    text: TextStream
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        return len(self.request.prompt) + self.request.max_tokens


class Engine:
    """Generates for many at once with one modifier at a time. Make it, `stream` from any event loop, `close` it."""

    def __init__(self, loaded: LoadedBase, modifiers: LiveModifiers, limits: Limits = Limits()) -> None:
        self._loaded, self._modifiers, self._limits = loaded, modifiers, limits
        # Callers tokenise in their own threads; a tokenizer is not safe to share with the one that decodes.
        self._encoder = copy.deepcopy(loaded.tokenizer)
        self._encoding = threading.Lock()
        self._slot = LoraSlot(loaded.model, base=BaseRef(loaded.name, loaded.sha256))
        self._held: tuple[str, str] = (BASE, "")
        self._batch = Batch(loaded)
        self._running: dict[int, _Job] = {}
        self._waiting: list[_Job] = []
        self._serial = 0
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
        request = await asyncio.to_thread(self._prepare, work)
        if isinstance(request, Failed):
            yield request
            return

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens any more
                job.cancelled = True

        job = _Job(work.choice, request, emit, TextStream(self._loaded.tokenizer, request.stop))
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
        """Rows running and work waiting."""
        return len(self._running), len(self._waiting)

    def close(self) -> None:
        """End the thread; work that is not done fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _prepare(self, work: Work) -> Request | Failed:
        """Tokens of the prompt within the model's context."""
        prefill = work.messages[-1].role == "assistant"
        try:
            with self._encoding:
                text = self._encoder.apply_chat_template(
                    [m.as_dict() for m in work.messages],
                    tokenize=False,
                    add_generation_prompt=not prefill,
                    continue_final_message=prefill,
                )
                prompt = list(self._encoder(text, add_special_tokens=False).input_ids)
        except Exception as error:  # a template may refuse anything, in any way
            return Failed(
                400, f"the model's chat template refuses these messages: {error}", "invalid_value", "messages"
            )
        context = int(getattr(self._loaded.model.config, "max_position_embeddings", self._limits.tokens))
        room = min(context, self._limits.tokens) - len(prompt)
        wanted = work.max_tokens or min(self._limits.answer_tokens, max(room, 1))
        if wanted > room:
            message = (
                f"This model's maximum context length is {room + len(prompt)} tokens; your messages have {len(prompt)} "
                f"and {wanted} were asked for the answer."
            )
            return Failed(400, message, "context_length_exceeded", "messages")
        return Request(prompt, wanted, work.stop, work.temperature, work.top_p, work.seed)

    def _submit(self, job: _Job) -> Failed | None:
        with self._changed:
            self._waiting = [j for j in self._waiting if not j.cancelled]
            if self._closed:
                return Failed(503, "the server is shutting down", "shutting_down", retry_after_s=5)
            if len(self._waiting) >= self._limits.waiting:
                return Failed(429, "the server is busy, try again shortly", "overloaded", retry_after_s=1)
            self._waiting.append(job)
            self._changed.notify()
        return None

    # ------------------------------------------------------------------------------------- the one thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._batch.rows):
                    self._changed.wait()
                if self._closed:
                    break
            self._beat = time.perf_counter()
            try:
                self._turn()
            except Exception:
                logger.exception("a step failed; the work in it is given up")
                self._give_up(Failed(500, "the server could not compute this answer", "internal_error"))
            self._beat = None
        self._give_up(Failed(503, "the server is shutting down", "shutting_down", retry_after_s=5), everyone=True)

    def _turn(self) -> None:
        """Let work in that may come in, then make one token for everybody."""
        swap_ms = 0.0 if self._batch.rows else self._swap_for_next()
        if self._batch.open:
            self._admit(swap_ms)
        if self._batch.rows:
            for row in self._batch.step(self._on_token):
                self._finish(row)

    def _swap_for_next(self) -> float:
        """With nobody running, give the slot to whoever is next. Returns the swap's time in ms, 0 without one."""
        with self._changed:
            self._waiting = [j for j in self._waiting if not j.cancelled]
            if not self._waiting:
                return 0.0
            oldest = self._waiting[0]
            held = any(j.choice == self._held[0] for j in self._waiting)
            choice = self._held[0] if held and not self._overdue(oldest) else oldest.choice
        start = time.perf_counter()
        try:
            swapped = self._hold(choice)
        except Exception as error:
            logger.exception("%s cannot be put into the slot", choice)
            said = str(error) if isinstance(error, CascadeError) else f"{choice} could not be loaded"
            self._fail_waiting(choice, Failed(503, said, "modifier_unavailable"))
            return 0.0
        return (time.perf_counter() - start) * 1e3 if swapped else 0.0

    def _hold(self, choice: str) -> bool:
        """Put a modifier into the slot, or nothing for the base. Returns whether anything changed."""
        assert not self._batch.rows, "a swap under a running generation"
        if choice == BASE:
            if self._held[0] == BASE:
                return False
            self._slot.clear()
            self._held = (BASE, "")
            return True
        version = self._modifiers.version(choice)
        if version is not None and self._held == (choice, version):
            return False
        self._held = (BASE, "")
        try:
            modifier = self._modifiers.put(choice, self._slot.fill)
        except BaseException:
            self._slot.clear()
            raise
        self._held = (choice, modifier.version)
        return True

    def _admit(self, swap_ms: float) -> None:
        """Let waiting work for the held modifier join, as far as there is room and nobody else is overdue."""
        joining: list[Row] = []
        with self._changed:
            self._waiting = [j for j in self._waiting if not j.cancelled]
            others = [j for j in self._waiting if j.choice != self._held[0]]
            if self._batch.rows and others and self._overdue(others[0]):
                return
            for job in [j for j in self._waiting if j.choice == self._held[0]]:
                if not self._has_room(job):
                    break
                self._waiting.remove(job)
                self._serial += 1
                self._running[self._serial] = job
                joining.append(Row.new(self._serial, job.request, self._loaded.device))
        for row in joining:
            job = self._running[row.index]
            waited = (time.perf_counter() - job.arrived) * 1e3
            job.emit(Started(self._held[1], len(job.request.prompt), waited, swap_ms))
        self._batch.join(joining)

    def _has_room(self, job: _Job) -> bool:
        """Whether the batch stays within its bounds, every row being padded to the longest."""
        jobs = [*self._running.values(), job]
        return len(jobs) == 1 or (
            len(jobs) <= self._limits.rows and len(jobs) * max(j.tokens for j in jobs) <= self._limits.tokens
        )

    def _overdue(self, job: _Job) -> bool:
        return time.perf_counter() - job.arrived > self._limits.patience_s

    def _on_token(self, index: int, token: int) -> bool:
        """Send what can be sent; False ends the row of one who is gone."""
        job = self._running[index]
        if job.cancelled:
            return False
        text = job.text.push(token)
        if text:
            job.emit(Delta(text))
        return True

    def _finish(self, row: Row) -> None:
        job = self._running.pop(row.index)
        rest = job.text.finish(row.text)
        if rest:
            job.emit(Delta(rest))
        job.emit(Finished(row.finish or "stop", len(row.tokens)))

    def _fail_waiting(self, choice: str, failure: Failed) -> None:
        with self._changed:
            jobs = [j for j in self._waiting if j.choice == choice]
            self._waiting = [j for j in self._waiting if j.choice != choice]
        for job in jobs:
            job.emit(failure)

    def _give_up(self, failure: Failed, *, everyone: bool = False) -> None:
        """Fail what runs, and with `everyone` what waits; start over with an empty batch."""
        jobs = list(self._running.values())
        with self._changed:
            if everyone:
                jobs += self._waiting
                self._waiting = []
            self._running.clear()
            self._batch = Batch(self._loaded)
        for job in jobs:
            job.emit(failure)
