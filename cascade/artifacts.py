"""The run store: folders of Parquet tables and a manifest, addressed by job and fingerprint.

A run is `<storage>/<domain>/<job>@<fingerprint>/`. While a job works it adds parts
(`verdicts.<part>.parquet`), each written whole or not at all, so a killed job finds again what it had finished.
`Run.finish` merges the parts into `verdicts.parquet` and marks the manifest done; asked again, the job is a no-op.
The merged table names the parts that are in it, so that one killed before it removed them reads none of them twice.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cascade.errors import DataError
from cascade.fingerprints import fingerprint
from cascade.store import Store
from cascade.tasks import from_table, to_table

Record = TypeVar("Record")
MANIFEST = "manifest.json"
_MERGED = b"cascade.parts"
"""Schema metadata of a whole table: the parts that it was made of."""


@dataclass(frozen=True)
class Run:
    """One job's folder. Made by `open_run`.

    Attributes:
        inputs: what decides the result, by name, each as a fingerprint: two runs' manifests tell what set them apart.
    """

    store: Store
    domain: str
    job: str
    fingerprint: str
    inputs: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return f"{self.job}@{self.fingerprint}"

    @property
    def folder(self) -> str:
        """Path of the run relative to the store."""
        return f"{self.domain}/{self.name}"

    @property
    def manifest(self) -> dict[str, Any]:
        path = f"{self.folder}/{MANIFEST}"
        try:
            return dict(self.store.read_json(path)) if self.store.exists(path) else {}
        except (ValueError, TypeError) as error:
            raise self._damaged(MANIFEST, error) from None

    def _damaged(self, file: str, error: Exception) -> DataError:
        where = self.store.uri_of(self.folder)
        return DataError(f"{where}/{file} is damaged ({error}): delete {where}, and the step is done anew")

    @property
    def done(self) -> bool:
        return self.manifest.get("state") == "done"

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures that the finished job reported."""
        return dict(self.manifest.get("metrics", {}))

    def tables(self) -> list[str]:
        return sorted({n.split(".")[0] for n in self.store.list(self.folder) if n.endswith(".parquet")})

    def write_part(self, table: str, rows: Sequence[Any]) -> None:
        """Add records (all of one class) to a table as one atomic file; safe from any number of processes.

        All rows of one key (`cascade.tasks.KEYS`) belong in one part: where two parts have the same key, because a
        block was repeated after a crash, the later part's rows are taken.
        """
        if rows:
            self._put(f"{table}.{time.time_ns():020d}-{uuid.uuid4().hex}", to_table(type(rows[0]), rows))

    def write_table(self, table: str, record: type[Record], rows: Sequence[Record]) -> None:
        """Write a whole table at once, replacing it and its parts."""
        self.write_arrow(table, to_table(record, rows))

    def write_arrow(self, table: str, content: pa.Table) -> None:
        """As `write_table`, with an Arrow table."""
        self._write_for(self._parts(table), table, content)

    def _write_for(self, parts: Sequence[str], table: str, content: pa.Table) -> None:
        """Write a whole table in place of these of its parts."""
        metadata = {**(content.schema.metadata or {}), _MERGED: json.dumps(parts)}
        self._put(table, content.replace_schema_metadata(metadata))
        for part in parts:
            self.store.delete(f"{self.folder}/{part}")

    def _put(self, name: str, content: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink, compression="zstd")
        self.store.write_bytes(f"{self.folder}/{name}.parquet", sink.getvalue().to_pybytes())

    def _get(self, file: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A file's table, or some columns of it and those of the key."""
        source = pa.BufferReader(self.store.read_bytes(f"{self.folder}/{file}"))
        try:
            if columns is not None:
                columns = list(dict.fromkeys([*columns, *_key_columns(pq.read_schema(source))]))
                source.seek(0)
            return pq.read_table(source, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(file, error) from None

    def _parts(self, table: str) -> list[str]:
        """File names of a table's parts, oldest first."""
        names = self.store.list(self.folder)
        return [n for n in names if n.startswith(f"{table}.") and n.endswith(".parquet") and n != f"{table}.parquet"]

    def read_arrow(self, table: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The table, with what parts were added since it was last merged; None if there is neither.

        Args:
            columns: those that are wanted; None: all.
        """
        return self._parts_and_all(table, columns)[1]

    def _parts_and_all(self, table: str, columns: Sequence[str] | None = None) -> tuple[list[str], pa.Table | None]:
        """The parts that there are, and the table with them. What another process merges meanwhile is read merged."""
        while True:
            parts = self._parts(table)
            try:
                return parts, self._read(table, parts, columns)
            except FileNotFoundError:
                if self._parts(table) == parts:
                    raise

    def _read(self, table: str, parts: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table | None:
        """What was merged, with these parts."""
        pieces, merged = [], set()
        if self.store.exists(f"{self.folder}/{table}.parquet"):
            pieces.append(self._get(f"{table}.parquet", columns))
            merged = set(json.loads((pieces[0].schema.metadata or {}).get(_MERGED, b"[]")))
        pieces += [self._get(part, columns) for part in parts if part not in merged]
        if not pieces:
            return None
        found = _newest_of_each_key(pieces)
        return found if columns is None else found.select(list(columns))

    def read(self, table: str, record: type[Record]) -> list[Record]:
        """The records of a table, empty if nothing was written."""
        arrow = self.read_arrow(table)
        return [] if arrow is None else from_table(record, arrow)

    def start(self, config: Any) -> None:
        """Write the manifest of a job that begins or resumes."""
        manifest = self.manifest
        manifest.setdefault("created", time.time())
        manifest |= {
            "job": self.job,
            "domain": self.domain,
            "fingerprint": self.fingerprint,
            "state": "begun",
            "inputs": dict(self.inputs),
            "config": config.model_dump(mode="json") if hasattr(config, "model_dump") else config,
            "starts": manifest.get("starts", 0) + 1,
        }
        self.store.write_json(f"{self.folder}/{MANIFEST}", manifest)

    def note(self, **figures: Any) -> None:
        """Keep figures in the manifest of a job that has not ended."""
        self.store.write_json(f"{self.folder}/{MANIFEST}", self.manifest | figures)

    def merge(self) -> None:
        """Put the parts of each table together, sorted by its first column; those that come meanwhile stay parts."""
        for table in self.tables():
            if self._parts(table):
                parts, merged = self._parts_and_all(table)
                assert merged is not None
                self._write_for(parts, table, merged.sort_by(merged.column_names[0]))

    def finish(self, metrics: Mapping[str, Any], **more: Any) -> None:
        """Merge the parts of each table and mark the run done."""
        self.merge()
        manifest = self.manifest | {"state": "done", "finished": time.time(), "metrics": dict(metrics)} | more
        self.store.write_json(f"{self.folder}/{MANIFEST}", manifest)

    def require(self) -> Run:
        """This run, which must be finished.

        Raises:
            DataError: the job has not run to its end.
        """
        if not self.done:
            raise DataError(f"{self.folder} is not finished: run `cascade {self.job.replace('_', '-')} CONFIG` first")
        return self


def _newest_of_each_key(pieces: Sequence[pa.Table]) -> pa.Table:
    """Tables put together, oldest first; a later table's rows take the place of earlier rows of the same key."""
    columns = _key_columns(pieces[0].schema)
    whole = pa.concat_tables(pieces, promote_options="default")
    if not columns or len(pieces) == 1 or len(whole.group_by(columns).aggregate([])) == len(whole):
        return whole
    kept: list[pa.Table] = []
    seen: set[tuple[Any, ...]] = set()
    for piece in reversed(pieces):
        keys = list(zip(*(piece.column(c).to_pylist() for c in columns), strict=True))
        kept.append(piece.filter(pa.array([key not in seen for key in keys], pa.bool_())))
        seen.update(keys)
    return pa.concat_tables(kept[::-1], promote_options="default")


def _key_columns(schema: pa.Schema) -> list[str]:
    """What the rows of a table are about, see `cascade.tasks.KEYS`."""
    return list(json.loads((schema.metadata or {}).get(b"key", b"[]")))


def open_run(store: Store, domain: str, job: str, **decides: Any) -> Run:
    """The run of a job whose result is decided by `decides` (config parts, inputs' fingerprints, seed)."""
    inputs = tuple((name, fingerprint(value=value)) for name, value in decides.items())
    return Run(store, domain, job, fingerprint(job=job, **decides), inputs)
