"""The ledger: durable rows for every teacher request, so that nothing is ever paid twice and no cent is forgotten.

A request leaves two lines: that it is about to be sent and what it can cost at most, and what became of it. The
second is stored before the response is used, so that a kill at any point loses no answer; the first without the
second is a request that a killed process had in flight, which may have been charged.

Each writer has a journal of its own below `ledger/<domain>/` (`cascade.teachers.journal`), so any number of
processes and machines share one ledger without locks, on a file system or an object store. A writer killed in the
middle of a line spoils that line alone. Only the place of each row is kept in memory, not its text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from cascade.store import Store
from cascade.tasks import from_table, to_table
from cascade.teachers import journal
from cascade.teachers.journal import Journal, Place

RequestOutcome = Literal["answered", "cut", "empty", "error"]
FOLDER = "ledger"
_SENT = "sent"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What became of one request to a teacher.

    Attributes:
        key: `conversation.request_key`.
        endpoint: base_url as configured.
        prompt_tokens: tokens in, the cached ones included.
        cached_tokens: those of the prompt tokens that the endpoint had cached.
        completion_tokens: tokens out, hidden reasoning included.
        price_usd: what the request cost; for one that broke off, what it is expected to have cost.
        unsure_usd: how much more it can have cost, for one that broke off; else 0.
        seconds: from sending to the whole response.
        outcome: "answered"; "cut" at the token limit; "empty" (or withheld by a filter); "error" if no response
            came that could be used. The first three answer the request and are never asked again.
        text: the response as it came, before anything was read out of it.
        finish_reason: the endpoint's word for why the answer ended.
        created: Unix time in seconds.
        detail: for "error": what went wrong.
        round: how many times the sample had been sent back for repair.
        step: which answer of a conversation it is, from 0.
        judge: whether the request asked a judge for its opinion of an answer, rather than for an answer.
        batch: the batch that it was part of, "" for a request of its own.
    """

    key: str
    domain: str
    tier: int
    task_id: str
    attempt: int
    teacher: str
    endpoint: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    price_usd: float = 0.0
    unsure_usd: float = 0.0
    seconds: float = 0.0
    outcome: RequestOutcome = "answered"
    text: str = ""
    finish_reason: str = ""
    created: float = 0.0
    detail: str = ""
    round: int = 0
    judge: bool = False
    batch: str = ""
    step: int = 0

    @property
    def responded(self) -> bool:
        """Whether the request got its response, usable or not: then it is never sent again."""
        return self.outcome != "error"


@dataclass(frozen=True, slots=True)
class Sent:
    """That a request is about to be sent.

    Attributes:
        key: `conversation.request_key`; the same writer's (or batch's) next entry of this key says what became of it.
        at_most_usd: the most that it can cost.
    """

    key: str
    domain: str
    tier: int
    at_most_usd: float
    batch: str = ""


_ENTRY_FIELDS = frozenset(f.name for f in fields(LedgerEntry))
_SENT_FIELDS = frozenset(f.name for f in fields(Sent))


