"""The registry of modifiers in a store: versions per domain, and which one is current.

    modifiers/<domain>/<version>/modifier.safetensors   written first
    modifiers/<domain>/<version>/manifest.json
    modifiers/<domain>/CURRENT                           the version in use, replaced whole
    modifiers/<domain>/CANARY                            a version that gets a share of the requests, if there is one

A version never changes once it is there, so readers need no lock: they see the old one or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cascade.artifacts import MANIFEST
from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import decode_modifier, encode_modifier
from cascade.compression.methods import Recipe
from cascade.compression.packed import resident_bytes
from cascade.errors import DataError, FormatError
from cascade.scoring.statistics import Score
from cascade.store import Store

FOLDER = "modifiers"
CURRENT = "CURRENT"
CANARY = "CANARY"
FILE = "modifier.safetensors"
_DOMAIN = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_MANIFEST = 1 << 20
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Bytes = Annotated[int, Field(ge=0)]


class Modifier(BaseModel):
    """One version of a domain's modifier: what its manifest says.

    Attributes:
        base_sha256: of the base that it fits, "" where unknown.
        rank: that it was trained with.
        sha256: of the modifier file.
        disk_bytes: what the file weighs.
        resident_bytes: what serving holds of it, as it was to be served when it was published.
        fp16_bytes: what the uncompressed adapter weighs in fp16.
        scores: by what was measured ("base", "modifier", "compressed"), each with n and a 95 % interval.
        teachers: whose answers it was trained on; one that only replays known answers starts with "answer-key".
        system: the system message of the prompts that it learned from; None: the chat template's own.
        created: Unix time in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    domain: str = Field(pattern=rf"^{_DOMAIN.pattern}$")
    version: str = Field(pattern=rf"^{_VERSION.pattern}$")
    base: str
    base_sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")
    rank: int = Field(ge=1)
    sha256: _Sha256
    disk_bytes: _Bytes
    resident_bytes: _Bytes
    fp16_bytes: _Bytes
    scores: dict[str, Score]
    teachers: tuple[str, ...]
    system: str | None = None
    recipe: Recipe
    created: float

    @property
    def name(self) -> str:
        """As reports and response headers write it."""
        return f"{self.domain}/{self.version}"

    @property
    def ratio(self) -> float:
        """Share of the fp16 adapter's size that the file has."""
        return self.disk_bytes / self.fp16_bytes

    @property
    def path(self) -> str:
        """Of the modifier file, relative to the store."""
        return f"{_folder(self.domain, self.version)}/{FILE}"


def publish(
    store: Store,
    domain: str,
    compressed: CompressedAdapter,
    *,
    fp16_size: int | AdapterWeights,
    resident_size: int | None = None,
    scores: Mapping[str, Score] | None = None,
    teachers: tuple[str, ...] = (),
    system: str | None = None,
    version: str | None = None,
    make_current: bool = True,
) -> Modifier:
    """Add a version and, as the last step, make it the current one.

    Publishing the same content again changes nothing (but may make it current again).

    Args:
        fp16_size: size of the uncompressed adapter in fp16, in bytes, or that adapter.
        resident_size: what serving holds of it, in bytes; by default that of a base in 16 bits.
        system: the system message that it was trained under, which whoever asks it must use too.
        version: its name; by default the first 12 digits of the file's hash.

    Raises:
        DataError: a name is not allowed, or the version exists with other content.
    """
    data = encode_modifier(compressed, scores=scores, teachers=teachers)
    digest = hashlib.sha256(data).hexdigest()
    modifier = Modifier(
        domain=_checked(domain, _DOMAIN, "domain"),
        version=_checked(digest[:12] if version is None else version, _VERSION, "version"),
        base=compressed.base.name,
        base_sha256=compressed.base.sha256,
        rank=compressed.rank,
        sha256=digest,
        disk_bytes=len(data),
        resident_bytes=resident_bytes(compressed) if resident_size is None else resident_size,
        fp16_bytes=fp16_bytes(fp16_size) if isinstance(fp16_size, AdapterWeights) else fp16_size,
        scores=dict(scores or {}),
        teachers=teachers,
        system=system,
        recipe=compressed.recipe,
        created=time.time(),
    )
    folder = _folder(domain, modifier.version)
    if store.exists(f"{folder}/{MANIFEST}"):
        there = get(store, domain, modifier.version)
        if (there.sha256, there.system) != (digest, system):
            raise DataError(f"{there.name} exists with other content: versions never change, choose another name")
        modifier = there
    else:
        store.write_bytes(modifier.path, data)
        store.write_json(f"{folder}/{MANIFEST}", modifier.model_dump(mode="json"))
    if make_current:
        set_current(store, domain, modifier.version)
    return modifier


