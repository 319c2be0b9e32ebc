"""Where the ledger's lines go: an append-only file per writer, or objects where files cannot be appended to.

Both commit in groups: what arrives while the disk or the object store is busy goes into the next fsync or the next
object, so that a hundred responses a second cost a handful of them.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from cascade.errors import DataError
from cascade.store import Store

APPENDED, WHOLE = ".jsonl", ".json"
"""Suffixes of a file that may still grow, and of an object that never changes."""
_COMPACTED = "compacted-"
_SECTION = "object"
_Pending = tuple[bytes, "Future[Place]"]


class Place(NamedTuple):
    """Where a line is: bytes `offset` to `offset + length` of a file of the store."""

    path: str
    offset: int
    length: int


class Journal:
    """One writer's lines. Thread-safe.

    Attributes:
        name: the writer's own; all that it writes is below or at this path of the store.
        pid: the process that it belongs to; a forked child needs one of its own.
    """

    def __init__(self, store: Store, folder: str, stored: Callable[[bytes, Place], None]) -> None:
        """
        Args:
            folder: of the store, where the writer makes its file or its own folder.
            stored: called for each line as soon as a kill of this process cannot take it away any more.
        """
        self.store, self.pid = store, os.getpid()
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:40]
        self.name = f"{folder}/{host}-{self.pid}-{uuid.uuid4().hex[:8]}"
        self._stored = stored
        self._pending: list[_Pending] = []
        self._lock = threading.Lock()
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    def append(self, line: bytes) -> Future[Place]:
        """Add a line, newline included; the result comes when it survives a power cut.

        Raises:
            OSError: the file cannot be written to. Go on in another journal: the last line may be torn.
        """
        future: Future[Place] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._accept(line, future)
            if not self._busy:
                self._busy = True
                self._thread.submit(self._commit_all)
        return future

    def close(self) -> None:
        """Write what is pending and release what is open."""
        self._thread.shutdown(wait=True)

    def _accept(self, line: bytes, future: Future[Place]) -> None:
        self._pending.append((line, future))

    def _commit_all(self) -> None:
        while True:
            with self._lock:
                group, self._pending = self._pending, []
                self._busy = bool(group)
            if not group:
                return
            try:
                places = self._commit(group)
            except Exception as error:  # whoever waits for the line is told
                for _, future in group:
                    future.set_exception(error)
            else:
                for (_, future), place in zip(group, places, strict=True):
                    future.set_result(place)

    def _commit(self, group: list[_Pending]) -> list[Place]:
        """Make a group of lines durable; returns where each of them is."""
        raise NotImplementedError


class FileJournal(Journal):
    """Appends to `<name>.jsonl`, which no other writer touches; a line is in the file when `append` returns."""

    def __init__(self, store: Store, folder: str, stored: Callable[[bytes, Place], None]) -> None:
        super().__init__(store, folder, stored)
        self.path = self.name + APPENDED
        self.end = 0
        self._places: list[Place] = []
        target = store.path(self.path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self._file = open(target, "xb", buffering=0)  # noqa: SIM115 - lives as long as the writer
        directory = os.open(os.path.dirname(target), os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def _accept(self, line: bytes, future: Future[Place]) -> None:
        place, rest = Place(self.path, self.end, len(line)), memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        self.end += len(line)
        self._stored(line, place)
        self._pending.append((line, future))
        self._places.append(place)

    def _commit(self, group: list[_Pending]) -> list[Place]:
        with self._lock:
            places, self._places = self._places[: len(group)], self._places[len(group) :]
        os.fsync(self._file.fileno())
        return places

    def close(self) -> None:
        """See `Journal.close`."""
        super().close()
        self._file.close()


class ObjectJournal(Journal):
    """Writes each group of lines as one object, `<name>/<number>.json`."""

    _number = 0

    def _commit(self, group: list[_Pending]) -> list[Place]:
        path, self._number = f"{self.name}/{self._number:08d}{WHOLE}", self._number + 1
        places, end = [], 0
        for line, _ in group:
            places.append(Place(path, end, len(line)))
            end += len(line)
        self.store.write_bytes(path, b"".join(line for line, _ in group))
        for (line, _), place in zip(group, places, strict=True):
            self._stored(line, place)
        return places


def open_journal(store: Store, folder: str, stored: Callable[[bytes, Place], None]) -> Journal:
    """The kind of journal that a store can have."""
    return (FileJournal if store.is_local else ObjectJournal)(store, folder, stored)


def lines(name: str, data: bytes, offset: int = 0) -> Iterator[tuple[str, Place, bytes]]:
    """The lines of a file or object, with the name of the object that each was written to first.

    Args:
        name: of the file or object.
        data: its content from `offset` on.
    """
    origin = name
    for line in data.splitlines(keepends=True):
        if line.startswith(b'{"' + _SECTION.encode() + b'"'):
            origin = str(json.loads(line)[_SECTION])
        else:
            yield origin, Place(name, offset, len(line)), line
        offset += len(line)


def list_names(store: Store, folder: str) -> list[str]:
    """All journals' files and objects below a folder of the store, compacted ones last."""
    names = [f"{folder}/{n}" for n in store.list(folder, recursive=True) if n.endswith((APPENDED, WHOLE))]
    return sorted(names, key=lambda n: (_is_compacted(n), n))


def compact(store: Store, folder: str, at_least: int = 64) -> int:
    """Put many small objects together into one; safe while others read and write, and while others compact.

    In the new object a section per old one says which it was, so that a reader who knows the old one counts nothing
    twice. Files that are appended to are left alone.

    Returns:
        How many objects are gone; 0 if there were fewer than `at_least`.

    Raises:
        DataError: an object is no journal's.
    """
    names = [n for n in list_names(store, folder) if n.endswith(WHOLE)]
    if len(names) < at_least:
        return 0
    sections: dict[str, list[bytes]] = {}
    found = []
    with ThreadPoolExecutor(16) as pool:
        for name, data in zip(names, pool.map(lambda n: read_if_there(store, n), names), strict=True):
            if data is None:
                continue  # another compaction was quicker
            found.append(name)
            if data and not data.endswith(b"\n"):
                raise DataError(f"{store.uri_of(name)} does not end with a line break: it is no part of a ledger")
            mine: dict[str, list[bytes]] = {}
            for origin, _, line in lines(name, data):
                mine.setdefault(origin, []).append(line)
            for origin, content in mine.items():
                sections.setdefault(origin, content)
        text = b"".join(
            json.dumps({_SECTION: origin}).encode() + b"\n" + b"".join(content) for origin, content in sections.items()
        )
        store.write_bytes(f"{folder}/{_COMPACTED}{uuid.uuid4().hex}{WHOLE}", text)
        list(pool.map(store.delete, found))
    return len(found)


def read_if_there(store: Store, name: str, start: int = 0) -> bytes | None:
    """A file's bytes from `start` on, None if it is gone: it was compacted since it was listed."""
    try:
        with store.filesystem.open_input_file(store.path(name)) as file:
            size = file.size()
            return bytes(file.read_at(size - start, start)) if size > start else b""
    except FileNotFoundError:
        return None


def _is_compacted(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith(_COMPACTED)