class Ledger:
    """All requests below one store, or those of one domain. Thread-safe; any number of writers share a store.

    Rows that other writers add after the start are seen after `refresh`.
    """

    def __init__(self, store: Store, domain: str | None = None) -> None:
        """
        Args:
            store: the root of all runs; the ledger is its folder `ledger/`.
            domain: read this domain's rows alone; None reads all.
        """
        self.store, self.domain = store, domain
        self._answers: dict[str, Place] = {}
        self._spent: dict[tuple[str, int], float] = defaultdict(float)
        self._unsure: dict[tuple[str, int], float] = defaultdict(float)
        self._open: dict[tuple[str, str], Sent] = {}  # (batch or writer, key): sent, and nothing more is known
        self._closed: set[tuple[str, str]] = set()  # of batches, whose two lines can be two writers'
        self._read: dict[str, int] = {}  # file or object -> bytes taken in
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._journals: dict[str, Journal] = {}
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger, (self.store, self.domain)

    @property
    def _folder(self) -> str:
        return f"{FOLDER}/{self.domain}" if self.domain else FOLDER

    def refresh(self) -> None:
        """Read what other writers have added since. Whoever asks or adds meanwhile does not wait for that."""
        with self._refreshing:
            while not self._refresh():
                pass  # an object was compacted away after it had been listed: look again

    def _refresh(self) -> bool:
        names = journal.list_names(self.store, self._folder)
        with self._lock:
            fresh = [n for n in names if not self._is_own(n) and not (n.endswith(journal.WHOLE) and n in self._read)]
            starts = [self._read.get(name, 0) for name in fresh]
        with ThreadPoolExecutor(1 if self.store.is_local else 16) as pool:
            found = list(pool.map(partial(journal.read_if_there, self.store), fresh, starts))
        complete = True
        with self._lock:
            for name, start, data in zip(fresh, starts, found, strict=True):
                # Rows of what is gone are still to be counted, where they are now; those of a file that was this
                # process's own until now may have been counted meanwhile.
                if data is None or self._read.get(name, 0) != start:
                    complete = False
                else:
                    self._take_in(name, data)
        return complete

    def _is_own(self, name: str) -> bool:
        return any(name.startswith(j.name) for j in self._journals.values())

    def _take_in(self, name: str, data: bytes) -> None:
        end = self._read.get(name, 0)
        mine = {name}
        for origin, place, line in journal.lines(name, data, end):
            row = parse_line(line)
            if row is None and not line.endswith(b"\n"):
                break  # a writer is in the middle of it, or was killed there
            end = place.offset + place.length
            if row is None:
                if line.strip():
                    _log.warning("ledger: unreadable line in %s at byte %d, left out", name, place.offset)
            elif origin not in mine and (origin in self._read or self._is_own(origin)):
                self._move(row, place)
            else:
                mine.add(origin)
                self._read.setdefault(origin, 0)
                self._count(row, place, origin)
        self._read[name] = max(end, self._read.get(name, 0))

    def _count(self, row: LedgerEntry | Sent, place: Place, origin: str) -> None:
        where = (row.batch or _writer_of(origin), row.key)
        if isinstance(row, Sent):
            if where not in self._closed:
                self._open[where] = row
            return
        self._open.pop(where, None)
        if row.batch:
            self._closed.add(where)
        self._spent[row.domain, row.tier] += row.price_usd
        self._unsure[row.domain, row.tier] += row.unsure_usd
        if row.responded:
            self._answers.setdefault(row.key, place)

    def _move(self, row: LedgerEntry | Sent, place: Place) -> None:
        """A row that was counted where it stood before it was compacted."""
        if row.key in self._answers and isinstance(row, LedgerEntry) and row.responded:
            self._answers[row.key] = place

    def append(self, row: LedgerEntry | Sent) -> Future[Place]:
        """Store a row; the result comes when it survives a power cut.

        On a file system the row is handed to the operating system before this returns, so that it survives a kill
        of this process from then on.

        Raises:
            OSError: the file cannot be written; the next row goes to another.
        """
        raw = {_SENT: asdict(row)} if isinstance(row, Sent) else asdict(row)
        line = json.dumps(raw).encode() + b"\n"
        with self._lock:
            writer = self._journals.get(row.domain)
            if writer is None or writer.pid != os.getpid():
                writer = journal.open_journal(self.store, f"{FOLDER}/{row.domain}", self._stored)
                self._journals[row.domain] = writer
        try:
            return writer.append(line)
        except OSError:
            with self._lock:
                self._journals.pop(row.domain, None)
            raise

    def _stored(self, line: bytes, place: Place) -> None:
        row = parse_line(line)
        assert row is not None
        with self._lock:
            self._read[place.path] = max(self._read.get(place.path, 0), place.offset + place.length)
            self._count(row, place, place.path)

    def record(self, row: LedgerEntry | Sent) -> None:
        """Store a row; on return it survives a power cut."""
        self.append(row).result()

    async def arecord(self, row: LedgerEntry | Sent) -> None:
        """As `record`, without holding the event loop up; a cancelled caller does not stop it."""
        await asyncio.shield(asyncio.wrap_future(self.append(row)))

    async def asend(self, row: Sent) -> None:
        """Store that a request is about to be sent, so that it is known after a kill of this process.

        On a file system that is the case at once, and nothing waits for the disk.
        """
        stored = self.append(row)
        if not self.store.is_local:
            await asyncio.shield(asyncio.wrap_future(stored))

    def get(self, key: str) -> LedgerEntry | None:
        """The response to a request, if one has ever come; errors do not count."""
        for _ in range(3):
            with self._lock:
                place = self._answers.get(key)
            if place is None:
                return None
            try:
                with self.store.filesystem.open_input_file(self.store.path(place.path)) as file:
                    row = parse_line(bytes(file.read_at(place.length, place.offset)))
                return row if isinstance(row, LedgerEntry) else None
            except FileNotFoundError:
                self.refresh()  # its object was compacted
        return None

    def sent(self, batch: str, key: str) -> Sent | None:
        """That a request of a batch was sent, as long as it is not known what became of it."""
        with self._lock:
            return self._open.get((batch, key))

    def has_row(self, batch: str, key: str) -> bool:
        """Whether it is known what became of a request of a batch."""
        with self._lock:
            return (batch, key) in self._closed

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._answers

    def __len__(self) -> int:
        """Number of requests that were answered."""
        return len(self._answers)

    def entries(self) -> Iterator[LedgerEntry]:
        """All rows on disk, other writers' included, errors too; one file at a time in memory."""
        seen: set[str] = set()
        complete = False
        while not complete:  # an object was compacted away after it had been listed: look again for its rows
            complete = True
            for name in journal.list_names(self.store, self._folder):
                data = b"" if name in seen else journal.read_if_there(self.store, name)
                complete = complete and data is not None
                origins = set()
                for origin, _, line in journal.lines(name, data or b""):
                    if origin not in seen and isinstance(row := parse_line(line), LedgerEntry):
                        yield row
                    origins.add(origin)
                seen |= origins

    def spent(self, tier: int | None = None, domain: str | None = None) -> float:
        """US dollars paid so far, in all or for one tier or domain."""
        with self._lock:
            return _total(self._spent, tier, domain)

    def spent_at_most(self, tier: int | None = None, domain: str | None = None) -> float:
        """As `spent`, with the most that requests can have cost of which nobody knows."""
        with self._lock:
            sent: dict[tuple[str, int], float] = defaultdict(float)
            for row in self._open.values():
                sent[row.domain, row.tier] += row.at_most_usd
            sums = [_total(usd, tier, domain) for usd in (self._spent, self._unsure, sent)]
            return sum(sums)

    @property
    def unsettled(self) -> int:
        """Requests that were sent and of which nothing more is known: in flight now, or lost by a kill."""
        return len(self._open)

    def to_table(self) -> pa.Table:
        """All rows as an Arrow table of `schema_of(LedgerEntry)`."""
        return to_table(LedgerEntry, list(self.entries()))

    def close(self) -> None:
        """Close this writer's files; a later row opens new ones."""
        with self._lock:
            closing, self._journals = list(self._journals.values()), {}
        for writer in closing:
            writer.close()


