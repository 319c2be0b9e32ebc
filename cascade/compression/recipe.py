"""Compression as the search sees it: recipes, their sizes, the space to search and points known to be good.

The space's main axis is `size`, the share of the fp16 adapter that a candidate may weigh on disk: `recipe_from` turns
it into the density or rank that costs so much under the chosen method and number format. So every candidate is near
the size it was asked for, whatever the rank, and the search spends its trials on what decides quality. What serving
may hold in memory bounds the rank besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import norm

from cascade.compression.adapter import AdapterWeights, fp16_bytes
from cascade.compression.format import disk_bytes
from cascade.compression.methods import Prune, Recipe, Truncate
from cascade.compression.packed import CompressedAdapter, compress, expand, resident_bytes
from cascade.compression.prune import GROUPS, Group
from cascade.config import Compression
from cascade.errors import ConfigError

__all__ = [
    "CompressedAdapter",
    "Limits",
    "Prune",
    "Recipe",
    "Truncate",
    "compress",
    "disk_bytes",
    "expand",
    "limits",
    "recipe_from",
    "resident_bytes",
    "search_space",
    "seed_points",
]

Uniform = tuple[Literal["uniform", "log-uniform"], float, float]
Choice = tuple[Literal["choice"], list[Any]]
_FULL_BITS = 16.0
_SMALLEST = 1 / 20
"""Of the largest size, where the search begins: what is left below keeps too little, the header aside."""
_HEADER_SHARE = 0.96
"""Of the size limit, what numbers and masks may take: the rest is for the header."""
_BITS = {"fp16": (11.9, 1.7), "int8": (7.0, 0.95), "int4": (3.05, 0.7), "ternary": (1.16, 0.0)}
"""Stored bits per kept number, scales included, after zstandard: (at density 0, more at density 1). Measured on
normally distributed numbers in groups of 64; sizes that matter are always taken from the file itself."""
_DENSE_TERNARY_BITS = 1.75
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


def search_space(compression: Compression, *, adapter: AdapterWeights | None = None) -> dict[str, Uniform | Choice]:
    """What the search varies, by name, independent of any search library.

    Args:
        compression: gives the largest size.
        adapter: with it, `target_bytes` bounds the size too.

    Returns:
        ("uniform" or "log-uniform", low, high) or ("choice", values) by name; what is drawn goes to `recipe_from`.
            method: "low-rank" truncates, "rotated" also prunes the SVD's factors, "sparse" prunes A - A0 and B, which
                saves nothing in memory and is left out where that is limited.
            values: number format of what is kept.
            size: aimed at, as a share of the fp16 adapter.
            balance: share of the bits that A gets (sparse and rotated).
            rescale_a, rescale_b: what is kept is multiplied with these powers of `projection` (sparse and rotated).
                For rotated ones 1 was best, or level with the best, at every density tried.
            allocation, metric: of ranks (low-rank and rotated).
            mlp, early, late: weight of these groups of layers against attention and middle (sparse and rotated).
    """
    high = _largest_size(compression, adapter)
    sparse = compression.max_resident_ratio >= 1
    powers: Uniform = ("uniform", 0.0, 2.0) if sparse else ("uniform", 0.6, 1.4)
    return {
        "method": ("choice", ["low-rank", "rotated", *(["sparse"] if sparse else [])]),
        "values": ("choice", ["fp16", "int8", "int4", "ternary"]),
        "size": ("log-uniform", _SMALLEST * high, high),
        "balance": ("uniform", 0.2, 0.8),
        "rescale_a": powers,
        "rescale_b": powers,
        "allocation": ("choice", ["uniform", "global"]),
        "metric": ("choice", ["weights", "activations", "gradients"]),
        "mlp": ("uniform", 0.5, 2.0),
        "early": ("uniform", 0.5, 2.0),
        "late": ("uniform", 0.5, 2.0),
    }


def seed_points(
    compression: Compression | None = None, *, adapter: AdapterWeights | None = None
) -> list[dict[str, Any]]:
    """Points of `search_space` to try first, best bets first.

    Args:
        compression: the one whose space they shall lie in; sizes are adapted to it.
        adapter: as in `search_space`.
    """
    wanted = compression or Compression()
    high = _largest_size(wanted, adapter)
    neutral = {"balance": 0.5, "rescale_a": 1.0, "rescale_b": 1.0, "allocation": "global"}
    neutral |= {"metric": "gradients", "mlp": 1.0, "early": 1.0, "late": 1.0}
    points: list[dict[str, Any]] = [
        {"method": "low-rank", "values": "int8", "size": 1.0},
        {"method": "low-rank", "values": "int4", "size": 0.45},
        {"method": "rotated", "values": "int4", "size": 0.12},
        {"method": "low-rank", "values": "int4", "size": 0.235},
        {"method": "rotated", "values": "int4", "size": 0.2},
        {"method": "low-rank", "values": "int8", "size": 0.5, "metric": "weights"},
    ]
    if wanted.max_resident_ratio >= 1:
        points[2:2] = [
            {"method": "sparse", "values": "int4", "size": 1.0, "rescale_a": 0.0},
            {"method": "sparse", "values": "int4", "size": 0.4, "rescale_a": 0.0, "rescale_b": 1.3},
        ]
    return [{**neutral, **point, "size": point["size"] * high} for point in points]


def recipe_from(params: Mapping[str, Any], *, resident: float = 1.0, bytes_per_number: int = 2) -> Recipe:
    """The recipe of a point of `search_space`. Missing names take neutral values.

    Args:
        resident: the most that serving may hold, as a share of the fp16 adapter.
        bytes_per_number: of the type that the model computes in.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = set(params) - set(search_space(Compression()))
    if unknown:
        raise ConfigError(f"unknown compression parameters {sorted(unknown)}")
    method, values, size = params.get("method", "low-rank"), params.get("values", "int4"), params.get("size", 0.17)
    bits = size * _FULL_BITS
    how = {"allocation": params.get("allocation", "uniform"), "metric": params.get("metric", "weights")}
    if method == "low-rank":
        keep = bits / (_DENSE_TERNARY_BITS if values == "ternary" else sum(_BITS[values]))
        held = bytes_per_number if values == "fp16" else 1 + bytes_per_number / Recipe().group
        most = 2 * resident / held
        return Recipe(truncate=Truncate(keep=min(1.0, keep, most), **how), values=values)
    keep = min(1.0, 2 * resident / bytes_per_number) if method == "rotated" else 1.0
    balance = params.get("balance", 0.5)
    density_a = density_for(2 * balance * bits / keep, values)
    density_b = density_for(2 * (1 - balance) * bits / keep, values)
    prune = Prune(
        density_a=density_a,
        density_b=density_b,
        weights={g: w for g in GROUPS if (w := _weight(g, params)) != 1.0},
        rescale_a=projection(density_a) ** params.get("rescale_a", 1.0),
        rescale_b=projection(density_b) ** params.get("rescale_b", 1.0),
    )
    return Recipe(truncate=Truncate(keep=keep, **how) if method == "rotated" else None, prune=prune, values=values)


