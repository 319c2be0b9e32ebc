"""The serving form of a modifier: what a slot computes with, in one block of memory or of one local file.

How it lies there, and that what saves bytes on disk saves them in memory too: see `cascade.compression.layout`.

A modifier file is small because it is packed; expanding it takes time. Serving brings each version into a block once,
kept as a safetensors file with a single tensor, and from then on a swap is one read into the slot's fixed buffer. The
file is opened once and stays open, so what was checked is what is read, whatever happens to its name; it is read, not
mapped, because the pages of a mapping would count as this process's memory for every modifier used.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cascade.compression.adapter import AdapterWeights, BaseRef
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.decoding import Expanded, iter_layers, iter_levels
from cascade.compression.decoding import Levels as Few
from cascade.compression.layout import Bytes, LayerShape, Layout, Plain, compressed_layout
from cascade.compression.methods import Settings
from cascade.errors import FormatError
from cascade.models.int8 import rounded

_TENSOR, _METADATA = "block", "cascade-flat"
_PARTS = 2
"""Threads that read one file: one alone does not fill the memory's bandwidth."""
_readers = ThreadPoolExecutor(_PARTS, thread_name_prefix="flat-reader")


class _Metadata(Settings):
    """The metadata of a flat file. `sha256` is over the rest of it and the block."""

    layers: tuple[LayerShape, ...]
    factors: tuple[float, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    group: Annotated[int, Field(ge=1)] | None
    bits: int
    int8: bool
    base_name: str
    base_sha256: str
    sha256: str


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """An open flat file.

    Attributes:
        file: closed when nobody holds the adapter any more.
        factors: see `factors_of`.
        pinned: the block in page-locked memory, on machines whose model is on a GPU.
    """

    layout: Layout
    base: BaseRef
    file: io.FileIO
    offset: int
    factors: tuple[float, ...]
    pinned: torch.Tensor | None = None

    def read_into(self, block: torch.Tensor) -> None:
        """Copy the bytes to the front of a block.

        Raises:
            FormatError: the file has become shorter.
        """
        target = block[: self.layout.nbytes]
        if self.pinned is not None:
            target.copy_(self.pinned, non_blocking=True)
            return
        _read_parts(self.file.fileno(), self.offset, memoryview(target.numpy()))  # type: ignore[arg-type]


def layout_of(
    adapter: AdapterWeights | CompressedAdapter | FlatAdapter, dtype: torch.dtype, int8: bool = False
) -> Layout:
    """How an adapter lies in the block of a model that computes in this dtype, and may be held in 8 bits."""
    if isinstance(adapter, FlatAdapter):
        return adapter.layout
    if isinstance(adapter, CompressedAdapter):
        return compressed_layout(adapter, dtype, int8)
    shapes = ((name, pair.rank, pair.a.shape[1], pair.b.shape[0]) for name, pair in adapter.layers.items())
    return Layout(tuple(shapes), dtype, int8=int8)


def factors_of(adapter: AdapterWeights | CompressedAdapter | FlatAdapter, layout: Layout) -> tuple[float, ...]:
    """What each layer's product is multiplied with.

    Raises:
        FormatError: it is no number that float32 holds.
    """
    if isinstance(adapter, FlatAdapter):
        return adapter.factors
    factors = (adapter.scaling,) * len(layout.layers)
    if layout.group is not None:
        assert isinstance(adapter, CompressedAdapter)
        less = 8 if layout.bits == 4 else 0  # levels of 4 bits are taken from the upper half of a byte, in both factors
        factors = tuple(math.ldexp(adapter.scaling, sum(layer.exponents) - less) for layer in adapter.layers)
    if not all(2.0**-126 <= abs(factor) <= 2.0**127 for factor in factors):
        raise FormatError("the adapter's numbers are too large or too small to compute with")
    return factors


def write_block(adapter: AdapterWeights | CompressedAdapter, layout: Layout, block: torch.Tensor) -> None:
    """Write an adapter into a block of bytes in the CPU's memory.

    Raises:
        FormatError: its packed streams are inconsistent.
    """
    if layout.group is not None:
        assert isinstance(adapter, CompressedAdapter)
        _write_levels(adapter, layout, layout.group, block.numpy())
        return
    views = layout.views(block)
    for name, a, bt in _expanded(adapter):
        held = views[name]
        if isinstance(held, Bytes):
            _write_bytes(held, a, bt, adapter.scaling)
        else:
            assert isinstance(held, Plain)
            held.a.copy_(_tensor(a))
            held.bt.copy_(_tensor(bt))


def _write_levels(adapter: CompressedAdapter, layout: Layout, group: int, block: NDArray[np.uint8]) -> None:
    """Layer by layer into arrays rather than `layout.views`: there are hundreds, of a few microseconds each."""
    scales, levels = block[: layout.border].view(np.float16), block[layout.border :].view(np.int8)
    scales.fill(0)
    at = start = 0
    for (_, *factors), groups in zip(iter_levels(adapter), layout.groups, strict=True):
        end = start + groups * group * layout.bits // 8
        _write_layer(levels[start:end], scales[at : at + groups], factors, group)
        at, start = at + groups, end


def _write_layer(whole: NDArray[np.int8], scales: NDArray[np.float16], factors: list[Few], group: int) -> None:
    """Levels and scales of A and B, each filled up to whole groups."""
    levels, at = whole if whole.size == scales.size * group else np.empty(scales.size * group, np.int8), 0
    for few in factors:
        scales[at : at + few.scales.size] = few.scales
        start, at = at * group, at + few.scales.size
        levels[start : start + few.levels.size] = few.levels
        levels[start + few.levels.size : at * group] = 0
    levels[at * group :] = 0
    if levels is not whole:
        half = levels.size // 2
        np.bitwise_or(levels[:half] & 15, levels[half:] << 4, out=whole)


def _write_bytes(held: Bytes, a: NDArray[Any], bt: NDArray[Any], scaling: float) -> None:
    levels_a, scales_a = rounded(_tensor(a))
    levels_b, scales_b = rounded(_tensor(bt))
    rank, whole = len(levels_a), held.b.shape[1]
    for part in (held.a, held.b, held.scales):  # of components that only fill up
        part.zero_()
    held.a[:rank] = levels_a
    held.b[:, :rank] = levels_b[:whole].T
    held.rest.copy_(levels_b[whole:])
    held.scales[:rank] = scales_a.float() * scales_b.float() * scaling


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """Arrays from Ray's object store are read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def save_flat(path: Path, adapter: AdapterWeights | CompressedAdapter, dtype: torch.dtype, int8: bool = False) -> None:
    """Write an adapter's flat file, whole or not at all."""
    layout = layout_of(adapter, dtype, int8)
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    write_block(adapter, layout, block)
    metadata = _Metadata(
        layers=layout.layers,
        factors=factors_of(adapter, layout),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        group=layout.group,
        bits=layout.bits,
        int8=layout.int8,
        base_name=adapter.base.name,
        base_sha256=adapter.base.sha256,
        sha256="",
    )
    metadata = metadata.model_copy(update={"sha256": _digest(metadata, block)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    save_file({_TENSOR: block}, partial, metadata={_METADATA: metadata.model_dump_json()})
    partial.replace(path)


def open_flat(path: Path, *, pin: bool = False) -> FlatAdapter:
    """Open a flat file and check it against its hash.

    Args:
        pin: also hold the block in page-locked memory, for fast copies to a GPU.

    Raises:
        FormatError: it is missing, damaged, or no flat file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = _Metadata.model_validate_json((opened.metadata() or {})[_METADATA])
            size = opened.get_slice(_TENSOR).get_shape()
        file = io.FileIO(path)
    except (OSError, SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is no flat modifier file: {error}") from error
    layout = Layout(metadata.layers, getattr(torch, metadata.dtype), metadata.group, metadata.bits, metadata.int8)
    if size != [layout.nbytes] or len(metadata.factors) != len(layout.layers):
        raise FormatError(f"{path} is damaged: its block has not the size of its layers")
    offset = 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    adapter = FlatAdapter(layout, BaseRef(metadata.base_name, metadata.base_sha256), file, offset, metadata.factors)
    block = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pin)
    adapter.read_into(block)
    if _digest(metadata, block) != metadata.sha256:
        raise FormatError(f"{path} is damaged: its numbers are not those that were written")
    return replace(adapter, pinned=block) if pin else adapter


def _expanded(adapter: AdapterWeights | CompressedAdapter) -> Iterator[Expanded]:
    """Name, A and B transposed of each layer."""
    if isinstance(adapter, CompressedAdapter):
        return iter_layers(adapter)
    return ((name, pair.a, pair.b.T) for name, pair in adapter.layers.items())


def _digest(metadata: _Metadata, block: torch.Tensor) -> str:
    digest = hashlib.sha256(metadata.model_dump_json(exclude={"sha256"}).encode())
    digest.update(block.numpy().data)
    return digest.hexdigest()


def _read_parts(file: int, offset: int, target: memoryview) -> None:
    """Fill a buffer of bytes from a file, in parts side by side."""
    step = -(-len(target) // _PARTS)
    starts = range(0, len(target), step)
    for done in [_readers.submit(_read, file, offset + s, target[s : s + step]) for s in starts]:
        done.result()


def _read(file: int, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if count == 0:
            raise FormatError("a flat modifier file has become shorter while it was in use")
        done += count
