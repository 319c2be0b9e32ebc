"""The modifier file: one safetensors file of packed streams, the first of which is a versioned JSON header.

Every stream is a flat U8 tensor, stored as it is or compressed by zstandard where that pays. The metadata carries a
SHA-256 over the whole file (its own 64 digits taken as zeros), which is computed while the streams are opened, in a
thread of its own: nothing is handed out before it is found right. What is read meanwhile is checked as if an enemy had
written it, and nothing is allocated that the file's own size does not bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save as safetensors_save

from cascade.compression.adapter import BaseRef
from cascade.compression.compressed import CompressedAdapter, FactorName, LayerSpec, PackedFactor
from cascade.compression.decoding import expanded_sha256
from cascade.compression.header import (
    MAX_TEXT,
    ZEROS,
    Base,
    Envelope,
    Header,
    checked,
    in_words,
    strict_json,
    version_of,
)
from cascade.compression.methods import Recipe
from cascade.compression.packed import stream_sizes
from cascade.errors import DataError, FormatError
from cascade.scoring.statistics import Score

FORMAT = "cascade-modifier"
_HEADER = "header"
_STREAMS = {f"{factor}.{kind}" for factor in "ab" for kind in ("mask", "values", "scales")}
_LEVEL = 9
_DIGEST = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"}"}')
_MAX_RATIO = 32
"""A stream that zstandard would shrink more than this is stored as it is, so that no file can blow up when opened."""
_SCORE = Score(n=10**9, passed=1e9 / 3, unparsed=10**9, accuracy=1e-9 / 3, low=1e-9 / 7, high=1e-9 / 9, errors=10**9)
_SCORES = dict.fromkeys(("base", "modifier", "compressed"), asdict(_SCORE))
"""What a published modifier earned, at its longest."""


def save_modifier(
    path: str | os.PathLike[str],
    compressed: CompressedAdapter,
    *,
    scores: Mapping[str, Score] | None = None,
    teachers: tuple[str, ...] = (),
) -> int:
    """Write a modifier file whole or not at all.

    Args:
        scores: what it earned, by what was measured, e.g. "compressed".
        teachers: names of the models whose answers it was trained on.

    Returns:
        Its size in bytes.

    Raises:
        DataError: it cannot be written there, or the adapter is larger than the format allows.
    """
    data = encode_modifier(compressed, scores=scores, teachers=teachers)
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"{target} cannot be written: {error.strerror}") from error
    return len(data)


def encode_modifier(
    compressed: CompressedAdapter, *, scores: Mapping[str, Score] | None = None, teachers: tuple[str, ...] = ()
) -> bytes:
    """The bytes of the modifier file; the same content always gives the same bytes.

    Raises:
        DataError: the adapter is larger than the format allows.
    """
    streams: dict[str, NDArray[np.uint8]] = {}
    raw_bytes = {}
    for name, raw in _streams_of(compressed).items():
        streams[name] = _shrink(raw, planes=_in_planes(name, compressed.recipe))
        if streams[name].size != raw.size:
            raw_bytes[name] = raw.size
    header = _header_of(compressed, raw_bytes, scores or {}, teachers)
    text = np.frombuffer(header.text(), np.uint8)
    streams[_HEADER] = _shrink(text, planes=False)
    envelope = Envelope(header_bytes=text.size)
    data = bytearray(safetensors_save(streams, metadata={FORMAT: envelope.model_dump_json()}))
    start, end = _digest_span(data)
    data[start:end] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def _header_of(
    compressed: CompressedAdapter, raw_bytes: dict[str, int], scores: Mapping[str, Score], teachers: tuple[str, ...]
) -> Header:
    try:
        return Header(
            base=Base(name=compressed.base.name, sha256=compressed.base.sha256),
            recipe=compressed.recipe,
            rank=compressed.rank,
            scaling=compressed.scaling,
            target_modules=list(compressed.target_modules),
            init_seed=compressed.init_seed,
            layers=[(x.name, x.rank, x.fan_in, x.fan_out, *x.kept, *x.exponents) for x in compressed.layers],
            raw_bytes=raw_bytes,
            scores=dict(scores),
            teachers=list(teachers),
            expanded_sha256=compressed.expanded_sha256,
        )
    except ValidationError as error:
        raise DataError(f"the adapter cannot be written as a modifier file{in_words(error)}") from None


def publishing_bytes(teachers: tuple[str, ...] = ()) -> int:
    """At most so many bytes more does a file weigh once its scores and teachers are in it, as published."""
    text = json.dumps([_SCORES, teachers], ensure_ascii=False, separators=(",", ":"))
    return len(text.encode()) + 64  # compressed, the header grows by no more; 64 for the compressor's own


def disk_bytes(
    compressed: CompressedAdapter, *, scores: Mapping[str, Score] | None = None, teachers: tuple[str, ...] = ()
) -> int:
    """What the file weighs, to the byte, when saved with these scores and teachers."""
    return len(encode_modifier(compressed, scores=scores, teachers=teachers))


def load_modifier(
    path: str | os.PathLike[str], *, base_sha256: str | None = None, verify: bool = True
) -> CompressedAdapter:
    """Read a modifier file through a memory map.

    Args:
        base_sha256: of the base that it shall be used with; None accepts any.
        verify: also decode it once and compare with the hash of the expanded tensors.

    Raises:
        FormatError: damaged, foreign, hostile, newer than this version, or made for another base.
    """
    return read_modifier(path, base_sha256=base_sha256, verify=verify)[1]


def read_modifier(
    path: str | os.PathLike[str], *, base_sha256: str | None = None, verify: bool = True
) -> tuple[Header, CompressedAdapter]:
    """As `load_modifier`, with the header (scores, teachers)."""
    try:
        with open(path, "rb") as file:
            # The arrays keep the map open for as long as they live.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a modifier: {error}") from error
    try:
        return decode_modifier(mapped, base_sha256=base_sha256, verify=verify)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def decode_modifier(
    data: bytes | mmap.mmap, *, base_sha256: str | None = None, verify: bool = True
) -> tuple[Header, CompressedAdapter]:
    """Header and content of a modifier file's bytes.

    Raises:
        FormatError: see `load_modifier`.
    """
    view = np.frombuffer(data, np.uint8)
    head, said = _head(view)
    text, payload = bytes(head[8:]), view[len(head) :]
    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(_sha256, head, payload)
        try:
            header, compressed = _decode(text, payload, base_sha256)
        finally:
            # Of a damaged file whatever else is wrong with it is only a consequence.
            if digest.result() != said:
                raise FormatError("damaged: its SHA-256 is not the one that it was written with")
    if verify and expanded_sha256(compressed) != header.expanded_sha256:
        raise FormatError("it expands to other numbers than when it was made")
    return header, compressed


def _decode(text: bytes, payload: NDArray[np.uint8], base_sha256: str | None) -> tuple[Header, CompressedAdapter]:
    header, tensors = _parse(text, payload)
    if base_sha256 is not None and header.base.sha256 != base_sha256:
        raise FormatError(
            f"made for the base {header.base.name or 'of unknown name'} ({header.base.sha256[:12] or 'no hash'}), "
            f"not for the one in use ({base_sha256[:12]})"
        )
    return header, _assemble(header, tensors)


# ------------------------------------------------------------------------------------------------- streams


def _streams_of(compressed: CompressedAdapter) -> dict[str, NDArray[np.uint8]]:
    streams = {}
    for factor, packed in (("a", compressed.a), ("b", compressed.b)):
        if packed.mask is not None:
            streams[f"{factor}.mask"] = packed.mask
        streams[f"{factor}.scales"] = packed.scales.view(np.uint8)
        streams[f"{factor}.values"] = packed.values
    return streams


def _in_planes(name: str, recipe: Recipe) -> bool:
    """Whether a stream holds fp16 numbers: their upper bytes compress, the lower ones hide that."""
    return name.endswith(".scales") or (name.endswith(".values") and recipe.codec == "fp16")


def _shrink(raw: NDArray[np.uint8], *, planes: bool) -> NDArray[np.uint8]:
    """The stream compressed, or as it is where that does not pay (2 %) or might not be opened again."""
    ordered = raw.reshape(-1, 2).T[::-1] if planes else raw
    small = zstandard.ZstdCompressor(level=_LEVEL).compress(np.ascontiguousarray(ordered).data)
    pays = len(small) < 0.98 * raw.size and len(small) * _MAX_RATIO >= raw.size
    return np.frombuffer(small, np.uint8) if pays else raw


def _grow(stored: NDArray[np.uint8], size: int, *, planes: bool) -> NDArray[np.uint8]:
    try:
        if zstandard.get_frame_parameters(stored.data).content_size != size:
            raise FormatError("a compressed stream has another length than the header says")
        opened = zstandard.ZstdDecompressor().decompress(stored.data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a compressed stream is damaged: {error}") from error
    raw = np.frombuffer(opened, np.uint8)
    if not planes:
        return raw
    high, low = raw.reshape(2, -1)
    return (high.astype("<u2") << 8 | low).view(np.uint8)


# ------------------------------------------------------------------------------------------------- reading


def _head(view: NDArray[np.uint8]) -> tuple[bytearray, str]:
    """Length and text of the header, and the hash that it gives of the file."""
    if view.size < 8:
        raise FormatError("too short to be a modifier file")
    length = int(view[:8].view("<u8")[0])
    if length > min(MAX_TEXT, view.size - 8):
        raise FormatError("no modifier file, or cut off: its header would reach beyond it")
    head = bytearray(view[: 8 + length].tobytes())
    start, end = _digest_span(head)
    said = bytes(head[start:end]).decode()
    return head, said


def _sha256(head: bytearray, payload: NDArray[np.uint8]) -> str:
    """Over the whole file with its own hash taken as zeros."""
    start, end = _digest_span(head)
    digest = hashlib.sha256(head[:start] + ZEROS.encode() + head[end:])
    digest.update(payload.data)
    return digest.hexdigest()


def _digest_span(data: bytes | bytearray) -> tuple[int, int]:
    length = struct.unpack("<Q", data[:8])[0]
    found = list(_DIGEST.finditer(data, 8, 8 + length))
    if len(found) != 1:
        raise FormatError("no modifier file: it carries no SHA-256 of itself")
    return found[0].span(1)


def _parse(text: bytes, payload: NDArray[np.uint8]) -> tuple[Header, dict[str, NDArray[np.uint8]]]:
    """The checked header, and the streams by name."""
    table = strict_json(text)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [FORMAT] or not isinstance(metadata[FORMAT], str):
        raise FormatError("no modifier file: a safetensors file of another kind")
    said, version = metadata[FORMAT], version_of(metadata[FORMAT])
    if version == 1:
        return checked(Header, said), _slice_tensors(table, payload)
    size, tensors = checked(Envelope, said).header_bytes, _slice_tensors(table, payload)
    stored = tensors.pop(_HEADER, None)
    if stored is None or not stored.size <= size <= stored.size * _MAX_RATIO:
        raise FormatError("its header is missing or has another length than the file says")
    header = checked(Header, (stored if stored.size == size else _grow(stored, size, planes=False)).tobytes())
    return header, tensors


def _slice_tensors(table: dict[str, Any], payload: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Views of the payload; the tensors must fill it one after the other without gap or overlap."""
    tensors, at = {}, 0
    for name, entry in table.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"tensor {name[:80]!r} is not described as safetensors does")
        offsets, shape = entry["data_offsets"], entry["shape"]
        plain = isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int for x in offsets)
        if not plain or offsets[0] != at or not at <= offsets[1] <= payload.size:
            raise FormatError(f"tensor {name[:80]!r} does not lie behind the one before it")
        if entry["dtype"] != "U8" or shape != [offsets[1] - at] or type(shape[0]) is not int:
            raise FormatError(f"tensor {name[:80]!r} is no flat array of bytes")
        tensors[name] = payload[at : offsets[1]]
        at = offsets[1]
    if at != payload.size:
        raise FormatError("bytes follow the last tensor")
    return tensors


