"""Compression as the search sees it: recipes, their sizes, the space to search and points known to be good.

The space's main axis is `size`, on disk: `recipe_from` turns it into the density or rank that costs so much under the
chosen method and number format. It runs between the smallest and the largest that these two reach within the limits of
disk and memory (`Room`), so that no two sizes give the same recipe, and the search spends its trials on what decides
quality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import disk_bytes
from cascade.compression.methods import Prune, Recipe, Truncate
from cascade.compression.packed import compress, expand, level_bits, resident_bytes
from cascade.compression.prune import GROUPS, Group
from cascade.config import Compression
from cascade.errors import ConfigError

__all__ = [
    "CompressedAdapter",
    "Limits",
    "Prune",
    "Recipe",
    "Room",
    "Truncate",
    "compress",
    "disk_bytes",
    "expand",
    "limits",
    "matters",
    "recipe_from",
    "resident_bytes",
    "search_space",
    "seed_points",
]

Uniform = tuple[Literal["uniform"], float, float]
Choice = tuple[Literal["choice"], list[Any]]
_FULL_BITS = 16.0
_SMALLEST = 1 / 20
"""Of the largest size, where the search begins: what is left below keeps too little, the header aside."""
_SPARSEST, _DENSEST = 0.005, 0.9
"""Densities between which pruning is searched."""
_HEADER_SHARE = 0.96
"""Of the size limit, what numbers and masks may take: the rest is for the header."""
_BITS = {"fp16": (11.9, 1.7), "int8": (7.0, 0.95), "int4": (3.05, 0.7), "ternary": (1.16, 0.0)}
"""Stored bits per kept number, scales included, after zstandard: (at density 0, more at density 1). Measured on
normally distributed numbers in groups of 64; sizes that matter are always taken from the file itself."""
_MEASURED_GROUP = 64
_DENSE_TERNARY_BITS = 1.75
_FILLED = 1.05
"""Bytes that serving in 8 bits holds of a number: one, and shares of the scales and of components that only fill up
(`filled`), which came to 0.01 to 0.04 at ranks of 16 to 256."""
_MASK_OVERHEAD = 0.075
"""Bits per number by which zstandard misses the entropy of a mask, at densities of 0.02 to 0.12."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most bytes that a compressed adapter may take: on disk, and in memory while it is served."""

    disk: int
    resident: int


def limits(adapter: AdapterWeights, compression: Compression) -> Limits:
    """Both limits of an adapter; on disk the stricter of share and absolute target."""
    full = fp16_bytes(adapter)
    disk = math.floor(compression.max_ratio * full)
    if compression.target_bytes is not None:
        disk = min(disk, compression.target_bytes)
    return Limits(disk, math.floor(compression.max_resident_ratio * full))


@dataclass(frozen=True, slots=True)
class Room:
    """What a candidate may take, and what it is made of.

    Attributes:
        disk: the most that numbers and masks may take on disk, as a share of the fp16 adapter.
        resident: the most that serving may hold, likewise.
        bytes_per_number: of the type that the model computes in.
        int8: whether serving holds the base in 8 bits, and so every modifier.
        rank: of the adapter; below one rank per layer nothing becomes smaller.
    """

    disk: float = _HEADER_SHARE * 48 / 260
    resident: float = 1.0
    bytes_per_number: int = 2
    rank: int = 64
    int8: bool = False

    @classmethod
    def of(cls, adapter: AdapterWeights, bounds: Limits, bytes_per_number: int = 2, *, int8: bool = False) -> Room:
        """Within the limits of an adapter."""
        full = fp16_bytes(adapter)
        return cls(_HEADER_SHARE * bounds.disk / full, bounds.resident / full, bytes_per_number, adapter.rank, int8)

    def held(self, values: str, group: int) -> float:
        """Bytes that serving holds of a number of which nothing was pruned, its share of the scales included."""
        if self.int8:
            return _FILLED
        return self.bytes_per_number if values == "fp16" else level_bits(values) / 8 + 2 / group


