"""The ledger: one durable row per teacher request, so that nothing is ever paid twice.

Each writer appends JSON lines to a file of its own, `ledger/<domain>/<writer>.jsonl`, so any number of processes and
machines share one ledger without locks. A line is in the file before its response is used; a writer killed in the
middle of a line spoils that line alone. Where files cannot be appended to (object storage) every row is a small
object, `ledger/<domain>/<writer>/<number>.json`.

Only the place of each row is kept in memory, not its text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from cascade.artifacts import Store
from cascade.tasks import from_table, to_table

RequestOutcome = Literal["answered", "cut", "empty", "error"]
FOLDER = "ledger"
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
        price_usd: what the request cost.
        seconds: from sending to the whole response.
        outcome: "answered"; "cut" at the token limit; "empty" (or withheld by a filter); "error" if no response
            came that could be used. The first three answer the request and are never asked again.
        text: the response as it came, before anything was read out of it.
        finish_reason: the endpoint's word for why the answer ended.
        created: Unix time in seconds.
        detail: for "error": what went wrong.
        round: how many times the sample had been sent back for repair.
        judge: whether the request asked a judge for its opinion of an answer, rather than for an answer.
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
    seconds: float = 0.0
    outcome: RequestOutcome = "answered"
    text: str = ""
    finish_reason: str = ""
    created: float = 0.0
    detail: str = ""
    round: int = 0
    judge: bool = False

    @property
    def responded(self) -> bool:
        """Whether the request got its response, usable or not: then it is never sent again."""
        return self.outcome != "error"


_FIELDS = frozenset(f.name for f in fields(LedgerEntry))


class _Place(NamedTuple):
    path: str
    offset: int
    length: int


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
        self._answers: dict[str, _Place] = {}
        self._spent: dict[tuple[str, int], float] = defaultdict(float)
        self._read: dict[str, int] = {}
        self._lock = threading.RLock()
        self._writers: dict[str, _Writer] = {}
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger, (self.store, self.domain)

    def refresh(self) -> None:
        """Read what other writers have added since."""
        folder = f"{FOLDER}/{self.domain}" if self.domain else FOLDER
        names = [f"{folder}/{n}" for n in self.store.list(folder, recursive=True) if n.endswith((".jsonl", ".json"))]
        with self._lock:
            own = {w.path for w in self._writers.values()}
            fresh = [n for n in names if n not in own and not (n.endswith(".json") and n in self._read)]
            with ThreadPoolExecutor(1 if self.store.is_local else 16) as pool:
                for name, data in zip(fresh, pool.map(self._read_new, fresh), strict=True):
                    self._take_in(name, data)

    def _read_new(self, name: str) -> bytes:
        with self.store.filesystem.open_input_file(self.store.path(name)) as file:
            start = self._read.get(name, 0)
            size = file.size()
            return bytes(file.read_at(size - start, start)) if size > start else b""

    def _take_in(self, name: str, data: bytes) -> None:
        offset = start = self._read.get(name, 0)
        for line in data.splitlines(keepends=True):
            entry = parse_line(line)
            if entry is not None:
                self._count(entry, _Place(name, offset, len(line)))
            elif not line.endswith(b"\n"):
                break  # a writer is in the middle of it, or was killed there
            elif line.strip():
                _log.warning("ledger: unreadable line in %s at byte %d, left out", name, offset)
            offset += len(line)
        self._read[name] = max(offset, start)

    def _count(self, entry: LedgerEntry, place: _Place) -> None:
        self._spent[entry.domain, entry.tier] += entry.price_usd
        if entry.responded:
            self._answers.setdefault(entry.key, place)

    def record(self, entry: LedgerEntry) -> None:
        """Store a row; on return it survives a power cut."""
        self._write(entry).sync()

    async def arecord(self, entry: LedgerEntry) -> None:
        """Like `record`, without holding the event loop up for the disk.

        The row is handed to the operating system before the first await, so it survives a kill of this process from
        then on; on object storage it is on its way in a thread that a cancelled caller does not stop.
        """
        if self.store.is_local:
            writer = self._write(entry)
            await asyncio.shield(asyncio.to_thread(writer.sync))
        else:
            await asyncio.shield(asyncio.to_thread(self.record, entry))

    def _write(self, entry: LedgerEntry) -> _Writer:
        line = json.dumps(asdict(entry)).encode() + b"\n"
        with self._lock:
            writer = self._writers.get(entry.domain)
            if writer is None or writer.pid != os.getpid():
                writer = (
                    _FileWriter(self.store, entry.domain)
                    if self.store.is_local
                    else _ObjectWriter(self.store, entry.domain)
                )
                self._writers[entry.domain] = writer
        try:
            place = writer.append(line)
        except OSError:
            with self._lock:
                self._writers.pop(entry.domain, None)  # its last line may be torn: go on in another file
                self._read[writer.path] = writer.end
            raise
        with self._lock:
            self._read[place.path] = max(self._read.get(place.path, 0), place.offset + place.length)
            self._count(entry, place)
        return writer

    def get(self, key: str) -> LedgerEntry | None:
        """The response to a request, if one has ever come; errors do not count."""
        with self._lock:
            place = self._answers.get(key)
        if place is None:
            return None
        with self.store.filesystem.open_input_file(self.store.path(place.path)) as file:
            return parse_line(bytes(file.read_at(place.length, place.offset)))

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._answers

    def __len__(self) -> int:
        """Number of requests that were answered."""
        return len(self._answers)

    def entries(self) -> Iterator[LedgerEntry]:
        """All rows on disk, other writers' included, errors too; one file at a time in memory."""
        folder = f"{FOLDER}/{self.domain}" if self.domain else FOLDER
        for name in self.store.list(folder, recursive=True):
            if name.endswith((".jsonl", ".json")):
                for line in self.store.read_bytes(f"{folder}/{name}").splitlines():
                    if (entry := parse_line(line)) is not None:
                        yield entry

    def spent(self, tier: int | None = None, domain: str | None = None) -> float:
        """US dollars paid so far, in all or for one tier or domain."""
        with self._lock:
            return sum(
                usd
                for (its_domain, its_tier), usd in self._spent.items()
                if tier in (None, its_tier) and domain in (None, its_domain)
            )

    def to_table(self) -> pa.Table:
        """All rows as an Arrow table of `schema_of(LedgerEntry)`."""
        return to_table(LedgerEntry, list(self.entries()))

    def close(self) -> None:
        """Close this writer's files; a later row opens new ones."""
        with self._lock:
            for writer in self._writers.values():
                self._read[writer.path] = writer.end
                writer.close()
            self._writers.clear()