def _assemble(header: Header, tensors: dict[str, NDArray[np.uint8]]) -> CompressedAdapter:
    layers = tuple(LayerSpec(r[0], r[1], r[2], r[3], (r[4], r[5]), (r[6], r[7])) for r in header.layers)
    a = _factor(header, layers, tensors, "a")
    b = _factor(header, layers, tensors, "b")
    if tensors or header.raw_bytes.keys() - _STREAMS:
        raise FormatError("it holds streams that its recipe does not know")
    return CompressedAdapter(
        recipe=header.recipe,
        layers=layers,
        a=a,
        b=b,
        scaling=header.scaling,
        rank=header.rank,
        base=BaseRef(header.base.name, header.base.sha256),
        target_modules=tuple(header.target_modules),
        init_seed=header.init_seed,
        expanded_sha256=header.expanded_sha256,
    )


def _factor(
    header: Header, layers: tuple[LayerSpec, ...], tensors: dict[str, NDArray[np.uint8]], factor: FactorName
) -> PackedFactor:
    """One factor's streams, opened; their lengths are checked before anything is allocated."""
    mask_bytes, value_bytes, scales = stream_sizes(header.recipe, layers, factor)
    opened = {}
    for kind, size in (("mask", mask_bytes), ("values", value_bytes), ("scales", 2 * scales)):
        name = f"{factor}.{kind}"
        if size is None:
            continue
        stored = tensors.pop(name, None)
        if stored is None or header.raw_bytes.get(name, stored.size) != size:
            raise FormatError(f"stream {name} is missing or has not the length that its layers need")
        if name in header.raw_bytes:
            if size > stored.size * _MAX_RATIO:
                raise FormatError(f"stream {name} would grow beyond all measure")
            stored = _grow(stored, size, planes=_in_planes(name, header.recipe))
        opened[kind] = stored
    return PackedFactor(opened.get("mask"), opened["values"], opened["scales"].view(np.float16))
