"""Numbers to few bits and back: fp16, 8 and 4 bit, ternary, signs, each with fp16 scales per group.

Everything works on flat arrays of one layer's factor. Decoding is element-wise float32 arithmetic on table look-ups,
so it gives the same bits on every machine.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cascade.errors import FormatError

Codec = Literal["fp16", "int8", "int4", "ternary", "sign"]
CODECS: tuple[Codec, ...] = get_args(Codec)
_TRITS = np.array([[i // 3**k % 3 - 1 for k in range(5)] for i in range(243)], dtype=np.int8)
_NIBBLES = (np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1) - 8).astype(np.int8).view(np.uint16).ravel()
"""Both levels of a byte of int4 as one 16-bit number: looking up is several times faster than taking bits apart."""
_CLIPS = (1.0, 0.92, 0.84, 0.76)
"""Shares of a group's largest magnitude that its largest level may stand for. At 4 bits the steps are so wide that
cutting the largest number off is often worth the finer ones: a seventh of the error on normally distributed numbers."""
_TRIT_POWERS = np.array([3**k for k in range(5)], dtype=np.uint8)


def packed_bytes(codec: Codec, count: int) -> int:
    """Bytes that `count` numbers take, scales apart."""
    per_byte = {"fp16": 0.5, "int8": 1, "int4": 2, "ternary": 5, "sign": 8}[codec]
    return math.ceil(count / per_byte)


def scale_count(codec: Codec, count: int, group: int) -> int:
    """How many scales go with `count` numbers."""
    return 0 if codec == "fp16" else math.ceil(count / group)


def unit_exponent(values: NDArray[np.float32]) -> int:
    """The power of two that brings the largest magnitude into [0.5, 1): fp16 then neither over- nor underflows."""
    top = float(np.max(np.abs(values), initial=0.0))
    return math.frexp(top)[1] if top else 0


def encode(values: NDArray[np.float32], codec: Codec, group: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Pack a flat array whose magnitudes are at most 1.

    Args:
        values: float32, shape (count,).
        codec: "sign" keeps the sign of every number, "ternary" also makes small ones 0.
        group: numbers that share a scale.

    Returns:
        Packed bytes of shape (packed_bytes(codec, count),) and scales of shape (scale_count(...),).
    """
    if codec == "fp16":
        return values.astype(np.float16).view(np.uint8), np.empty(0, np.float16)
    rows = _grouped(values, group)
    sizes = np.minimum(group, values.size - group * np.arange(len(rows)))
    if codec in ("int8", "int4"):
        top = 127 if codec == "int8" else 7
        whole, scales = _rounded(rows, top, _CLIPS if codec == "int4" else (1.0,))
        levels = whole.astype(np.int8).ravel()[: values.size]
    else:
        levels_2d, scales = _ternary(rows, sizes, dense=codec == "ternary")
        levels = levels_2d.ravel()[: values.size]
    return _pack(levels, codec), scales


