"""Reading a table that others are adding to."""

from __future__ import annotations

from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cascade.artifacts import Run
from cascade.tasks import from_table

Record = TypeVar("Record")


class Follower(Generic[Record]):
    """Hands out the records of a table as they come: each part is read once, however often one looks."""

    def __init__(self, run: Run, table: str, record: type[Record]) -> None:
        self._run, self._table, self._record = run, table, record
        self._seen: set[str] = set()

    def news(self) -> list[Record]:
        """What was not there at the last call, oldest first.

        Raises:
            OSError: the store cannot be read; nothing is lost by it.
        """
        names = self._run.store.list(self._run.folder)
        ours = [n for n in names if n.startswith(f"{self._table}.") and n.endswith(".parquet") and n not in self._seen]
        found = [record for name in ours for record in self._read(name)]
        self._seen.update(ours)  # now that all are read: after an error they come with the next call
        return found

    def _read(self, name: str) -> list[Record]:
        data = self._run.store.read_bytes(f"{self._run.folder}/{name}")
        return from_table(self._record, pq.read_table(pa.BufferReader(data)))