def search_space(compression: Compression) -> dict[str, Uniform | Choice]:
    """What the search varies, by name, independent of any search library.

    Returns:
        ("uniform", low, high) or ("choice", values) by name; what is drawn goes to `recipe_from`.
            method: "low-rank" truncates, "rotated" also prunes the SVD's factors, "sparse" prunes A - A0 and B, which
                saves nothing in memory and is left out where that is limited.
            values: number format of what is kept; group: numbers that share a scale.
            size: between the smallest (0) and the largest (1) that method and format reach within the limits, in
                equal ratios.
            allocation: of ranks (low-rank and rotated).
            metric: what counts in truncation. In pruning magnitude does: with one threshold per layer it was better
                than measured pruning (`Prune.metric`) of an SVD's factors and of A - A0 and B, wherever tried.
            balance: share of the bits that A gets (sparse and rotated).
            rescale_a, rescale_b: what is kept is divided by its share of the layer's energy to this power, of A and
                of B (sparse and rotated): at 1 so much of the original is left in its own direction.
            scope: of the thresholds (sparse and rotated).
            mlp, early, late: weight of these groups of layers against attention and middle (with scope "global").
    """
    sparse = compression.max_resident_ratio >= 1
    powers: Uniform = ("uniform", 0.0, 2.0) if sparse else ("uniform", 0.6, 1.4)
    return {
        "method": ("choice", ["low-rank", "rotated", *(["sparse"] if sparse else [])]),
        "values": ("choice", ["fp16", "int8", "int4", "ternary"]),
        "group": ("choice", [64, 128]),
        "size": ("uniform", 0.0, 1.0),
        "allocation": ("choice", ["energy", "global"]),
        "metric": ("choice", ["weights", "activations", "gradients"]),
        "balance": ("uniform", 0.2, 0.8),
        "rescale_a": powers,
        "rescale_b": powers,
        "scope": ("choice", ["layer", "group", "global"]),
        "mlp": ("uniform", 0.5, 2.0),
        "early": ("uniform", 0.5, 2.0),
        "late": ("uniform", 0.5, 2.0),
    }


def seed_points(compression: Compression | None = None) -> list[dict[str, Any]]:
    """Points of `search_space` to try first, best bets first.

    Args:
        compression: the one whose space they shall lie in.
    """
    neutral = {"balance": 0.5, "rescale_a": 1.0, "rescale_b": 1.0, "allocation": "global", "scope": "layer"}
    neutral |= {"metric": "gradients", "group": 128, "mlp": 1.0, "early": 1.0, "late": 1.0}
    points: list[dict[str, Any]] = [
        {"method": "low-rank", "values": "int8", "size": 1.0},
        {"method": "low-rank", "values": "int4", "size": 1.0},
        {"method": "rotated", "values": "int4", "size": 0.8},
        {"method": "rotated", "values": "ternary", "size": 0.75},
        {"method": "low-rank", "values": "int4", "size": 0.75},
        {"method": "rotated", "values": "int4", "size": 0.6},
        {"method": "rotated", "values": "ternary", "size": 0.65},
        {"method": "low-rank", "values": "int4", "size": 0.4, "metric": "activations"},
    ]
    if (compression or Compression()).max_resident_ratio >= 1:
        points[2:2] = [
            {"method": "sparse", "values": "int4", "size": 1.0, "rescale_a": 0.0},
            {"method": "sparse", "values": "int4", "size": 0.7, "rescale_a": 0.0, "rescale_b": 1.3},
        ]
    return [{**neutral, **point} for point in points]


def matters(params: Mapping[str, Any]) -> set[str]:
    """The names of `search_space` that make a difference to the recipe of a point."""
    method = params["method"]
    names = {"method", "values", "size"} | ({"group"} if params["values"] != "fp16" else set())
    if method != "sparse":
        names |= {"allocation", "metric"}
    if method != "low-rank":
        names |= {"balance", "rescale_a", "rescale_b", "scope"}
        names |= {"mlp", "early", "late"} if params["scope"] == "global" else set()
    return names