def compact(store: Store, domain: str, at_least: int = 64) -> int:
    """Put the small objects of a domain's ledger together, see `cascade.teachers.journal.compact`."""
    return journal.compact(store, f"{FOLDER}/{domain}", at_least)


def entries_of(table: pa.Table) -> list[LedgerEntry]:
    """The rows of a table that `Ledger.to_table` made."""
    return from_table(LedgerEntry, table)


def parse_line(line: bytes) -> LedgerEntry | Sent | None:
    """One row from its JSON, None if it is torn. Fields of later versions are passed over."""
    try:
        raw = json.loads(line)
        if _SENT in raw:
            return Sent(**{name: value for name, value in raw[_SENT].items() if name in _SENT_FIELDS})
        return LedgerEntry(**{name: value for name, value in raw.items() if name in _ENTRY_FIELDS})
    except (ValueError, TypeError, AttributeError):
        return None


def _total(usd: dict[tuple[str, int], float], tier: int | None, domain: str | None) -> float:
    return sum(v for (name, number), v in usd.items() if tier in (None, number) and domain in (None, name))


def _writer_of(origin: str) -> str:
    """The writer of a line: its file, or the folder of its objects."""
    return origin if origin.endswith(journal.APPENDED) else origin.rsplit("/", 1)[0]
