"""From a PEFT folder, made anywhere, to a modifier file and back, without a search and without data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from cascade.compression.adapter import AdapterWeights, fp16_bytes, load_peft_folder, save_peft_folder
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import disk_bytes, load_modifier, save_modifier
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress, expand, resident_bytes
from cascade.compression.recipe import Room, limits, recipe_from
from cascade.config import Compression
from cascade.errors import DataError

Values = Literal["fp16", "int8", "int4", "ternary"]
_STEPS = 20
_STEP = 0.95


def compress_folder(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    wanted: Compression | None = None,
    values: Values | None = None,
    recipe: Recipe | None = None,
    bytes_per_number: int = 2,
    int8: bool = False,
) -> tuple[AdapterWeights, CompressedAdapter]:
    """Compress a LoRA by rank truncation and quantisation to what disk and memory allow, and write the file.

    What the adapter does to tasks is not measured here: that is what the job compress_modifier is for.

    Args:
        folder: of a PEFT LoRA; where A started need not be known.
        file: to write.
        wanted: gives the limits of size.
        values: number format; by default int8, or int4 below a tenth of the fp16 size.
        recipe: what to do instead; its size is not limited.
        bytes_per_number: of the type of the base that it will be served with: 4 for float32. Numbers of few bits take
            the same room beside every type.
        int8: whether that base will be held in 8 bits.

    Returns:
        The adapter as it was, and compressed.

    Raises:
        DataError: the folder holds no plain LoRA, the limits are below one rank per layer, or the file cannot be
            written.
    """
    wanted = wanted or Compression()
    adapter = load_peft_folder(folder)
    compressed = compress(adapter, recipe) if recipe else _within(adapter, wanted, values, bytes_per_number, int8)
    save_modifier(file, compressed)
    return adapter, compressed


def _within(
    adapter: AdapterWeights, wanted: Compression, values: Values | None, bytes_per_number: int, int8: bool
) -> CompressedAdapter:
    """The largest that keeps both limits, found from above: sizes are known exactly only afterwards."""
    bounds, full = limits(adapter, wanted), fp16_bytes(adapter)
    share = bounds.disk / full
    resident = bounds.resident / full
    for step in range(_STEPS):
        less = _STEP**step
        room = Room(0.97 * share * less, resident * less, bytes_per_number, adapter.rank, int8)  # header apart
        compressed = compress(adapter, recipe_from({"method": "low-rank", "values": values or _format(share)}, room))
        held = resident_bytes(compressed, bytes_per_number=bytes_per_number, int8=int8)
        if disk_bytes(compressed) <= bounds.disk and held <= bounds.resident:
            return compressed
    raise DataError(
        f"{bounds.disk} bytes on disk and {bounds.resident} in memory are too few for this adapter "
        f"({full} bytes in fp16): one rank per layer takes more; allow a larger share"
    )


def _format(share: float) -> Values:
    return "int8" if share >= 0.1 else "int4"


def export_modifier(
    file: str | os.PathLike[str], folder: str | os.PathLike[str], *, dtype: str = "float32"
) -> AdapterWeights:
    """Expand a modifier file into an ordinary PEFT folder, which stock PEFT loads.

    Args:
        dtype: "float32" keeps every bit; "float16" is half the size.

    Returns:
        What was written.

    Raises:
        FormatError: the file is damaged, foreign, or newer than this version.
        DataError: the folder is there already and is not empty, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is there already: name a new folder")
    adapter = expand(load_modifier(file, verify=False))  # expanding compares the hash
    try:
        save_peft_folder(adapter, target, dtype=dtype)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror}") from error
    return adapter
