"""The serving form of a modifier: what a slot computes with, in one block of memory or of one local file.

A block holds all numbers in the model's own dtype or, where the modifier's numbers have few bits and nothing was
pruned, a byte for each number and a scale per group in that dtype; then layers are brought into the dtype one by one,
when they compute. So what saves bytes on disk saves them in memory too. For a base that is held in 8 bits the numbers
of every modifier are rounded as the base's are, and computed with by the same kernel: see `cascade.models.int8`.

A modifier file is small because it is packed; expanding it takes time. Serving brings each version into a block once,
kept as a safetensors file with a single tensor, and from then on a swap is one read into the slot's fixed buffer. The
file is opened once and stays open, so what was checked is what is read, whatever happens to its name; it is read, not
mapped, because the pages of a mapping would count as this process's memory for every modifier used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cascade.compression.adapter import AdapterWeights, BaseRef
from cascade.compression.decoding import Expanded, iter_layers, iter_levels
from cascade.compression.methods import Settings
from cascade.compression.packed import CompressedAdapter, is_low_bit
from cascade.errors import FormatError
from cascade.models.int8 import BLOCK, product, rounded

_TENSOR, _METADATA = "block", "cascade-flat"
_ALIGNED = 64
"""Bytes that the levels of a block begin at a multiple of."""
_PARTS = 2
"""Threads that read one file: one alone does not fill the memory's bandwidth."""
_readers = ThreadPoolExecutor(_PARTS, thread_name_prefix="flat-reader")

LayerShape = tuple[str, int, int, int]
"""Name, rank, inputs, outputs."""


