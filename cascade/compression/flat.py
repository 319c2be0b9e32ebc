"""The serving form of a modifier: the numbers a slot computes with, in one block of one local file.

A modifier file is small because it is packed; expanding it takes seconds. Serving expands each version once, into a
safetensors file with a single tensor in the model's own dtype, and from then on a swap is one read into the slot's
fixed buffer. The file is opened once and stays open, so what was checked is what is read, whatever happens to its name;
it is read, not mapped, because the pages of a mapping would count as this process's memory for every modifier used.
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

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cascade.compression.adapter import AdapterWeights, BaseRef
from cascade.compression.methods import Settings
from cascade.compression.packed import CompressedAdapter, Expanded, iter_layers
from cascade.errors import FormatError

_TENSOR, _METADATA = "numbers", "cascade-flat"
_PARTS = 2
"""Threads that read one file: one alone does not fill the memory's bandwidth."""
_readers = ThreadPoolExecutor(_PARTS, thread_name_prefix="flat-reader")

LayerShape = tuple[str, int, int, int]
"""Name, rank, inputs, outputs."""


class _Layout(Settings):
    """The metadata of a flat file. `sha256` is over the rest of it and the numbers."""

    layers: tuple[LayerShape, ...]
    base_name: str
    base_sha256: str
    sha256: str


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """An open flat file.

    Attributes:
        layers: in the order of the block; of each, A of shape (rank, inputs) and then B transposed, scaled, of shape
            (rank, outputs).
        file: closed when nobody holds the adapter any more.
        pinned: the numbers in page-locked memory, on machines whose model is on a GPU.
    """

    layers: tuple[LayerShape, ...]
    base: BaseRef
    dtype: torch.dtype
    file: io.FileIO
    offset: int
    pinned: torch.Tensor | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the block."""
        return sum(rank * (fan_in + fan_out) for _, rank, fan_in, fan_out in self.layers)

    def read_into(self, buffer: torch.Tensor) -> None:
        """Copy the numbers to the front of a flat buffer of the same dtype.

        Raises:
            FormatError: the file has become shorter.
        """
        target = buffer[: self.parameters]
        if self.pinned is not None:
            target.copy_(self.pinned, non_blocking=True)
            return
        _read_parts(self.file.fileno(), self.offset, memoryview(target.view(torch.uint8).numpy()))  # type: ignore[arg-type]


def flatten(adapter: AdapterWeights | CompressedAdapter, dtype: torch.dtype) -> torch.Tensor:
    """The block of numbers of an adapter, shape (parameters,)."""
    # Scaled before it is rounded to the type.
    arrays = (array for _, a, bt in expanded(adapter) for array in (a, bt * np.float32(adapter.scaling)))
    parts = [torch.from_numpy(np.ascontiguousarray(array)).flatten().to(dtype) for array in arrays]
    return torch.cat(parts)


def save_flat(path: Path, adapter: AdapterWeights | CompressedAdapter, dtype: torch.dtype) -> None:
    """Write an adapter's flat file, whole or not at all."""
    numbers = flatten(adapter, dtype)
    layout = _Layout(
        layers=tuple(shapes(adapter)),
        base_name=adapter.base.name,
        base_sha256=adapter.base.sha256,
        sha256="",
    )
    layout = layout.model_copy(update={"sha256": _digest(layout, numbers)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    save_file({_TENSOR: numbers}, partial, metadata={_METADATA: layout.model_dump_json()})
    partial.replace(path)


def open_flat(path: Path, *, pin: bool = False) -> FlatAdapter:
    """Open a flat file and check it against its hash.

    Args:
        pin: also hold the numbers in page-locked memory, for fast copies to a GPU.

    Raises:
        FormatError: it is missing, damaged, or no flat file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            layout = _Layout.model_validate_json((opened.metadata() or {})[_METADATA])
            dtype = opened.get_tensor(_TENSOR)[:0].dtype
        file = io.FileIO(path)
    except (OSError, SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is no flat modifier file: {error}") from error
    offset = 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    adapter = FlatAdapter(layout.layers, BaseRef(layout.base_name, layout.base_sha256), dtype, file, offset)
    numbers = torch.empty(adapter.parameters, dtype=dtype, pin_memory=pin)
    adapter.read_into(numbers)
    if _digest(layout, numbers) != layout.sha256:
        raise FormatError(f"{path} is damaged: its numbers are not those that were written")
    return replace(adapter, pinned=numbers) if pin else adapter


def shapes(adapter: AdapterWeights | CompressedAdapter | FlatAdapter) -> list[LayerShape]:
    """Name, rank, inputs and outputs of each layer."""
    if isinstance(adapter, FlatAdapter):
        return list(adapter.layers)
    if isinstance(adapter, CompressedAdapter):
        return [(layer.name, layer.rank, layer.fan_in, layer.fan_out) for layer in adapter.layers]
    return [(name, pair.rank, pair.a.shape[1], pair.b.shape[0]) for name, pair in adapter.layers.items()]


def expanded(adapter: AdapterWeights | CompressedAdapter) -> Iterator[Expanded]:
    """Name, A and B transposed of each layer."""
    if isinstance(adapter, CompressedAdapter):
        return iter_layers(adapter)
    return ((name, pair.a, pair.b.T) for name, pair in adapter.layers.items())


def _digest(layout: _Layout, numbers: torch.Tensor) -> str:
    digest = hashlib.sha256(layout.model_dump_json(exclude={"sha256"}).encode())
    digest.update(numbers.view(torch.uint8).numpy().data)
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
