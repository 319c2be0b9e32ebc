"""From a PEFT folder, made anywhere, to a modifier file and back, without a search and without data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from cascade.compression.adapter import AdapterWeights, fp16_bytes, load_peft_folder, save_peft_folder
from cascade.compression.format import disk_bytes, load_modifier, save_modifier
from cascade.compression.methods import Recipe
from cascade.compression.packed import CompressedAdapter, compress, expand, resident_bytes
from cascade.compression.recipe import Limits, Room, limits, recipe_from
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
) -> tuple[AdapterWeights, CompressedAdapter]:
    """Compress a LoRA by rank truncation and quantisation to what disk and memory allow, and write the file.

    What the adapter does to tasks is not measured here: that is what the job compress_modifier is for.

    Args:
        folder: of a PEFT LoRA; where A started need not be known.
        file: to write.
        wanted: gives the limits of size.
        values: number format; by default int8, or int4 below a tenth of the fp16 size.
        recipe: what to do instead; its size is not limited.

    Returns:
        The adapter as it was, and compressed.

    Raises:
        DataError: the folder holds no plain LoRA, or the limits are below one rank per layer.
    """
    wanted = wanted or Compression()
    adapter = load_peft_folder(folder)
    compressed = compress(adapter, recipe) if recipe else _within(adapter, wanted, values)
    save_modifier(file, compressed)
    return adapter, compressed


def _within(adapter: AdapterWeights, wanted: Compression, values: Values | None) -> CompressedAdapter:
    """The largest that keeps both limits, found from above: sizes are known exactly only afterwards."""
    bounds, full = limits(adapter, wanted), fp16_bytes(adapter)
    share = bounds.disk / full
    resident = bounds.resident / full
    for step in range(_STEPS):
        less = _STEP**step
        room = Room(0.97 * share * less, resident * less, rank=adapter.rank)  # the header is not in it
        compressed = compress(adapter, recipe_from({"method": "low-rank", "values": values or _format(share)}, room))
        if _fits(compressed, bounds):
            return compressed
    raise DataError(
        f"{bounds.disk} bytes on disk and {bounds.resident} in memory are too few for this adapter "
        f"({full} bytes in fp16): one rank per layer takes more; allow a larger share"
    )


def _format(share: float) -> Values:
    return "int8" if share >= 0.1 else "int4"


def _fits(compressed: CompressedAdapter, bounds: Limits) -> bool:
    return disk_bytes(compressed) <= bounds.disk and resident_bytes(compressed) <= bounds.resident


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
        DataError: the folder is there already and is not empty.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is there already: name a new folder")
    adapter = expand(load_modifier(file, verify=False))  # expanding compares the hash
    save_peft_folder(adapter, target, dtype=dtype)
    return adapter