class _Metadata(Settings):
    """The metadata of a flat file. `sha256` is over the rest of it and the block."""

    layers: tuple[LayerShape, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    group: Annotated[int, Field(ge=1)] | None
    int8: bool
    base_name: str
    base_sha256: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Held:
    """One factor of a layer, as views of a block.

    Attributes:
        numbers: shape (rank, features) in the model's dtype; or int8 levels, (groups, group), the last one filled up.
        scales: of the levels, (groups, 1) in the model's dtype.
        shape: (rank, features).
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None
    shape: tuple[int, int]

    def matrix(self) -> torch.Tensor:
        """(rank, features) in the model's dtype."""
        if self.scales is None:
            return self.numbers
        rank, features = self.shape
        return (self.numbers * self.scales).view(-1)[: rank * features].view(rank, features)


@dataclass(frozen=True, slots=True)
class Held8:
    """One factor of a layer as a weight in 8 bits, as views of a block; the rank is filled up to whole blocks.

    Attributes:
        levels: (rank, inputs) of A, (outputs, rank) of B.
        scales: of each row.
    """

    levels: torch.Tensor
    scales: torch.Tensor

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows times the factor transposed."""
        return product(rows, self.levels, self.scales)


@dataclass(frozen=True, slots=True)
class Layout:
    """How an adapter lies in a block.

    Attributes:
        layers: in the block's order; of each, A of shape (rank, inputs) and then B transposed, scaled, of shape
            (rank, outputs).
        dtype: that the model computes in.
        group: levels that share a scale: first come the scales of all factors, then their levels, each factor
            filled up to whole groups. None: plain numbers.
        int8: for a base in 8 bits: first the scales of all factors, then their levels, as `Held8` has them.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    group: int | None
    int8: bool = False

    @property
    def parameters(self) -> int:
        """Numbers that the adapter has."""
        return sum(rank * (fan_in + fan_out) for _, rank, fan_in, fan_out in self.layers)

    @property
    def nbytes(self) -> int:
        """Size of the block."""
        if self.int8:
            return self.border + sum(rows * width for rows, width in self._weights())
        if self.group is None:
            return self.parameters * self.dtype.itemsize
        return self._groups * (self.group + self.dtype.itemsize)

    @property
    def border(self) -> int:
        """Byte at which the levels begin."""
        if self.int8:
            return -(-2 * sum(rows for rows, _ in self._weights()) // _ALIGNED) * _ALIGNED
        return 0 if self.group is None else self._groups * self.dtype.itemsize

    @property
    def _groups(self) -> int:
        assert self.group is not None
        return sum(-(-rank * width // self.group) for _, rank, *widths in self.layers for width in widths)

    def _weights(self) -> Iterator[tuple[int, int]]:
        """Shapes of A and B of each layer, as a base in 8 bits takes them."""
        for _, rank, fan_in, fan_out in self.layers:
            filled = -(-rank // BLOCK) * BLOCK
            yield filled, fan_in
            yield fan_out, filled

    def views(self, block: torch.Tensor) -> dict[str, tuple[Held, Held]] | dict[str, tuple[Held8, Held8]]:
        """A and B (transposed, but where `int8`) of each layer in a block of `nbytes` bytes."""
        if self.int8:
            weights = self._weights_in(block)
            return {name: (next(weights), next(weights)) for name, *_ in self.layers}
        cut = self._plain if self.group is None else self._levels
        factors = cut(block)
        return {name: (next(factors), next(factors)) for name, *_ in self.layers}

    def _weights_in(self, block: torch.Tensor) -> Iterator[Held8]:
        scales, at = block[: self.border].view(torch.bfloat16), 0
        levels, start = block[self.border :].view(torch.int8), 0
        for rows, width in self._weights():
            size = rows * width
            yield Held8(levels[start : start + size].view(rows, width), scales[at : at + rows])
            at, start = at + rows, start + size

    def _plain(self, block: torch.Tensor) -> Iterator[Held]:
        numbers, at = block.view(self.dtype), 0
        for _, rank, *widths in self.layers:
            for width in widths:
                yield Held(numbers[at : at + rank * width].view(rank, width), None, (rank, width))
                at += rank * width

    def _levels(self, block: torch.Tensor) -> Iterator[Held]:
        assert self.group is not None
        scales = block[: self.border].view(self.dtype).view(-1, 1)
        levels, at = block[self.border :].view(torch.int8).view(-1, self.group), 0
        for _, rank, *widths in self.layers:
            for width in widths:
                groups = -(-rank * width // self.group)
                yield Held(levels[at : at + groups], scales[at : at + groups], (rank, width))
                at += groups


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """An open flat file.

    Attributes:
        file: closed when nobody holds the adapter any more.
        pinned: the block in page-locked memory, on machines whose model is on a GPU.
    """

    layout: Layout
    base: BaseRef
    file: io.FileIO
    offset: int
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
    if int8:
        return Layout(tuple(_shapes(adapter)), dtype, None, int8=True)
    few_bits = isinstance(adapter, CompressedAdapter) and is_low_bit(adapter)
    return Layout(tuple(_shapes(adapter)), dtype, adapter.recipe.group if few_bits else None)  # type: ignore[union-attr]


def write_block(adapter: AdapterWeights | CompressedAdapter, layout: Layout, block: torch.Tensor) -> None:
    """Write an adapter into a block of bytes in the CPU's memory.

    Raises:
        FormatError: its packed streams are inconsistent.
    """
    if layout.group is not None:
        assert isinstance(adapter, CompressedAdapter)
        _write_levels(adapter, layout, block)
        return
    if layout.int8:
        _write_weights(adapter, layout, block)
        return
    views: dict[str, Any] = layout.views(block)
    for name, a, bt in _expanded(adapter):
        # Scaled before it is rounded to the dtype.
        for held, array in zip(views[name], (a, bt * np.float32(adapter.scaling)), strict=True):
            # Arrays from Ray's object store are read-only, which torch does not know.
            held.numbers.copy_(torch.from_numpy(array if array.flags.writeable else array.copy()))


def _write_weights(adapter: AdapterWeights | CompressedAdapter, layout: Layout, block: torch.Tensor) -> None:
    views: dict[str, Any] = layout.views(block)
    block.zero_()
    for name, a, bt in _expanded(adapter):
        for held, array in zip(views[name], (a, bt.T * np.float32(adapter.scaling)), strict=True):
            levels, scales = rounded(torch.from_numpy(np.array(array)))
            held.levels[: len(levels), : levels.shape[1]].copy_(levels)
            held.scales[: len(scales)].copy_(scales)


def _write_levels(adapter: CompressedAdapter, layout: Layout, block: torch.Tensor) -> None:
    factors = [f for _, a, bt in iter_levels(adapter) for f in (a, replace(bt, scales=bt.scales * adapter.scaling))]
    scales = np.concatenate([f.scales for f in factors]).astype(np.float32, copy=False)
    block[: layout.border].view(layout.dtype).copy_(torch.from_numpy(scales))
    flat, at = block[layout.border :].view(torch.int8).numpy(), 0
    for factor in factors:
        end = at + factor.scales.size * factor.group
        flat[at : at + factor.levels.size] = factor.levels
        flat[at + factor.levels.size : end] = 0
        at = end


def save_flat(path: Path, adapter: AdapterWeights | CompressedAdapter, dtype: torch.dtype, int8: bool = False) -> None:
    """Write an adapter's flat file, whole or not at all."""
    layout = layout_of(adapter, dtype, int8)
    block = torch.empty(layout.nbytes, dtype=torch.uint8)
    write_block(adapter, layout, block)
    metadata = _Metadata(
        layers=layout.layers,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        group=layout.group,
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
    layout = Layout(metadata.layers, getattr(torch, metadata.dtype), metadata.group, metadata.int8)
    if size != [layout.nbytes]:
        raise FormatError(f"{path} is damaged: its block has not the size of its layers")
    offset = 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    adapter = FlatAdapter(layout, BaseRef(metadata.base_name, metadata.base_sha256), file, offset)
    block = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pin)
    adapter.read_into(block)
    if _digest(metadata, block) != metadata.sha256:
        raise FormatError(f"{path} is damaged: its numbers are not those that were written")
    return replace(adapter, pinned=block) if pin else adapter


def _shapes(adapter: AdapterWeights | CompressedAdapter) -> list[LayerShape]:
    """Name, rank, inputs and outputs of each layer."""
    if isinstance(adapter, CompressedAdapter):
        return [(layer.name, layer.rank, layer.fan_in, layer.fan_out) for layer in adapter.layers]
    return [(name, pair.rank, pair.a.shape[1], pair.b.shape[0]) for name, pair in adapter.layers.items()]


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
