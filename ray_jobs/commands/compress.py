"""`cascade compress`: a LoRA made elsewhere, made small without a search."""

from __future__ import annotations

from typing import cast, get_args

from cascade.compression.adapter import fp16_bytes
from cascade.compression.convert import Values, compress_folder
from cascade.compression.format import disk_bytes
from cascade.compression.packed import resident_bytes
from cascade.config import Compression
from cascade.errors import ConfigError


def compress_adapter(folder: str, file: str, share: float, values: str | None, base: str) -> None:
    """Compress the LoRA of a PEFT folder to a file, and print the sizes.

    Raises:
        CascadeError: an option has a value that it cannot have, or see `compress_folder`.
    """
    if not 0 < share <= 1 or values not in (None, *get_args(Values)):
        raise ConfigError(f"--share must be in (0, 1] and --values one of {', '.join(get_args(Values))}")
    if base not in ("bfloat16", "float16", "float32", "int8"):
        raise ConfigError(f"--base is the type of the base, bfloat16, float16, float32 or int8, not {base}")
    wanted = Compression(max_ratio=share, max_resident_ratio=share)
    number, int8 = 4 if base == "float32" else 2, base == "int8"
    adapter, compressed = compress_folder(
        folder, file, wanted=wanted, values=cast(Values | None, values), bytes_per_number=number, int8=int8
    )
    full, disk = fp16_bytes(adapter), disk_bytes(compressed)
    held = resident_bytes(compressed, bytes_per_number=number, int8=int8)
    print(f"{file}: {disk} bytes ({disk / full:.1%} of {full} in fp16), {held} in memory ({held / full:.1%})")