def get(store: Store, domain: str, version: str) -> Modifier:
    """One version's manifest.

    Raises:
        DataError: a name is not allowed, or there is no such version.
        FormatError: its manifest is damaged.
    """
    path = f"{_folder(domain, version)}/{MANIFEST}"
    try:
        modifier = Modifier.model_validate_json(_read(store, path, _MAX_MANIFEST))
    except FileNotFoundError:
        raise DataError(f"there is no modifier {domain}/{version} in {store.uri}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{path} is damaged at {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if (modifier.domain, modifier.version) != (domain, version):
        raise FormatError(f"{path} describes {modifier.name}: it was moved or swapped")
    return modifier


def current(store: Store, domain: str) -> Modifier | None:
    """The version in use, None if the domain has none.

    Raises:
        DataError: the domain's name is not allowed, or CURRENT names no version that exists.
        FormatError: the manifest or CURRENT is damaged.
    """
    path = f"{FOLDER}/{_checked(domain, _DOMAIN, 'domain')}/{CURRENT}"
    try:
        text = _read(store, path, 256)
    except FileNotFoundError:
        return None
    version = text.decode("utf-8", "replace").strip()
    if not _VERSION.fullmatch(version):
        raise FormatError(f"{path} holds no version's name")
    return get(store, domain, version)


def set_current(store: Store, domain: str, version: str) -> Modifier:
    """Make an existing version the one in use, for instance to go back to an earlier one.

    Raises:
        DataError: there is no such version.
    """
    modifier = get(store, domain, version)
    store.write_bytes(f"{FOLDER}/{domain}/{CURRENT}", f"{version}\n".encode())
    return modifier


class Canary(BaseModel):
    """A version that serves a share of a domain's requests beside the current one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    version: str = Field(pattern=rf"^{_VERSION.pattern}$")
    share: float = Field(ge=0, le=1, allow_inf_nan=False)


def canary(store: Store, domain: str) -> Canary | None:
    """The domain's canary, None if it has none.

    Raises:
        FormatError: CANARY is damaged.
    """
    path = f"{FOLDER}/{_checked(domain, _DOMAIN, 'domain')}/{CANARY}"
    try:
        return Canary.model_validate_json(_read(store, path, 256))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise FormatError(f"{path} is damaged: {error.errors()[0]['msg']}") from None


def set_canary(store: Store, domain: str, version: str, share: float) -> Modifier:
    """Let a version serve a share of the domain's requests; a share of 0 ends that.

    Raises:
        DataError: there is no such version, or the share is not between 0 and 1.
    """
    modifier = get(store, domain, version)
    if not 0 <= share <= 1:
        raise DataError(f"a canary's share lies between 0 and 1, not at {share}")
    if share == 0:
        end_canary(store, domain)
    else:
        content = Canary(version=version, share=share).model_dump_json().encode()
        store.write_bytes(f"{FOLDER}/{domain}/{CANARY}", content)
    return modifier


def end_canary(store: Store, domain: str) -> None:
    """Give all of a domain's requests to the current version again; nothing happens without a canary."""
    store.delete(f"{FOLDER}/{_checked(domain, _DOMAIN, 'domain')}/{CANARY}")


def list_modifiers(store: Store, domain: str | None = None, *, skip_damaged: bool = False) -> list[Modifier]:
    """All versions of all domains, or of one, oldest first within a domain.

    Args:
        skip_damaged: leave out versions whose manifests are damaged.

    Raises:
        FormatError: a manifest is damaged.
    """
    domains = [domain] if domain is not None else list_domains(store)
    found = []
    for name in domains:
        folder = f"{FOLDER}/{_checked(name, _DOMAIN, 'domain')}"
        versions = [v for v in store.list(folder) if v not in (CURRENT, CANARY) and _VERSION.fullmatch(v)]
        # A folder without a manifest is a version that is being written, or whose writing was cut off.
        finished = [v for v in versions if store.exists(f"{folder}/{v}/{MANIFEST}")]
        read = [m for v in finished if (m := _get_or_skip(store, name, v, skip_damaged)) is not None]
        found += sorted(read, key=lambda m: (m.created, m.version))
    return found


def _get_or_skip(store: Store, domain: str, version: str, skip_damaged: bool) -> Modifier | None:
    try:
        return get(store, domain, version)
    except (DataError, FormatError):
        if not skip_damaged:
            raise
        return None


def list_domains(store: Store) -> list[str]:
    """Domains that have modifiers."""
    return [name for name in store.list(FOLDER) if _DOMAIN.fullmatch(name)]


def load(store: Store, modifier: Modifier, *, base_sha256: str | None = None, verify: bool = True) -> CompressedAdapter:
    """Read and check a version's file.

    Args:
        base_sha256: of the base that it shall be used with; None accepts any.
        verify: also compare the hash of the expanded tensors (decodes it once).

    Raises:
        DataError: the file is missing.
        FormatError: it is damaged, swapped, or made for another base.
    """
    data = _content(store, modifier)
    try:
        return decode_modifier(data, base_sha256=base_sha256, verify=verify)[1]
    except FormatError as error:
        raise FormatError(f"modifier {modifier.name}: {error}") from None


def check_file(store: Store, modifier: Modifier, *, base_sha256: str | None = None) -> None:
    """See that a version's file is there and the one that its manifest describes; nothing of it is kept.

    Args:
        base_sha256: of the base that it shall be used with; None accepts any.

    Raises:
        DataError: it is missing.
        FormatError: it is damaged or swapped, or its manifest names another base.
    """
    if base_sha256 is not None and modifier.base_sha256 not in ("", base_sha256):
        raise FormatError(f"{modifier.name} was made for the base {modifier.base}, not for the one in use")
    _content(store, modifier)


def load_current(
    store: Store, domain: str, *, base_sha256: str | None = None, verify: bool = True
) -> tuple[Modifier, CompressedAdapter]:
    """The version in use with its content; see `load`.

    Raises:
        DataError: the domain has no modifier.
        FormatError: see `load`.
    """
    modifier = current(store, domain)
    if modifier is None:
        raise DataError(f"the domain {domain} has no modifier in {store.uri}: run its pipeline first")
    return modifier, load(store, modifier, base_sha256=base_sha256, verify=verify)


# ------------------------------------------------------------------------------------------------- inside


def _content(store: Store, modifier: Modifier) -> bytes:
    """A version's file, compared with its hash.

    Raises:
        DataError: it is missing.
        FormatError: it is damaged or swapped.
    """
    try:
        data = _read(store, modifier.path, modifier.disk_bytes)
    except FileNotFoundError:
        raise DataError(f"the file of the modifier {modifier.name} is missing in {store.uri}") from None
    if hashlib.sha256(data).hexdigest() != modifier.sha256:
        raise FormatError(f"the file of {modifier.name} is not the one that its manifest describes")
    return data


def _checked(name: str, allowed: re.Pattern[str], what: str) -> str:
    if not allowed.fullmatch(name):
        raise DataError(f"{name[:80]!r} is no name for a {what}: allowed is {allowed.pattern}")
    return name


def _folder(domain: str, version: str) -> str:
    return f"{FOLDER}/{_checked(domain, _DOMAIN, 'domain')}/{_checked(version, _VERSION, 'version')}"


def _read(store: Store, path: str, most: int) -> bytes:
    """A file of at most so many bytes, which in a local store must really lie inside it.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is larger, or a link leads out of the store.
    """
    if store.is_local and not os.path.realpath(store.path(path)).startswith(os.path.realpath(store.path()) + os.sep):
        raise FormatError(f"{path} leads out of the store")
    info = store.filesystem.get_file_info(store.path(path))
    if info.is_file and info.size > most:
        raise FormatError(f"{path} has {info.size} bytes, at most {most} are expected")
    if not info.is_file:
        raise FileNotFoundError(path)
    return store.read_bytes(path)
