"""What a compressed adapter is, in memory.

For each of the two factors all layers lie one after the other in three flat streams: a bit mask of what was kept
(absent when everything was), the packed numbers, and their scales. Every layer starts on a byte of its own, so that
layers can be decoded one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cascade.compression.adapter import BaseRef
from cascade.compression.methods import Recipe

FactorName = Literal["a", "b"]
FACTORS: tuple[FactorName, FactorName] = ("a", "b")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's place in the streams.

    Attributes:
        kept: how many numbers were kept, of A and of B.
        exponents: the powers of two that the stored numbers of A and of B are multiplied with.
    """

    name: str
    rank: int
    fan_in: int
    fan_out: int
    kept: tuple[int, int]
    exponents: tuple[int, int]

    def size(self, factor: FactorName) -> int:
        """Numbers in the whole factor."""
        return self.rank * (self.fan_in if factor == "a" else self.fan_out)


@dataclass(frozen=True, slots=True)
class PackedFactor:
    """All layers' A, or all layers' B transposed. `mask` and `values` are uint8, `scales` float16, all flat."""

    mask: NDArray[np.uint8] | None
    values: NDArray[np.uint8]
    scales: NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class CompressedAdapter:
    """A modifier's content. Made by `compress`, or read from a file.

    Attributes:
        rank: the rank that the adapter was trained with; a layer's own is in `layers`.
        init_seed: of A0, which is added to what A's streams hold; None when they hold A itself.
        expanded_sha256: over names, A and B transposed of all layers in float32, in order.
    """

    recipe: Recipe
    layers: tuple[LayerSpec, ...]
    a: PackedFactor
    b: PackedFactor
    scaling: float
    rank: int
    base: BaseRef
    target_modules: tuple[str, ...]
    init_seed: int | None
    expanded_sha256: str = ""

    @property
    def parameters(self) -> int:
        """Numbers in all factors once expanded."""
        return sum(layer.size("a") + layer.size("b") for layer in self.layers)
