"""The Batch API: a tier's requests in large files at a lower price, answered within a day.

    gathered ──► recorded in the store ──► uploaded ──► created ──► its id recorded ──► polled ──► into the ledger

What is recorded before a batch is created lets a later process find it at the endpoint (by a mark in its metadata)
and wait for it instead of submitting it again, whenever the first one was killed.

Batches are submitted one after another. One that finds the endpoint's queue full waits until another one of ours has
ended, and those behind it wait too; if none is under way it is tried again later, or cut.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

import openai
from openai.types import Batch

from cascade.config import Teacher
from cascade.errors import TeacherError
from cascade.teachers import batch_limits
from cascade.teachers.batch_limits import BatchRequest, cut, error_of, found_no_room, stated_limit, tokens_of
from cascade.teachers.batch_record import Record, Records
from cascade.teachers.batch_results import Outcome, Row, outcome_of, read_rows, refusal_of
from cascade.teachers.endpoint import EndpointClient, Failure
from cascade.teachers.ledger import Ledger, Sent

GATHER_S = 5.0
"""A batch is submitted when so many seconds have brought no further request."""
POLL_S = 30.0
"""Seconds between two looks at a batch."""
_MARK = "cascade_batch"
_TRIES = 8
_LONGEST_WAIT_S = 3600.0
_TRIES_ALONE = 30
"""How often a batch is submitted to a full queue that holds none of ours: after a day all others should have ended."""
_CUT_AFTER = 3
_MOST_OFF = 4
"""How many tokens there may be to one of our estimate: one a character."""
_ENDED = ("completed", "failed", "expired", "cancelled")
_PASSING = ("broken", "limited")
"""Kinds of failures that tell nothing of the request: the try before may have gone through."""
_log = logging.getLogger(__name__)


class BatchQueue:
    """The batches of one tier at one endpoint, for the coroutines of one event loop."""

    def __init__(
        self,
        teacher: Teacher,
        endpoint: EndpointClient,
        ledger: Ledger,
        domain: str,
        tier: int,
    ) -> None:
        self._teacher, self._endpoint, self._ledger = teacher, endpoint, ledger
        self._domain, self._tier = domain, tier
        self._whose = (teacher.name, endpoint.endpoint.base_url)
        self._records = Records(ledger.store, domain)
        self._queue: list[BatchRequest] = []
        self._last_added = 0.0
        self._futures: dict[str, asyncio.Future[Outcome]] = {}
        self._earlier: dict[str, str] = {}  # request of an earlier process -> its batch
        self._work: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.Task[None] | None = None
        self._resumed: asyncio.Task[None] | None = None
        self._door = asyncio.Lock()
        self._under_way = 0  # batches in the endpoint's queue
        self._ended = asyncio.Event()
        self._most_tokens = math.inf

    async def resume(self) -> None:
        """Find the batches of earlier processes that have not been fetched. Called again, it waits for the first."""
        self._resumed = self._resumed or asyncio.ensure_future(self._resume())
        await asyncio.shield(self._resumed)

    def awaits(self, key: str) -> bool:
        """Whether the request is in a batch already, so that nothing more is paid for it."""
        return key in self._futures

    def counted_usd(self, key: str) -> float | None:
        """What the ledger counts for a request of an earlier process until its row is written, None if nothing."""
        sent = self._ledger.sent(self._earlier.get(key, ""), key)
        return sent.at_most_usd if sent and sent.tier == self._tier else None

    async def complete(self, request: BatchRequest) -> Outcome:
        """The row of a request, once its batch has come back, and why there is no answer, if there is none."""
        future = self._futures.get(request.key)
        if future is None:
            future = self._expect(request.key)
            self._queue.append(request)
            self._last_added = time.monotonic()
            self._gathering = self._gathering or asyncio.ensure_future(self._gather())
        return await asyncio.shield(future)

    async def aclose(self) -> None:
        """Stop waiting. Batches that were submitted go on at the endpoint, and `resume` finds them."""
        tasks = [t for t in (*self._work, self._gathering, self._resumed) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _expect(self, key: str) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._futures[key] = future
        return future

    async def _gather(self) -> None:
        while True:
            wait = self._last_added + GATHER_S - time.monotonic()
            if wait > 0 and len(self._queue) < batch_limits.MOST_REQUESTS:
                await asyncio.sleep(min(wait, 1.0))
                continue
            self._gathering = None
            queue, self._queue = self._queue, []
            self._start_all(queue, self._most_tokens)
            return

    def _start_all(self, requests: list[BatchRequest], most_tokens: float) -> None:
        for part in cut(requests, self._teacher.name, most_tokens):
            self._start([r.key for r in part], self._submit(part))

    def _start(self, keys: Collection[str], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(self._do(keys, work))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _do(self, keys: Collection[str], work: Coroutine[Any, Any, None]) -> None:
        """Work on the batch of some requests. Its error is told to all who wait for one of them, now or later."""
        try:
            await work
        except Exception as error:
            for future in (self._futures[key] for key in keys if key in self._futures):
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # there may be nobody yet

    async def _submit(self, requests: list[BatchRequest]) -> None:
        async with self._door:
            if len(requests) > 1 and tokens_of(requests) > self._most_tokens:  # as is known by now
                self._start_all(requests, self._most_tokens)
                return
            record = await self._open(requests)
            taken = await self._enqueue(record, requests)
        if isinstance(taken, Batch):
            await self._await(record, taken)
        elif isinstance(taken, Failure):
            await self._finish(record, {}, taken)
        else:
            await self._close(record, {}, Failure("limited", "the batch was cut"))
            self._start_all(requests, taken)

    async def _open(self, requests: list[BatchRequest]) -> Record:
        """Record that a batch is about to be submitted."""
        identities, tokens = {r.key: dict(r.identity) for r in requests}, {r.key: r.prompt_tokens for r in requests}
        record = Record(uuid.uuid4().hex, self._tier, *self._whose, identities, prompt_tokens=tokens)
        await asyncio.to_thread(self._records.keep, record)
        sent = [Sent(r.key, self._domain, self._tier, r.worst_usd, record.id) for r in requests]
        await asyncio.gather(*(self._ledger.arecord(row) for row in sent))
        return record

    async def _enqueue(self, record: Record, requests: list[BatchRequest]) -> Batch | Failure | float:
        """Submit a batch until the queue has room for it.

        Returns:
            The batch; or why its requests cannot be submitted; or to batches of how many tokens they are to be cut.
        """
        if self._endpoint.refusal:
            return Failure("unusable", self._endpoint.refusal)
        content = b"".join(r.line(self._teacher.name) for r in requests)
        if len(content) > batch_limits.MOST_BYTES:
            return Failure("refused", f"no batch takes a request of {len(content):,} bytes")
        tokens, is_single, alone = tokens_of(requests), len(requests) == 1, 0
        while is_single or tokens <= self._most_tokens:
            others = self._under_way
            self._ended.clear()
            offered = await self._offer(record, content)
            if not isinstance(offered, str):
                return offered
            _log.warning("tier %d: %s; a batch of %d requests waits", self._tier, offered, len(requests))
            if others:
                await self._ended.wait()
                continue
            alone += 1
            if self._is_beyond(tokens, is_single, alone):
                break
            if alone == _TRIES_ALONE:
                return self._refuse(
                    f"for a day the queue had no room for a batch, though none of this run's: {offered}"
                )
            await asyncio.sleep(min(POLL_S * 2.0 ** (alone - 1), _LONGEST_WAIT_S))
        if is_single:
            return Failure("refused", f"about {tokens:,} tokens are too many for batches; set mode: live ({offered})")
        return self._most_tokens if tokens > self._most_tokens else tokens / 2

    def _is_beyond(self, tokens: int, is_single: bool, alone: int) -> bool:
        """Whether a batch that was refused though none of ours is under way has too many tokens: else it may be that
        batches of others fill the queue.
        """
        patience = _TRIES_ALONE if is_single else _CUT_AFTER
        return tokens > self._most_tokens or (alone >= patience and _MOST_OFF * tokens > self._most_tokens)

    async def _offer(self, record: Record, content: bytes) -> Batch | Failure | str:
        """Submit a batch once.

        Returns:
            The batch as it was taken in (or failed for another reason than a full queue); what the endpoint says of
            its full queue; or why it takes no batches.
        """
        try:
            batch = await self._create(record, content)
        except openai.OpenAIError as error:
            if not isinstance(error, openai.APIStatusError) or error.code != batch_limits.QUEUE_FULL:
                return self._not_submitted(error)
            said = str(error)
        else:
            batch = await self._poll(record, batch, lambda b: b.status != "validating")
            if not found_no_room(batch):
                return batch
            said = error_of(batch)
        record.remote = ""  # of the next try
        await asyncio.to_thread(self._records.keep, record)
        if (limit := stated_limit(said)) < math.inf:
            self._most_tokens = limit
        return said

    def _not_submitted(self, error: openai.OpenAIError) -> Failure:
        """
        Raises:
            TeacherError: nobody knows whether it was.
        """
        why = f"the batch could not be submitted: {error}"
        if not isinstance(error, openai.APIStatusError) or self._endpoint.status(error).kind in _PASSING:
            raise TeacherError(
                f"tier {self._tier} ({self._teacher.name}): {self._endpoint.endpoint.base_url}: {why}. "
                "All answers bought so far are kept; run again, and it is looked for before another is submitted"
            ) from error
        return self._refuse(f"{self._endpoint.status(error).detail}: {why}")

    def _refuse(self, why: str) -> Failure:
        """The endpoint takes no such batch: that concerns no single request, and stops the run."""
        failure = Failure("unusable", why)
        self._endpoint.judge(failure)
        return failure

    async def _create(self, record: Record, content: bytes) -> Batch:
        """Upload and create; what a broken connection leaves open is looked up before anything is tried again."""
        api = self._endpoint.api
        for attempt in range(1, _TRIES + 1):
            try:
                if not record.file:
                    record.file = (await api.files.create(file=(f"{record.id}.jsonl", content), purpose="batch")).id
                batch = await self._find(record.id) if attempt > 1 else None
                batch = batch or await api.batches.create(
                    input_file_id=record.file,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={_MARK: record.id},
                )
                record.remote = batch.id
                await asyncio.to_thread(self._records.keep, record)
                return batch
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                if attempt == _TRIES or error.code == batch_limits.QUEUE_FULL:
                    raise
                await asyncio.sleep(self._endpoint.backoff(attempt))
        raise AssertionError("unreachable")

    async def _find(self, mark: str) -> Batch | None:
        """A batch at the endpoint by our mark. One that failed is none: it did nothing, another may have followed."""
        async for batch in self._endpoint.api.batches.list(limit=100):
            if (batch.metadata or {}).get(_MARK) == mark and batch.status != "failed":
                return batch
        return None

    async def _resume(self) -> None:
        """
        Raises:
            TeacherError: the endpoint cannot be asked for them, so that nobody knows what was submitted.
        """
        try:
            await self._find_open()
        except (openai.OpenAIError, TeacherError) as error:
            self._resumed = None
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(
                f"tier {self._tier}: {self._endpoint.endpoint.base_url} cannot be asked for its batches ({error}); "
                "nothing is submitted until it can, so that no batch is paid twice"
            ) from error

    async def _find_open(self) -> None:
        found = []  # all of them before anything is done: after an error this begins anew
        for record in await asyncio.to_thread(self._records.unfinished, *self._whose):
            try:
                batch = await (
                    self._endpoint.api.batches.retrieve(record.remote) if record.remote else self._find(record.id)
                )
            except openai.OpenAIError as error:
                if record.remote:
                    self._check_not_lost(record, error)
                raise
            found.append((record, batch))
        for record, batch in found:
            if batch is None:  # killed before it was created
                await self._finish(record, {}, Failure("broken", "killed before the batch was submitted"))
                continue
            record.remote = batch.id
            for key in record.requests:
                self._expect(key)
                self._earlier[key] = record.id
            self._start(record.requests, self._await(record, batch))

    async def _await(self, record: Record, batch: Batch) -> None:
        self._under_way += 1
        try:
            batch = await self._poll(record, batch, lambda b: b.status in _ENDED)
        finally:
            self._under_way -= 1
            self._ended.set()
        results: dict[str, Row] = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            results |= await self._read(record, file_id)
        if found_no_room(batch):  # of an earlier process
            missing = Failure("limited", error_of(batch))
        elif batch.status == "failed":
            missing = self._refuse(
                f"{self._endpoint.endpoint.base_url} did not take batch {batch.id}: {error_of(batch)}"
            )
        elif not self._endpoint.has_answered and (refusal := refusal_of(results.values())):
            missing, results = self._refuse(refusal), {}  # the endpoint's affair: none of these tasks is settled
        else:
            missing = Failure("broken", f"batch {batch.id} {batch.status} without it")
        await self._finish(record, results, missing)

    async def _poll(self, record: Record, batch: Batch, is_over: Callable[[Batch], bool]) -> Batch:
        """Look at a batch from time to time until something is over."""
        while not is_over(batch):
            await asyncio.sleep(POLL_S)
            try:
                batch = await self._endpoint.api.batches.retrieve(record.remote)
            except openai.OpenAIError as error:
                self._check_not_lost(record, error)
                _log.warning("batch %s: cannot be looked at now (%s); trying again", record.remote, error)
        return batch

    async def _read(self, record: Record, file_id: str) -> dict[str, Row]:
        """Lines of a result file by request key; tried until it comes, since it is paid for."""
        attempt = 0
        while True:
            attempt += 1
            try:
                rows, unreadable = read_rows((await self._endpoint.api.files.content(file_id)).text)
                if not unreadable or attempt > self._teacher.retries:
                    return rows
                error: Exception = ValueError(f"{unreadable} of its lines cannot be read")
            except openai.OpenAIError as found:
                self._check_not_lost(record, found)
                error = found
            _log.warning("batch results %s: %s; trying again", file_id, error)
            await asyncio.sleep(self._endpoint.backoff(attempt))

    async def _finish(self, record: Record, results: Mapping[str, Row], missing: Failure) -> None:
        """Write all rows of a batch, then tell those who wait for them."""
        for key, outcome in (await self._close(record, results, missing)).items():
            future = self._futures.pop(key, None)
            if future is not None and not future.done():
                future.set_result(outcome)

    async def _close(self, record: Record, results: Mapping[str, Row], missing: Failure) -> dict[str, Outcome]:
        """Write all rows of a batch, less those that an earlier process wrote before it was killed."""
        outcomes = {key: outcome_of(self._teacher, record, key, results.get(key), missing) for key in record.requests}
        for failure in (outcomes[key][1] for key in results if key in outcomes):
            if failure is None or failure.kind != "refused":  # those are their tasks' own affair, see `refusal_of`
                self._endpoint.judge(failure)
        new = (entry for key, (entry, _) in outcomes.items() if not self._ledger.has_row(record.id, key))
        await asyncio.gather(*(self._ledger.arecord(entry) for entry in new))
        record.done = True
        await asyncio.to_thread(self._records.keep, record)
        return outcomes

    def _check_not_lost(self, record: Record, error: Exception) -> None:
        """
        Raises:
            TeacherError: what failed so will not do better at the next try.
        """
        if isinstance(error, openai.APIStatusError) and self._endpoint.status(error).kind in ("refused", "unusable"):
            raise TeacherError(
                f"tier {self._tier}: what became of batch {record.remote} cannot be fetched: "
                f"{self._endpoint.status(error).detail}. It is not submitted again, so that it is not paid twice; to "
                f"do without it, delete {self._records.uri(record)}"
            ) from error
