"""Asks one tier's teacher: through its endpoints, limits and budget, and never twice for the same thing.

The official `openai` client with its own retries off does the talking. Every response is in the ledger before
anything else happens to it; a request that the ledger knows is answered from there.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

from cascade.config import ANSWER_KEY, Endpoint, Teacher
from cascade.errors import TeacherError
from cascade.tasks import Completion, FinishReason, Message, Task, message_hash
from cascade.teachers.batch import BatchQueue
from cascade.teachers.batch_limits import BatchRequest
from cascade.teachers.batch_record import Records
from cascade.teachers.budget import Budget, price_usd
from cascade.teachers.conversation import (
    estimate_prompt_tokens,
    final_answer,
    most_prompt_tokens,
    request_key,
    request_parameters,
    teacher_messages,
    without_prefill,
)
from cascade.teachers.endpoint import EndpointClient, Failure, Response, api_key
from cascade.teachers.ledger import Ledger, LedgerEntry, Sent
from cascade.teachers.limits import Limiter, Permit, RateLimiter, Signal
from cascade.teachers.pool import EndpointPool

_PATIENCE_S = 900.0
"""How long a request goes on waiting through 429s, which do not count as retries."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher answered to one task.

    Attributes:
        attempt: which of the samples of this task it is.
        round: how many times the sample has been sent back for repair; 0 is the first answer.
        step: which answer of a conversation it is, from 0.
        text: what to verify and train on (reasoning removed unless the config keeps it); "" if there is an error.
        cost_usd: what the request cost when it was paid, also if it was in an earlier run.
        prompt_hash: `message_hash` of the messages sent.
        from_ledger: no request was sent, it had been answered before.
        error: why there is nothing to verify (nobody answered, cut off, empty), "" if there is.
    """

    task_id: str
    attempt: int
    teacher: str
    tier: int
    text: str
    cost_usd: float
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    prompt_hash: str
    from_ledger: bool
    error: str = ""
    round: int = 0
    step: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is an answer to verify."""
        return not self.error

    def completion(self) -> Completion:
        """As the scorers take it."""
        reason: FinishReason = "stop" if self.ok else "error"
        return Completion(
            task_id=self.task_id,
            model=self.teacher,
            modifier="",
            text=self.text,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            seconds=self.seconds,
        )


@dataclass(frozen=True)
class _Request:
    task: Task
    attempt: int
    round: int
    step: int
    messages: tuple[Message, ...]
    parameters: dict[str, Any]
    keys: dict[str, str]  # base_url as configured -> request key
    worst_usd: float  # the most that it can cost


def missing_keys(teacher: Teacher) -> list[str]:
    """The environment variables of API keys that the teacher's endpoints need and that are not set.

    Raises:
        TeacherError: one holds what can be no key.
    """
    return sorted({e.api_key_env for e in teacher.endpoints if e.api_key_env and not api_key(e)})