def decode(
    packed: NDArray[np.uint8], scales: NDArray[np.float16], codec: Codec, group: int, count: int
) -> NDArray[np.float32]:
    """The numbers that `encode` packed, float32 of shape (count,).

    Raises:
        FormatError: the bytes cannot come from `encode`.
    """
    if scales.size != scale_count(codec, count, group):
        raise FormatError(f"{count} numbers in {codec} have {scales.size} scales")
    if packed.size != packed_bytes(codec, count):
        raise _wrong_length(packed, codec, count)
    numbers = packed.view(np.float16) if codec == "fp16" else scales
    if not np.isfinite(numbers).all():
        raise FormatError("packed numbers are not finite")
    if codec == "fp16":
        return numbers.astype(np.float32)
    levels = unpack(packed, codec, count).astype(np.float32)
    whole = count - count % group
    wide = scales.astype(np.float32)
    levels[:whole].reshape(-1, group)[...] *= wide[: whole // group, None]
    if whole < count:
        levels[whole:] *= wide[-1]
    return levels


def unpack(packed: NDArray[np.uint8], codec: Codec, count: int) -> NDArray[np.int8]:
    """The levels, int8 of shape (count,), that become numbers when multiplied with their group's scale.

    Args:
        codec: any but fp16, which has none.

    Raises:
        FormatError: the bytes cannot come from `encode`.
    """
    if packed.size != packed_bytes(codec, count):
        raise _wrong_length(packed, codec, count)
    if codec == "int8":
        return packed.view(np.int8)
    if codec == "sign":
        return 1 - 2 * np.unpackbits(packed, count=count).view(np.int8)
    if codec == "int4":
        return _NIBBLES[packed].view(np.int8)[:count]
    if packed.size and packed.max() >= len(_TRITS):
        raise FormatError("packed ternary numbers are out of range")
    return _TRITS[packed].ravel()[:count]


def _grouped(values: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    rows = math.ceil(values.size / group)
    padded = np.zeros(rows * group, np.float32)
    padded[: values.size] = values
    return padded.reshape(rows, group)


def _divide(rows: NDArray[np.float32], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    wide = scales.astype(np.float32)[:, None]
    return np.divide(rows, wide, out=np.zeros_like(rows), where=wide > 0)


def _rounded(
    rows: NDArray[np.float32], top: int, clips: tuple[float, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Whole numbers up to `top` and a scale per group: of some that let the largest numbers be cut, the least wrong."""
    peak = np.abs(rows).max(axis=1, initial=0.0)
    best: tuple[NDArray[np.float32], NDArray[np.float16]] | None = None
    least = np.full(len(rows), np.inf, np.float32)
    for clip in clips:
        scales = (peak * np.float32(clip / top)).astype(np.float16)
        levels = _divide(rows, scales)
        np.rint(levels, out=levels).clip(-top, top, out=levels)
        if len(clips) == 1:
            return levels, scales
        wrong = levels * scales.astype(np.float32)[:, None]
        wrong -= rows
        error = np.einsum("ij,ij->i", wrong, wrong)
        better = error < least
        least[better] = error[better]
        if best is None:
            best = levels, scales
        else:
            best[0][better], best[1][better] = levels[better], scales[better]
    assert best is not None
    return best


def _ternary(
    rows: NDArray[np.float32], sizes: NDArray[np.int64], *, dense: bool
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Signs times a scale per group; dense ones zero what is below 0.7 of the mean (ternary weight networks)."""
    magnitude = np.abs(rows)
    mean = magnitude.sum(axis=1) / sizes
    kept = magnitude > 0.7 * mean[:, None] if dense else magnitude >= 0
    levels = np.where(kept, np.where(rows < 0, -1, 1), 0).astype(np.int8)
    number = kept.sum(axis=1) if dense else sizes
    scales = np.where(kept, magnitude, 0).sum(axis=1) / np.maximum(number, 1)
    return levels, scales.astype(np.float16)


def _pack(levels: NDArray[np.int8], codec: Codec) -> NDArray[np.uint8]:
    if codec == "int8":
        return levels.view(np.uint8)
    if codec == "sign":
        return np.packbits(levels < 0)
    width = 2 if codec == "int4" else 5
    shifted = np.zeros(math.ceil(levels.size / width) * width, np.uint8)
    shifted[: levels.size] = levels + (8 if codec == "int4" else 1)
    rows = shifted.reshape(-1, width)
    if codec == "int4":
        return np.bitwise_or(rows[:, 0], rows[:, 1] << 4, dtype=np.uint8)
    return np.asarray((rows * _TRIT_POWERS).sum(axis=1), dtype=np.uint8)


def _wrong_length(packed: NDArray[np.uint8], codec: Codec, count: int) -> FormatError:
    return FormatError(f"packed numbers have the wrong length: {packed.size} bytes for {count} in {codec}")
