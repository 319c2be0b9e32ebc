"""Files below a storage URI of pyarrow.fs: a path, `s3://…` or `gs://…`. The same on all of them."""

from __future__ import annotations

import json
import mimetypes
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from cascade.errors import CascadeError, ConfigError
from cascade.fingerprints import fingerprint


class StorageError(CascadeError, OSError):
    """The storage is full, read-only, no folder, or does not answer. What was written before is kept."""


@cache
def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a URI, opened once per process (an object store's client asks the network for it).

    Raises:
        ConfigError: it is none that Arrow knows, or names no bucket.
        StorageError: the region of a bucket cannot be found.
    """
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"{uri} is no storage: {error}. Give a path, s3://bucket/prefix or gs://bucket/prefix"
        ) from None
    except OSError as error:
        raise _unreachable(uri, error) from error
    if not path:
        raise ConfigError(f"{uri} is no storage: it names no bucket. Give s3://bucket/prefix or gs://bucket/prefix")
    return filesystem, path


@cache
def _reach(uri: str) -> None:
    """See once per process that a storage answers: later errors of what did may be over at the next try.

    Raises:
        StorageError: it does not answer, or refuses this machine.
    """
    filesystem, path = _resolve(uri)
    try:
        if not isinstance(filesystem, pafs.LocalFileSystem):
            filesystem.get_file_info(path)
    except OSError as error:
        raise _unreachable(uri, error) from error


def _unreachable(uri: str, error: OSError) -> StorageError:
    return StorageError(
        f"storage: {uri} cannot be reached: {error}; check its bucket and region, and this machine's credentials and "
        "network"
    )


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
        _reach(self.uri)
        return self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    def list(self, relative: str = "", *, recursive: bool = False) -> list[str]:
        """Names of files and folders below a folder, relative to it, sorted; empty if there is no such folder."""
        _reach(self.uri)
        base = self.path(relative)
        # Arrow's client for gs:// leaves folders out of what it lists, so there they are told from what lies in them.
        folders_missing = not recursive and self.filesystem.type_name == "gcs"
        selector = pafs.FileSelector(base, recursive=recursive or folders_missing, allow_not_found=True)
        names = {info.path[len(base) :].lstrip("/") for info in self.filesystem.get_file_info(selector)}
        return sorted({name.partition("/")[0] for name in names} if folders_missing else names)

    def read_bytes(self, relative: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        _reach(self.uri)
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
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no JSON.
        """
        data = self.read_bytes(relative)
        while True:
            try:
                return json.loads(data)
            except ValueError:
                # Replaced meanwhile: Arrow asks an object store for the length first, then for so much of what is new.
                before, data = data, self.read_bytes(relative)
                if data == before:
                    raise

    def write_json(self, relative: str, value: Any) -> None:
        self.write_bytes(relative, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n")

    def delete(self, relative: str) -> None:
        """Delete a file or a folder with all that is in it; nothing happens if it does not exist."""
        info = self.filesystem.get_file_info(self.path(relative))
        if info.type == pafs.FileType.Directory:
            with suppress(FileNotFoundError):  # gs:// deletes what lies in it, then misses the folder
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