def entries_of(table: pa.Table) -> list[LedgerEntry]:
    """The rows of a table that `Ledger.to_table` made."""
    return from_table(LedgerEntry, table)


def parse_line(line: bytes) -> LedgerEntry | None:
    """One row from its JSON, None if it is torn. Fields of later versions are passed over."""
    try:
        raw = json.loads(line)
        return LedgerEntry(**{name: value for name, value in raw.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError):
        return None


def _writer_name() -> str:
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class _FileWriter:
    """Appends lines to a file that no other writer touches. Threads that wait for the disk share one fsync."""

    def __init__(self, store: Store, domain: str) -> None:
        self.pid = os.getpid()
        self.path = f"{FOLDER}/{domain}/{_writer_name()}.jsonl"
        self.end = 0
        self._synced = 0
        target = store.path(self.path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self._file = open(target, "xb", buffering=0)  # noqa: SIM115 - lives as long as the writer
        self._append_lock, self._sync_lock = threading.Lock(), threading.Lock()
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def append(self, line: bytes) -> _Place:
        with self._append_lock:
            place, rest = _Place(self.path, self.end, len(line)), memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
            self.end += len(line)
            return place

    def sync(self) -> None:
        """Return when all that was appended before the call is on the disk."""
        wanted = self.end
        with self._sync_lock:
            if self._synced < wanted:
                end = self.end
                os.fsync(self._file.fileno())
                self._synced = end

    def close(self) -> None:
        with self._sync_lock:
            self._file.close()


class _ObjectWriter:
    """Writes every row as an object of its own."""

    def __init__(self, store: Store, domain: str) -> None:
        self.pid = os.getpid()
        self.store = store
        self.path = f"{FOLDER}/{domain}/{_writer_name()}"
        self.end = 0
        self._lock = threading.Lock()

    def append(self, line: bytes) -> _Place:
        with self._lock:
            number, self.end = self.end, self.end + 1
        name = f"{self.path}/{number:08d}.json"
        self.store.write_bytes(name, line)
        return _Place(name, 0, len(line))

    def sync(self) -> None:
        """Nothing to do: an object is stored when its write returns."""

    def close(self) -> None:
        """Nothing to do: no file is kept open."""


_Writer = _FileWriter | _ObjectWriter
