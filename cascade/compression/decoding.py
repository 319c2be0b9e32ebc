"""From the packed streams of a modifier back to numbers, front to back and layer by layer.

What is read may come from a file that an enemy wrote: it is decoded in parts of a fixed size, so that what it says of
its own size decides how long that takes, but never how much memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cascade.compression.compressed import FACTORS, CompressedAdapter, FactorName, LayerSpec
from cascade.compression.quantise import decode, packed_bytes, scale_count, unpack
from cascade.errors import FormatError
from cascade.training.seeded_init import iter_initial_lora_a

Number = TypeVar("Number", np.uint8, np.float16)
Expanded = tuple[str, NDArray[np.float32], NDArray[np.float32]]
"""Layer name, A of shape (rank, in), B transposed of shape (rank, out)."""
_BEYOND = 2.0**128
"""Above all that float32 holds."""
_PART = 1 << 18
"""Numbers of a factor that are decoded at a time, a multiple of 8."""


@dataclass(frozen=True, slots=True)
class Levels:
    """A factor in few bits: number i is `levels[i] * scales[i // group] * 2**exponent`.

    Attributes:
        levels: int8, flat, row-major.
        scales: float16, flat, one per group; the last group may be shorter.
    """

    levels: NDArray[np.int8]
    scales: NDArray[np.float16]
    exponent: int


def expanded_sha256(compressed: CompressedAdapter) -> str:
    """SHA-256 (hex) over names, A and B transposed (float32, row-major) of all layers, decoded in small parts."""
    digest = hashlib.sha256()
    readers = [_Reader(compressed, factor) for factor in FACTORS]
    for layer in compressed.layers:
        digest.update(layer.name.encode())
        for reader in readers:
            for part in reader.parts(layer):
                digest.update(part.data)
    for reader in readers:
        reader.finish()
    return digest.hexdigest()


def iter_layers(compressed: CompressedAdapter) -> Iterator[Expanded]:
    """Decode layer by layer, holding one at a time.

    Raises:
        FormatError: a stream does not fit the layers.
    """
    a, b = _Reader(compressed, "a"), _Reader(compressed, "b")
    for layer in compressed.layers:
        yield layer.name, a.next(layer), b.next(layer)
    a.finish()
    b.finish()


def iter_levels(compressed: CompressedAdapter) -> Iterator[tuple[str, Levels, Levels]]:
    """As `iter_layers` (A, B transposed), without going through float32; for `is_low_bit` ones.

    Raises:
        FormatError: a stream does not fit the layers.
    """
    a, b = _Reader(compressed, "a"), _Reader(compressed, "b")
    for layer in compressed.layers:
        yield layer.name, a.next_levels(layer), b.next_levels(layer)
    a.finish()
    b.finish()


# ------------------------------------------------------------------------------------------------- inside


class _Reader:
    """Reads one factor's streams from front to back."""

    def __init__(self, compressed: CompressedAdapter, factor: FactorName) -> None:
        self._packed = compressed.a if factor == "a" else compressed.b
        self._recipe = compressed.recipe
        self._factor = factor
        self._seed = compressed.init_seed if factor == "a" else None
        self._at = [0, 0, 0]  # in mask, values and scales

    def next(self, layer: LayerSpec) -> NDArray[np.float32]:
        """The next layer's factor, shape (rank, features)."""
        whole, at = np.empty(layer.size(self._factor), np.float32), 0
        for part in self.parts(layer):
            whole[at : at + part.size] = part
            at += part.size
        return whole.reshape(layer.rank, -1)

    def parts(self, layer: LayerSpec) -> Iterator[NDArray[np.float32]]:
        """The next layer's factor, flat, in parts of at most `_PART` numbers.

        Raises:
            FormatError: the streams do not fit the layer, or give numbers that are not finite.
        """
        which = 0 if self._factor == "a" else 1
        kept, size, codec = layer.kept[which], layer.size(self._factor), self._recipe.codec
        values = self._take(1, self._packed.values, packed_bytes(codec, kept))
        scales = self._take(2, self._packed.scales, scale_count(codec, kept, self._recipe.group))
        whole = self._packed.mask
        mask = None if whole is None else self._take(0, whole, -(-size // 8))
        start = None if self._seed is None else _start(self._seed, layer)
        done = 0
        for at in range(0, size, _PART):
            count = min(_PART, size - at)
            places = None if mask is None else np.unpackbits(mask[at // 8 :][: -(-count // 8)], count=count)
            new = count if places is None else int(np.count_nonzero(places))
            if done + new > kept:
                raise FormatError(f"layer {layer.name}: more than {kept} of {size} numbers are to be there")
            with np.errstate(over="ignore"):
                numbers = np.ldexp(self._decoded(values, scales, done, done + new), layer.exponents[which])
            if places is not None:
                dense = np.zeros(count, np.float32)
                dense[places.view(np.bool_)] = numbers
                numbers = dense
            if start is not None:
                numbers += next(start)
            if not np.isfinite(numbers).all():
                raise FormatError(f"layer {layer.name} holds numbers that are not finite")
            done += new
            yield numbers
        if done != kept:
            raise FormatError(f"layer {layer.name}: {done} of {size} numbers are there, not {kept}")

    def _decoded(
        self, values: NDArray[np.uint8], scales: NDArray[np.float16], start: int, end: int
    ) -> NDArray[np.float32]:
        """A layer's kept numbers from one to another."""
        codec, group = self._recipe.codec, self._recipe.group
        first = start - start % math.lcm(group, 40)  # here a group begins, and a byte
        packed = values[packed_bytes(codec, first) : packed_bytes(codec, end)]
        some = scales[scale_count(codec, first, group) : scale_count(codec, end, group)]
        return decode(packed, some, codec, group, end - first)[start - first :]

    def next_levels(self, layer: LayerSpec) -> Levels:
        """The next layer's factor in few bits, of a factor of which nothing was pruned."""
        which = 0 if self._factor == "a" else 1
        size, codec = layer.size(self._factor), self._recipe.codec
        if layer.kept[which] != size:
            raise FormatError(f"layer {layer.name}: {layer.kept[which]} of {size} numbers and no mask")
        levels = unpack(self._take(1, self._packed.values, packed_bytes(codec, size)), codec, size)
        scales = self._take(2, self._packed.scales, scale_count(codec, size, self._recipe.group))
        magnitudes = scales.view(np.uint16) & 0x7FFF  # fp16 without its sign: as whole numbers they have the same order
        largest = magnitudes.max(initial=0).view(np.float16)
        if not math.ldexp(largest, layer.exponents[which] + 7) < _BEYOND:  # no level is larger than 128
            raise FormatError(f"layer {layer.name} holds numbers that are not finite")
        return Levels(levels, scales, layer.exponents[which])

    def finish(self) -> None:
        lengths = (0 if self._packed.mask is None else self._packed.mask.size, self._packed.values.size)
        if (*lengths, self._packed.scales.size) != tuple(self._at):
            raise FormatError("the modifier holds more numbers than its layers")

    def _take(self, stream: int, data: NDArray[Number], count: int) -> NDArray[Number]:
        start = self._at[stream]
        self._at[stream] += count
        if self._at[stream] > data.size:
            raise FormatError("the modifier holds fewer numbers than its layers")
        return data[start : self._at[stream]]


def _start(seed: int, layer: LayerSpec) -> Iterator[NDArray[np.float32]]:
    return iter_initial_lora_a(seed, layer.name, layer.rank, layer.fan_in, _PART)
