"""The run store: folders of Parquet tables and a manifest, addressed by job and fingerprint.

A run is `<storage>/<domain>/<job>@<fingerprint>/`. While a job works it adds parts
(`verdicts.<part>.parquet`), each written whole or not at all, so a killed job finds again what it had finished.
`Run.finish` merges the parts into `verdicts.parquet` and marks the manifest done; asked again, the job is a no-op.
The merged table names the parts that are in it, so that one killed before it removed them reads none of them twice.
Storage is any URI of pyarrow.fs: a path, `s3://…` or `gs://…`.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cascade.errors import CascadeError, ConfigError, DataError
from cascade.tasks import from_table, to_table

Record = TypeVar("Record")
MANIFEST = "manifest.json"
_MERGED = b"cascade.parts"
"""Schema metadata of a whole table: the parts that it was made of."""


class StorageError(CascadeError, OSError):
    """The storage takes no more: it is full, read-only or no folder. What was written before is kept."""


def fingerprint(**parts: Any) -> str:
    """Twelve hex digits over everything that decides a result. Values are JSON or have `model_dump(mode="json")`."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a local file, read in blocks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a URI, opened once per process (an object store's client asks the network for it).

    Raises:
        ConfigError: it is none that Arrow knows, or names no bucket.
    """
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"{uri} is no storage: {error}. Give a path, s3://bucket/prefix or gs://bucket/prefix"
        ) from None
    if not path:
        raise ConfigError(f"{uri} is no storage: it names no bucket. Give s3://bucket/prefix or gs://bucket/prefix")
    return filesystem, path


@dataclass(frozen=True)
class Store:
    """Files below one storage URI. All paths given to its methods are relative to that URI, with "/"."""

    uri: str

    def __post_init__(self) -> None:
        if "://" not in self.uri:
            object.__setattr__(self, "uri", str(Path(self.uri).expanduser().absolute()))

    @property
    def filesystem(self) -> pafs.FileSystem:
        return _resolve(self.uri)[0]

    @property
    def is_local(self) -> bool:
        """Whether files can be opened, appended to and renamed in place."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, relative: str = "") -> str:
        """The path inside the file system (for a local store, an absolute path)."""
        root = _resolve(self.uri)[1]
        return f"{root}/{relative}" if relative else root

    def child(self, relative: str) -> Store:
        return Store(self.uri_of(relative))

    def uri_of(self, relative: str) -> str:
        """URI of a file or folder below; options that the store's URI ends with ("?region=…") stay at the end."""
        root, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return f"{root.rstrip('/')}/{relative}{mark}{options}"

    def exists(self, relative: str) -> bool:
        return self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    def list(self, relative: str = "", *, recursive: bool = False) -> list[str]:
        """Names of files and folders below a folder, relative to it, sorted; empty if there is no such folder."""
        base = self.path(relative)
        selector = pafs.FileSelector(base, recursive=recursive, allow_not_found=True)
        return sorted(info.path[len(base) :].lstrip("/") for info in self.filesystem.get_file_info(selector))

    def read_bytes(self, relative: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        with self.filesystem.open_input_stream(self.path(relative)) as stream:
            return stream.read()

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a file whole or not at all: object stores do so themselves, elsewhere by rename.

        Raises:
            StorageError: it cannot be written.
        """
        target = self.path(relative)
        try:
            if self.is_local:
                _write_whole(target, data)
                return
            kind = mimetypes.guess_type(target)[0]  # so that a browser shows a page rather than saves it
            metadata = {"Content-Type": kind} if kind else None
            with self.filesystem.open_output_stream(target, metadata=metadata) as stream:
                stream.write(data)
        except OSError as error:
            raise StorageError(f"{self.uri_of(relative)} cannot be written: {error.strerror or error}") from error

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read_bytes(relative))

    def write_json(self, relative: str, value: Any) -> None:
        self.write_bytes(relative, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n")

    def delete(self, relative: str) -> None:
        """Delete a file or a folder with all that is in it; nothing happens if it does not exist."""
        info = self.filesystem.get_file_info(self.path(relative))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)

    def upload_folder(self, folder: str | os.PathLike[str], relative: str) -> None:
        """Copy a local folder into the store."""
        if self.is_local:
            os.makedirs(self.path(relative), exist_ok=True)
        pafs.copy_files(str(folder), self.path(relative), destination_filesystem=self.filesystem)

    def local_copy(self, relative: str, cache: str | os.PathLike[str]) -> Path:
        """A local path with the content of a stored file or folder: itself in a local store, else a copy in `cache`."""
        if self.is_local:
            return Path(self.path(relative))
        whole = self.filesystem.get_file_info(self.path(relative))
        is_folder = whole.type == pafs.FileType.Directory
        parts = self.filesystem.get_file_info(pafs.FileSelector(whole.path, recursive=True)) if is_folder else [whole]
        # By size and time: what was deleted and done anew has the same name. By path: one file may be all of a folder.
        files = sorted((part.path, part.size, part.mtime_ns) for part in parts)
        target = Path(cache) / fingerprint(path=whole.path, files=files)
        if not target.exists():
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
            (partial if is_folder else partial.parent).mkdir(parents=True, exist_ok=True)
            pafs.copy_files(whole.path, str(partial), source_filesystem=self.filesystem)
            _move(partial, target)
        return target


def _write_whole(target: str, data: bytes) -> None:
    """A local file, through a temporary one beside it, of which nothing stays where there is no room for it."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _move(partial: Path, target: Path) -> None:
    """Rename; where another process was quicker, its copy is as good and ours goes."""
    try:
        partial.replace(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(partial)


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