class TeacherClient:
    """One tier's teacher for the coroutines of one event loop. Close it, or use it as `async with`."""

    def __init__(
        self,
        teacher: Teacher,
        tier: int,
        domain: str,
        ledger: Ledger,
        budget: Budget,
        *,
        limiter: Callable[[Endpoint], Limiter] = RateLimiter.of,
        resolve: Mapping[str, str] | None = None,
        judge: bool = False,
    ) -> None:
        """
        Args:
            teacher: from the config.
            tier: its number, 1 to 3.
            domain: for the ledger.
            ledger: where answers are looked up and stored.
            budget: shared by all who spend from it.
            limiter: makes or finds the limiter of an endpoint; share one per `limits.limiter_key`.
            judge: the requests ask for an opinion of an answer; the ledger marks them.
            resolve: base_url of the config -> real URL; the offline teacher needs {"answer-key": its URL}.

        Raises:
            TeacherError: an API key is not set or can be none, the offline teacher's URL is not in `resolve`, or a
                batch of an earlier start was not fetched and this one would ask live.
        """
        self.teacher, self.tier, self.domain = teacher, tier, domain
        self._ledger, self._budget = ledger, budget
        if missing := missing_keys(teacher):
            raise TeacherError(
                f"tier {tier} ({teacher.name}) needs its API key in the environment: set {' and '.join(missing)}"
            )
        if teacher.mode == "live" and not judge:
            self._check_no_open_batch()
        self._judge = judge
        urls = {e.base_url: (resolve or {}).get(e.base_url, e.base_url) for e in teacher.endpoints}
        if ANSWER_KEY in urls.values():
            raise TeacherError(
                f"tier {tier} ({teacher.name}): the offline teacher is not running, its URL is not known"
            )
        asked = teacher.endpoints[:1] if teacher.mode == "batch" else teacher.endpoints
        self._pool = EndpointPool(teacher, asked, urls, limiter, tier)
        self._batches = (
            BatchQueue(teacher, self._pool.endpoints[0], ledger, domain, tier) if teacher.mode == "batch" else None
        )
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._completion_tokens = float(teacher.max_tokens)

    def _check_no_open_batch(self) -> None:
        """What is in a batch is paid: asked live it would be paid again."""
        records = Records(self._ledger.store, self.domain)
        for endpoint in self.teacher.endpoints:
            for record in records.unfinished(self.teacher.name, endpoint.base_url):
                raise TeacherError(
                    f"tier {self.tier} ({self.teacher.name}): a batch of {len(record.requests)} requests was submitted "
                    f"and has not been fetched: `cascade generate-tier{record.tier}` with mode: batch fetches it, so "
                    f"that nothing is paid twice; to do without it, delete {records.uri(record)}"
                )

    async def __aenter__(self) -> TeacherClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._pool.aclose)
            if self._batches:
                stack.push_async_callback(self._batches.aclose)

    async def answer(self, task: Task, attempt: int = 0, follow_up: Sequence[Message] = ()) -> Answer:
        """The teacher's answer to a task, from the ledger if it was ever given.

        Args:
            attempt: further samples of one task are requests of their own.
            follow_up: what was said since: an earlier answer and what was found wrong with it, in turn.

        What concerns this task alone (nobody answered in the end, the request was refused, the answer was empty or
        cut off) comes back as `Answer.error`.

        Raises:
            TeacherError: no endpoint can be used: refused key, unknown model, nobody answering any more.
            BudgetExceeded: the request does not fit the budget.
        """
        request = self._request(task, attempt, follow_up)
        name = next(iter(request.keys.values()))
        lock = self._asking.setdefault(name, asyncio.Lock())
        async with lock:
            known = self._known(request)
            entry = known or await self._buy(request)
        return self._answer(request, entry, from_ledger=known is not None)

    def refresh(self) -> None:
        """See what others have bought since the ledger was read."""
        self._ledger.refresh()

    def known(self, task: Task, attempt: int = 0) -> bool:
        """Whether the ledger has the answer already, so that asking costs nothing."""
        return any(key in self._ledger for key in self._request(task, attempt).keys.values())

    def _request(self, task: Task, attempt: int, follow_up: Sequence[Message] = ()) -> _Request:
        messages = (*teacher_messages(task, self.teacher), *follow_up)
        parameters = request_parameters(self.teacher, attempt)
        decides: dict[str, Any] = dict(parameters)
        if self.teacher.answer_key:
            decides["answer_key"] = self.teacher.answer_key.model_dump(exclude={"latency_ms"})
        keys = {
            e.base_url: request_key(e.base_url, self.teacher.name, messages, decides, attempt)
            for e in self.teacher.endpoints
        }
        worst = price_usd(self.teacher, most_prompt_tokens(messages), self.teacher.max_tokens)
        before = sum(m.role == "assistant" for m in follow_up)
        step, round_ = (before, 0) if task.max_turns > 1 else (0, before)
        return _Request(task, attempt, round_, step, messages, parameters, keys, worst)

    def _known(self, request: _Request) -> LedgerEntry | None:
        return next((e for key in request.keys.values() if (e := self._ledger.get(key)) is not None), None)

    async def _buy(self, request: _Request) -> LedgerEntry:
        """Try one endpoint or another until one responds or the retries are used up."""
        failures, limited_since, failed = 0, math.inf, None
        while True:
            async with self._pool.deal(failed) as endpoint:
                ask = self._batched if self._batches else self._try
                entry, failure = await ask(endpoint, request)
            if failure is None or failure.kind == "refused":
                return entry
            failed = endpoint
            if failure.kind == "limited":
                limited_since = min(limited_since, time.monotonic())
                if time.monotonic() - limited_since > _PATIENCE_S:
                    self._pool.check_anyone_answers(since=limited_since)
                    return entry
            if failure.kind == "broken":
                failures += 1
                if failures > self.teacher.retries:
                    self._pool.check_anyone_answers()
                    return entry
                await asyncio.sleep(endpoint.backoff(failures))

    async def _try(self, endpoint: EndpointClient, request: _Request) -> tuple[LedgerEntry, Failure | None]:
        """One call: its worst price is set aside, and once it is recorded its real price is booked instead."""
        reserved = await self._budget.reserve(self.tier, request.worst_usd)
        booked = 0.0
        try:
            permit = await endpoint.limiter.acquire(self._expected_tokens(request))
            booked = request.worst_usd  # if this is cancelled or the ledger cannot be written, nobody knows better
            entry, failure = await self._send(endpoint, request, permit)
            booked = entry.price_usd + entry.unsure_usd
            return entry, failure
        finally:
            await asyncio.shield(self._budget.settle(reserved, booked))

    async def _batched(self, endpoint: EndpointClient, request: _Request) -> tuple[LedgerEntry, Failure | None]:
        """One request of a batch. What is in a batch of an earlier process is waited for; the budget knows of it."""
        assert self._batches is not None
        await self._batches.resume()
        if (known := self._known(request)) is not None:  # its batch came back while others were looked for
            return known, None
        identity = self._identity(endpoint, request)
        key = identity["key"]
        part = BatchRequest(key, request.messages, request.parameters, identity, request.worst_usd)
        if self._batches.awaits(key):
            counted = self._batches.counted_usd(key)
            entry, failure = await self._batches.complete(part)
            if counted is not None:
                await asyncio.shield(self._budget.correct(self.tier, entry.price_usd - counted))
            return entry, failure
        reserved = await self._budget.reserve(self.tier, request.worst_usd)
        booked = request.worst_usd
        try:
            entry, failure = await self._batches.complete(part)
            booked = entry.price_usd
            return entry, failure
        finally:
            await asyncio.shield(self._budget.settle(reserved, booked))

    async def _send(
        self, endpoint: EndpointClient, request: _Request, permit: Permit
    ) -> tuple[LedgerEntry, Failure | None]:
        result: Response | Failure = Failure("broken", "cancelled", charged=True)
        began = time.monotonic()
        try:
            key = request.keys[endpoint.endpoint.base_url]
            await self._ledger.asend(Sent(key, self.domain, self.tier, request.worst_usd))
            result = await endpoint.complete(request.messages, request.parameters)
            entry = self._entry(endpoint, request, result, time.monotonic() - began)
            stored = self._ledger.append(entry)
        finally:
            await asyncio.shield(endpoint.limiter.release(permit, *self._signal(request, result)))
        await asyncio.shield(asyncio.wrap_future(stored))
        return entry, result if isinstance(result, Failure) else None

    def _expected_tokens(self, request: _Request) -> int:
        return estimate_prompt_tokens(request.messages) + round(self._completion_tokens)

    def _signal(self, request: _Request, result: Response | Failure) -> tuple[Signal, int, float | None]:
        """What the limiter learns of a call: what happened, the tokens used, seconds to wait."""
        if isinstance(result, Response):
            self._completion_tokens += 0.1 * (result.completion_tokens - self._completion_tokens)
            return "ok", result.prompt_tokens + result.completion_tokens, None
        used = self._expected_tokens(request) if result.charged else 0
        return "limited" if result.kind == "limited" else "failed", used, result.retry_after

    def _entry(
        self, endpoint: EndpointClient, request: _Request, result: Response | Failure, seconds: float
    ) -> LedgerEntry:
        who = self._identity(endpoint, request)
        if isinstance(result, Failure):
            price = 0.0
            if result.charged:  # by what the requests that did come back have cost
                prompt = estimate_prompt_tokens(request.messages)
                price = min(price_usd(self.teacher, prompt, round(self._completion_tokens)), request.worst_usd)
            unsure = request.worst_usd - price if result.charged else 0.0
            error: dict[str, Any] = {"outcome": "error", "detail": result.detail, "seconds": seconds}
            return LedgerEntry(**who, **error, price_usd=price, unsure_usd=unsure)
        price = price_usd(self.teacher, result.prompt_tokens, result.completion_tokens, result.cached_tokens)
        return LedgerEntry(
            **who,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            completion_tokens=result.completion_tokens,
            price_usd=price,
            seconds=result.seconds,
            outcome=result.outcome,
            text=result.text,
            finish_reason=result.finish_reason,
        )

    def _identity(self, endpoint: EndpointClient, request: _Request) -> dict[str, Any]:
        return {
            "key": request.keys[endpoint.endpoint.base_url],
            "domain": self.domain,
            "tier": self.tier,
            "task_id": request.task.id,
            "attempt": request.attempt,
            "round": request.round,
            "step": request.step,
            "judge": self._judge,
            "teacher": self.teacher.name,
            "endpoint": endpoint.endpoint.base_url,
            "created": time.time(),
        }

    def _answer(self, request: _Request, entry: LedgerEntry, *, from_ledger: bool) -> Answer:
        text = without_prefill(request.task, final_answer(entry.text, self.teacher.keep_reasoning))
        error = {
            "cut": f"cut off at {self.teacher.max_tokens} tokens",
            "empty": f"empty answer (finish reason {entry.finish_reason!r})",
            "error": entry.detail,
        }.get(entry.outcome, "" if text.strip() else "no answer after the reasoning")
        return Answer(
            task_id=request.task.id,
            attempt=request.attempt,
            round=request.round,
            step=request.step,
            teacher=self.teacher.name,
            tier=self.tier,
            text="" if error else text,
            cost_usd=entry.price_usd,
            prompt_tokens=entry.prompt_tokens,
            completion_tokens=entry.completion_tokens,
            seconds=entry.seconds,
            prompt_hash=message_hash(request.messages),
            from_ledger=from_ledger,
            error=error,
        )