def projection(density: float) -> float:
    """The factor s on what magnitude pruning keeps of x that leaves <s kept, x> = <x, x>: one over the kept energy.

    So much of the original is left in its own direction. For normally distributed numbers, whose share of energy
    beyond the threshold t that so many exceed is density + 2 t phi(t).
    """
    threshold = float(norm.isf(density / 2))
    return 1 / (density + 2 * threshold * float(norm.pdf(threshold)))


def density_for(bits: float, values: str) -> float:
    """The density at which mask and values cost so many bits per number of the factor, kept or not.

    Returns:
        Density in [0.005, 0.9]. A mask costs about its entropy, and never more than a bit.
    """
    at_zero, more = _BITS[values]
    low, high = 0.005, 0.9
    for _ in range(40):
        middle = (low + high) / 2
        half = min(middle, 0.5)  # beyond one half the entropy falls again, the mask's real cost hardly
        entropy = -half * math.log2(half) - (1 - half) * math.log2(1 - half)
        spent = min(1.0, entropy + _MASK_OVERHEAD) + middle * (at_zero + more * middle)
        low, high = (middle, high) if spent < bits else (low, middle)
    return low


def _largest_size(compression: Compression, adapter: AdapterWeights | None) -> float:
    share = compression.max_ratio if adapter is None else limits(adapter, compression).disk / fp16_bytes(adapter)
    return _HEADER_SHARE * share


def _weight(group: Group, params: Mapping[str, Any]) -> float:
    kind, depth = group.split("-")
    return float(params.get("mlp", 1.0) if kind == "mlp" else 1.0) * float(params.get(depth, 1.0))