def recipe_from(params: Mapping[str, Any], room: Room = Room()) -> Recipe:
    """The recipe of a point of `search_space`. Missing names take neutral values, `size` the largest.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = set(params) - set(search_space(Compression()))
    if unknown:
        raise ConfigError(f"unknown compression parameters {sorted(unknown)}")
    method, values = params.get("method", "low-rank"), params.get("values", "int4")
    group = params.get("group", _MEASURED_GROUP) if values != "fp16" else _MEASURED_GROUP
    low, high = _reach(method, values, group, room)
    bits = min(high, low * (high / low) ** params.get("size", 1.0))  # rounding may go beyond what there is
    how = {"allocation": params.get("allocation", "global"), "metric": params.get("metric", "weights")}
    if method == "low-rank":
        truncate = Truncate(keep=bits / _dense_bits(values, group), **how)
        return Recipe(truncate=truncate, values=values, group=group)
    least, most = _pruned_bits(_SPARSEST, values, group), _pruned_bits(_DENSEST, values, group)
    bits_a = min(max(2 * params.get("balance", 0.5) * bits, least, 2 * bits - most), most, 2 * bits - least)
    scope = params.get("scope", "global")
    prune = Prune(
        density_a=density_for(bits_a, values, group),
        density_b=density_for(2 * bits - bits_a, values, group),
        scope=scope,
        weights={g: w for g in GROUPS if scope == "global" and (w := _weight(g, params)) != 1.0},
        power_a=params.get("rescale_a", 1.0),
        power_b=params.get("rescale_b", 1.0),
    )
    truncate_to = Truncate(keep=_rotated_rank(room), **how) if method == "rotated" else None
    return Recipe(truncate=truncate_to, prune=prune, values=values, group=group)


def _reach(method: str, values: str, group: int, room: Room) -> tuple[float, float]:
    """The fewest and the most bits that method and format can spend on a number within the room.

    Of "low-rank" a number is one of the whole adapter, of the others one of those that are left to prune.
    """
    wanted = room.disk * _FULL_BITS
    if method == "low-rank":
        dense = _dense_bits(values, group)
        high = min(wanted, dense * min(1.0, 2 * room.resident / room.held(values, group)))
        low = max(_SMALLEST * high, dense / room.rank)
    else:
        high = min(
            wanted / (_rotated_rank(room) if method == "rotated" else 1.0), _pruned_bits(_DENSEST, values, group)
        )
        low = max(_SMALLEST * high, _pruned_bits(_SPARSEST, values, group))
    return min(low, high), high


def _rotated_rank(room: Room) -> float:
    """The share of the rank that leaves as much as serving may hold, where it cannot be held in few bits."""
    return min(1.0, 2 * room.resident / room.held("fp16", 1))


def density_for(bits: float, values: str, group: int = 64) -> float:
    """The density at which mask and values cost so many bits per number of the factor, kept or not.

    Returns:
        Density in [0.005, 0.9].
    """
    low, high = _SPARSEST, _DENSEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _pruned_bits(middle, values, group) < bits else (low, middle)
    return low


def _pruned_bits(density: float, values: str, group: int) -> float:
    """Bits per number, kept or not, of mask and values. A mask costs about its entropy, and never more than a bit."""
    at_zero, more = _BITS[values]
    half = min(density, 0.5)  # beyond one half the entropy falls again, the mask's real cost hardly
    entropy = -half * math.log2(half) - (1 - half) * math.log2(1 - half)
    return min(1.0, entropy + _MASK_OVERHEAD) + density * (at_zero + more * density + _scale_bits(values, group))


def _dense_bits(values: str, group: int) -> float:
    """Bits per number of a factor of which nothing was pruned."""
    stored = _DENSE_TERNARY_BITS if values == "ternary" else sum(_BITS[values])
    return stored + _scale_bits(values, group)


def _scale_bits(values: str, group: int) -> float:
    """What scales cost beyond those of the groups that `_BITS` was measured with."""
    return 0.0 if values == "fp16" else _FULL_BITS / group - _FULL_BITS / _MEASURED_GROUP


def _weight(group: Group, params: Mapping[str, Any]) -> float:
    kind, depth = group.split("-")
    return float(params.get("mlp", 1.0) if kind == "mlp" else 1.0) * float(params.get(depth, 1.0))
