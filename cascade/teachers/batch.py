"""The Batch API: a tier's requests in large files at a lower price, answered within a day.

    gathered ──► recorded in the store ──► uploaded ──► created ──► its id recorded ──► polled ──► into the ledger

What is recorded before a batch is created lets a later process find it at the endpoint (by a mark in its metadata)
and wait for it instead of submitting it again, whenever the first one was killed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import openai
from openai.types import Batch

from cascade.artifacts import Store
from cascade.config import Teacher
from cascade.errors import TeacherError
from cascade.tasks import Message
from cascade.teachers.budget import price_usd
from cascade.teachers.endpoint import EndpointClient, Failure, read_response
from cascade.teachers.ledger import Ledger, LedgerEntry, Sent

FOLDER = "batches"
GATHER_S = 5.0
"""A batch is submitted when so many seconds have brought no further request."""
POLL_S = 30.0
"""Seconds between two looks at a batch."""
_MARK = "cascade_batch"
_MOST_REQUESTS = 50_000
_MOST_BYTES = 150_000_000
_TRIES = 5
_ENDED = ("completed", "failed", "expired", "cancelled")
_log = logging.getLogger(__name__)
Outcome = tuple[LedgerEntry, Failure | None]


@dataclass(frozen=True)
class BatchRequest:
    """One request of a batch.

    Attributes:
        key: `conversation.request_key`; its name in the batch.
        identity: the fields of its ledger row that are known before it is sent.
        worst_usd: the most that it can cost, at the price of a batch.
    """

    key: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    identity: Mapping[str, Any]
    worst_usd: float

    def line(self, model: str) -> bytes:
        """Its line of the file that is uploaded."""
        body = {"model": model, "messages": [m.as_dict() for m in self.messages], **self.parameters}
        call = {"custom_id": self.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(call).encode() + b"\n"


@dataclass
class _Record:
    """What the store knows of a batch: enough to find it, and to write its rows.

    Attributes:
        remote: its id at the endpoint, "" as long as nobody knows whether it was created.
        requests: key -> identity of the ledger row.
    """

    id: str
    tier: int
    model: str
    endpoint: str
    requests: dict[str, dict[str, Any]]
    remote: str = ""
    done: bool = False
    created: float = field(default_factory=time.time)


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
        self._store: Store = ledger.store
        self._queue: list[BatchRequest] = []
        self._last_added = 0.0
        self._futures: dict[str, asyncio.Future[Outcome]] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.Task[None] | None = None
        self._resumed: asyncio.Task[None] | None = None

    async def resume(self) -> None:
        """Find the batches of earlier processes that have not been fetched. Called again, it waits for the first."""
        self._resumed = self._resumed or asyncio.ensure_future(self._resume())
        await asyncio.shield(self._resumed)

    def awaits(self, key: str) -> bool:
        """Whether the request is in a batch already, so that nothing more is paid for it."""
        return key in self._futures

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
            if wait > 0 and len(self._queue) < _MOST_REQUESTS:
                await asyncio.sleep(min(wait, 1.0))
                continue
            self._gathering = None
            await self._submit_all()
            return

    async def _submit_all(self) -> None:
        queue, self._queue = self._queue, []
        lines: list[bytes] = []
        requests: list[BatchRequest] = []
        for request in queue:
            line = request.line(self._teacher.name)
            if requests and (len(requests) == _MOST_REQUESTS or sum(map(len, lines)) + len(line) > _MOST_BYTES):
                self._start(self._submit(requests, b"".join(lines)))
                requests, lines = [], []
            requests.append(request)
            lines.append(line)
        if requests:
            self._start(self._submit(requests, b"".join(lines)))

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _submit(self, requests: list[BatchRequest], content: bytes) -> None:
        identities = {r.key: dict(r.identity) for r in requests}
        record = _Record(uuid.uuid4().hex, self._tier, self._teacher.name, self._endpoint.endpoint.base_url, identities)
        try:
            await asyncio.to_thread(self._keep, record)
            sent = [Sent(r.key, self._domain, self._tier, r.worst_usd, record.id) for r in requests]
            await asyncio.gather(*(self._ledger.arecord(row) for row in sent))
            batch = await self._create(record, content)
        except (openai.OpenAIError, OSError) as error:
            await self._give_up(record, error)
            return
        await self._await(record, batch)

    async def _create(self, record: _Record, content: bytes) -> Batch:
        """Upload and create; what a broken connection leaves open is looked up before anything is tried again."""
        api = self._endpoint.api
        file_id = ""
        for attempt in range(1, _TRIES + 1):
            try:
                if not file_id:
                    file_id = (await api.files.create(file=(f"{record.id}.jsonl", content), purpose="batch")).id
                batch = await self._find(record.id) if attempt > 1 else None
                batch = batch or await api.batches.create(
                    input_file_id=file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={_MARK: record.id},
                )
                record.remote = batch.id
                await asyncio.to_thread(self._keep, record)
                return batch
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                if attempt == _TRIES:
                    raise
                await asyncio.sleep(self._endpoint.backoff(attempt))
        raise AssertionError("unreachable")

    async def _find(self, mark: str) -> Batch | None:
        """A batch at the endpoint by our mark."""
        async for batch in self._endpoint.api.batches.list(limit=100):
            if (batch.metadata or {}).get(_MARK) == mark:
                return batch
        return None

    async def _resume(self) -> None:
        """
        Raises:
            TeacherError: the endpoint cannot be asked for them, so that nobody knows what was submitted.
        """
        try:
            await self._find_open()
        except openai.OpenAIError as error:
            self._resumed = None
            raise TeacherError(
                f"tier {self._tier}: {self._endpoint.endpoint.base_url} cannot be asked for its batches ({error}); "
                "nothing is submitted until it can, so that no batch is paid twice"
            ) from error

    async def _find_open(self) -> None:
        for record in await asyncio.to_thread(self._open_records):
            batch = await (
                self._endpoint.api.batches.retrieve(record.remote) if record.remote else self._find(record.id)
            )
            if batch is None:  # killed before it was created
                await self._finish(record, {}, Failure("broken", "killed before the batch was submitted"))
                continue
            record.remote = batch.id
            for key in record.requests:
                self._expect(key)
            self._start(self._await(record, batch))

    async def _await(self, record: _Record, batch: Batch) -> None:
        while batch.status not in _ENDED:
            await asyncio.sleep(POLL_S)
            try:
                batch = await self._endpoint.api.batches.retrieve(record.remote)
            except openai.OpenAIError as error:
                _log.warning("batch %s: cannot be looked at now (%s); trying again", record.remote, error)
        results: dict[str, dict[str, Any]] = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            results |= await self._read(file_id)
        failures = ", ".join(e.message or "" for e in (batch.errors.data if batch.errors else None) or ())
        kind: Any = "refused" if batch.status == "failed" else "broken"
        await self._finish(record, results, Failure(kind, f"batch {batch.id} {batch.status} without it: {failures}"))

    async def _read(self, file_id: str) -> dict[str, dict[str, Any]]:
        """Lines of a result file by request key; tried until it comes, since it is paid for."""
        attempt = 0
        while True:
            try:
                content = await self._endpoint.api.files.content(file_id)
                rows = [json.loads(line) for line in content.text.splitlines() if line.strip()]
                return {row["custom_id"]: row for row in rows}
            except (openai.OpenAIError, ValueError, KeyError) as error:
                attempt += 1
                _log.warning("batch results %s: %s; trying again", file_id, error)
                await asyncio.sleep(self._endpoint.backoff(attempt))

    async def _finish(self, record: _Record, results: Mapping[str, dict[str, Any]], missing: Failure) -> None:
        """Write all rows of a batch, then tell those who wait for them."""
        outcomes = {key: self._outcome(record, key, results.get(key), missing) for key in record.requests}
        await asyncio.gather(*(self._ledger.arecord(entry) for entry, _ in outcomes.values()))
        record.done = True
        await asyncio.to_thread(self._keep, record)
        for key, outcome in outcomes.items():
            future = self._futures.pop(key, None)
            if future is not None and not future.done():
                future.set_result(outcome)

    async def _give_up(self, record: _Record, error: Exception) -> None:
        if isinstance(error, openai.APIStatusError):
            failure = self._endpoint.status(error)
        else:
            failure = Failure("broken", f"the batch could not be submitted: {error}")
        self._endpoint.judge(failure)
        await self._finish(record, {}, failure)

    def _outcome(self, record: _Record, key: str, row: dict[str, Any] | None, missing: Failure) -> Outcome:
        identity = record.requests[key] | {"batch": record.id, "created": time.time()}
        response = (row or {}).get("response") or {}
        failure = missing
        if response.get("status_code") == 200:
            try:
                result = read_response(response.get("body"), (), time.time() - record.created)
            except ValueError as error:
                failure = Failure("broken", f"nonsense in a batch: {error}"[:300])
            else:
                tokens = (result.prompt_tokens, result.completion_tokens, result.cached_tokens)
                price = price_usd(self._teacher, *tokens) * self._teacher.batch_price_share
                return LedgerEntry(**identity, **asdict(result), price_usd=price), None
        elif row is not None:
            status, said = response.get("status_code"), str(row.get("error") or response.get("body"))[:300]
            kind: Any = "refused" if status and 400 <= status < 500 and status not in (408, 429) else "broken"
            failure = Failure(kind, f"in a batch: {status}: {said}")
        return LedgerEntry(**identity, outcome="error", detail=failure.detail), failure

    def _keep(self, record: _Record) -> None:
        self._store.write_json(f"{FOLDER}/{self._domain}/{record.id}.json", asdict(record))

    def _open_records(self) -> list[_Record]:
        folder = f"{FOLDER}/{self._domain}"
        found = [
            _Record(**self._store.read_json(f"{folder}/{n}")) for n in self._store.list(folder) if n.endswith(".json")
        ]
        mine = (self._tier, self._teacher.name, self._endpoint.endpoint.base_url)
        return [r for r in found if not r.done and (r.tier, r.model, r.endpoint) == mine]
