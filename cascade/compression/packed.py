"""From an adapter to its compressed form and back; what each takes in memory while it is served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cascade.compression.adapter import AdapterWeights, LoraPair
from cascade.compression.compressed import FACTORS, CompressedAdapter, FactorName, LayerSpec, PackedFactor
from cascade.compression.decoding import expanded_sha256, iter_layers
from cascade.compression.methods import Recipe
from cascade.compression.prune import Changes, Importance, importance, keep_mask, kept_energy, thresholds
from cascade.compression.quantise import encode, packed_bytes, scale_count, unit_exponent
from cascade.compression.truncate import Calibration, grams_for, iter_truncated
from cascade.errors import DataError, FormatError

_BLOCK = 16
"""As `cascade.models.int8.BLOCK`, which would bring all of torch along."""
_CHEAP = 8
"""Of so many components one may be zeros."""


def compress(adapter: AdapterWeights, recipe: Recipe, calibration: Calibration | None = None) -> CompressedAdapter:
    """Apply a recipe to an adapter.

    Args:
        calibration: of this adapter (`cascade.compression.calibrate`), for recipes whose metric is measured.

    Raises:
        DataError: the adapter holds numbers that are not finite, or the recipe needs a calibration.
    """
    for name, pair in adapter.layers.items():
        if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all()):
            raise DataError(f"layer {name} holds numbers that are not finite: the training has diverged")
    a, b, shapes = _Parts(), _Parts(), []
    for part in _truncated(adapter, recipe, calibration):
        counts = _importance(adapter, part, recipe, calibration)
        _pack(part, "a", recipe, counts, a)
        _pack(part, "b", recipe, counts, b)
        shapes += [(name, pair.rank, pair.a.shape[1], pair.b.shape[0]) for name, pair in part.layers.items()]
    layers = tuple(LayerSpec(*shape, (a.kept[i], b.kept[i]), (a.exps[i], b.exps[i])) for i, shape in enumerate(shapes))
    packed = CompressedAdapter(
        recipe=recipe,
        layers=layers,
        a=a.joined(),
        b=b.joined(),
        scaling=adapter.scaling,
        rank=adapter.rank,
        base=adapter.base,
        target_modules=adapter.target_modules,
        init_seed=None if recipe.truncate else adapter.init_seed,
    )
    return replace(packed, expanded_sha256=expanded_sha256(packed))


def expand(compressed: CompressedAdapter, *, verify: bool = True) -> AdapterWeights:
    """The adapter that a compressed one stands for, in float32, bit for bit the same everywhere.

    Args:
        verify: compare with the hash that was taken when it was compressed.

    Raises:
        FormatError: the streams are inconsistent, or the hash does not fit.
    """
    digest = hashlib.sha256()
    layers = {}
    for name, a, bt in iter_layers(compressed):
        for part in (name.encode(), a.data, bt.data):
            digest.update(part)
        layers[name] = LoraPair(a, np.ascontiguousarray(bt.T))
    if verify and digest.hexdigest() != compressed.expanded_sha256:
        raise FormatError("the modifier expands to other numbers than when it was made: file or decoder is damaged")
    return AdapterWeights(
        layers=layers,
        scaling=compressed.scaling,
        rank=compressed.rank,
        base=compressed.base,
        target_modules=compressed.target_modules,
        init_seed=compressed.init_seed,
    )


def is_low_bit(compressed: CompressedAdapter) -> bool:
    """Whether serving can hold it in few bits: nothing pruned, nothing to be added to A.

    The scales of a pruned factor go with the numbers that were kept, wherever they lie; and A0 is no small number.
    """
    recipe = compressed.recipe
    return recipe.values != "fp16" and recipe.prune is None and compressed.init_seed is None


def level_bits(values: str) -> int:
    """That serving holds of a number of few bits, by its format."""
    return 8 if values == "int8" else 4


def level_groups(rank: int, fan_in: int, fan_out: int, group: int, bits: int) -> int:
    """Groups of levels that serving holds of a layer: each factor fills whole ones; of 4 bits their number is even."""
    groups = -(-rank * fan_in // group) - (-rank * fan_out // group)
    return groups + (groups % 2 if bits == 4 else 0)


def filled(rank: int) -> int:
    """The rank that serving holds of a layer beside a base in 8 bits: filled up with zeros to whole blocks of the
    kernel where that takes little memory, since what is left over costs a product of its own."""
    missing = -rank % _BLOCK
    return rank + missing if missing * _CHEAP <= rank else rank


def resident_bytes(compressed: CompressedAdapter, *, bytes_per_number: int = 2, int8: bool = False) -> int:
    """What serving holds of it: both factors of every layer at the rank that truncation left.

    A byte or half of one per number, and the scales, where `is_low_bit`; else every number in the model's type.

    Args:
        bytes_per_number: of the type that the model computes in; 2 for bfloat16 and float16, 4 for float32.
        int8: whether the base is held in 8 bits, and so is every modifier.
    """
    if int8:
        ranks = [filled(layer.rank) for layer in compressed.layers]
        numbers = sum(rank * (x.fan_in + x.fan_out) for rank, x in zip(ranks, compressed.layers, strict=True))
        return _aligned(2 * sum(ranks)) + numbers
    if not is_low_bit(compressed):
        return compressed.parameters * bytes_per_number
    group, bits = compressed.recipe.group, level_bits(compressed.recipe.values)
    groups = sum(level_groups(x.rank, x.fan_in, x.fan_out, group, bits) for x in compressed.layers)
    return _aligned(2 * groups) + groups * group * bits // 8


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def stream_sizes(recipe: Recipe, layers: tuple[LayerSpec, ...], factor: FactorName) -> tuple[int | None, int, int]:
    """Lengths of a factor's mask (bytes, None if there is none), values (bytes) and scales (numbers)."""
    which = 0 if factor == "a" else 1
    mask = sum(-(-layer.size(factor) // 8) for layer in layers) if recipe.prune else None
    values = sum(packed_bytes(recipe.codec, layer.kept[which]) for layer in layers)
    return mask, values, sum(scale_count(recipe.codec, layer.kept[which], recipe.group) for layer in layers)


# ------------------------------------------------------------------------------------------------- inside


@dataclass
class _Parts:
    """A factor's streams while they are made: one array per layer."""

    masks: list[NDArray[np.uint8]] = field(default_factory=list)
    values: list[NDArray[np.uint8]] = field(default_factory=list)
    scales: list[NDArray[np.float16]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    exps: list[int] = field(default_factory=list)

    def joined(self) -> PackedFactor:
        mask = np.concatenate(self.masks) if self.masks else None
        return PackedFactor(mask, np.concatenate(self.values), np.concatenate(self.scales))


def _truncated(adapter: AdapterWeights, recipe: Recipe, calibration: Calibration | None) -> Iterator[AdapterWeights]:
    """The adapter after truncation, in parts of one layer; whole where it is pruned, for which layers are compared."""
    how = recipe.truncate
    if how is None:
        yield adapter
        return
    layers = iter_truncated(adapter, how.keep, how.energy, how.allocation, how.metric, calibration)
    if recipe.prune is None:
        yield from (replace(adapter, layers={name: pair}, init_seed=None) for name, pair in layers)
    else:
        yield replace(adapter, layers=dict(layers), init_seed=None)


def _changes(adapter: AdapterWeights, factor: FactorName) -> Changes:
    """What training made of a factor: A - A0, and B transposed (rows of one component lie together)."""

    def change(name: str) -> NDArray[np.float32]:
        pair = adapter.layers[name]
        if factor == "b":
            return np.ascontiguousarray(pair.b.T, dtype=np.float32)
        start = adapter.start(name)
        return pair.a.astype(np.float32) if start is None else pair.a.astype(np.float32) - start

    return change


def _importance(
    whole: AdapterWeights, left: AdapterWeights, recipe: Recipe, calibration: Calibration | None
) -> dict[str, Importance]:
    """By layer, what numbers count beyond their magnitude; empty where magnitude is all."""
    if recipe.prune is None or recipe.prune.metric == "weights":
        return {}
    grams, metric = grams_for(whole, recipe.prune.metric, calibration), recipe.prune.metric
    return {name: importance(whole.layers[name], pair, grams[name], metric) for name, pair in left.layers.items()}


def _pack(
    adapter: AdapterWeights, factor: FactorName, recipe: Recipe, counts: Mapping[str, Importance], parts: _Parts
) -> None:
    """Add a factor of all layers to the parts."""
    change, prune, which = _changes(adapter, factor), recipe.prune, FACTORS.index(factor)

    def score(name: str, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        return numbers * counts[name][which] if counts else numbers

    cuts: dict[str, float] = {}
    if prune is not None:
        density = (prune.density_a, prune.density_b)[which]
        cuts = thresholds(adapter.layers, lambda n: score(n, change(n)), density, prune.scope, prune.weights)
    for name in adapter.layers:
        values = change(name)
        if prune is not None:
            mask = keep_mask(score(name, values), cuts[name])
            rescale, power = ((prune.rescale_a, prune.power_a), (prune.rescale_b, prune.power_b))[which]
            if power:
                rescale *= kept_energy(score(name, values), mask) ** -power
            values = values[mask] * np.float32(rescale)
            parts.masks.append(np.packbits(mask))
        values = values.ravel()
        exponent = unit_exponent(values)
        packed, scales = encode(np.ldexp(values, -exponent), recipe.codec, recipe.group)
        parts.values.append(packed)
        parts.scales.append(scales)
        parts.kept.append(values.size)
        parts.exps.append(exponent)
