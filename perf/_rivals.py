"""What a user would otherwise pick to make an adapter small, at a given number of bytes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from peft import PeftModel, convert_to_lora

from cascade.compression.adapter import AdapterWeights, LoraPair, fp16_bytes, save_peft_folder
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress, expand
from cascade.models.base import LoadedBase
from cascade.training.lora import remove_lora


@dataclass(frozen=True)
class Candidate:
    """A compressed adapter as it would be used.

    Attributes:
        adapter: what a slot is filled with.
        disk_bytes, resident_bytes: what the method's file weighs and what serving holds of it.
    """

    adapter: AdapterWeights | CompressedAdapter
    disk_bytes: int
    resident_bytes: int


def magnitude(adapter: AdapterWeights, limit: int) -> Candidate:
    """Prune A and B themselves by magnitude, one threshold for each; kept numbers in fp16.

    The mask is counted at its entropy, or a bit per number where that is less: better than any tool stores it.
    """
    bits = 8 * limit / adapter.parameters
    density = _solve(lambda d: min(1.0, _entropy(d)) + 16 * d, bits)
    cut = {f: _quantile([getattr(p, f) for p in adapter.layers.values()], density) for f in ("a", "b")}
    layers = {
        n: LoraPair(*(np.where(np.abs(x) >= cut[f], x, 0).astype(np.float16) for f, x in (("a", p.a), ("b", p.b))))
        for n, p in adapter.layers.items()
    }
    return Candidate(replace(adapter, layers=layers, init_seed=None), limit, fp16_bytes(adapter))


def peft_svd(adapter: AdapterWeights, limit: int, loaded: LoadedBase, folder: Path) -> Candidate:
    """PEFT's own conversion of a LoRA to one of smaller rank (`peft.convert_to_lora`), in fp16."""
    rank = max(1, int(limit / fp16_bytes(adapter) * adapter.rank))
    model = PeftModel.from_pretrained(loaded.model, save_peft_folder(adapter, folder / "whole"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, state = convert_to_lora(model, rank=rank)
    finally:
        remove_lora(model)
        loaded.model.requires_grad_(False)
    layers = {}
    for key in [k for k in state if ".lora_A." in k]:
        name = key.split("base_model.model.")[-1].split(".lora_A")[0]
        a, b = (state[k].float().cpu().numpy() for k in (key, key.replace(".lora_A.", ".lora_B.")))
        layers[name] = LoraPair(a.astype(np.float16), b.astype(np.float16))
    small = replace(adapter, layers=layers, rank=rank, scaling=float(config.lora_alpha) / config.r, init_seed=None)
    return Candidate(small, fp16_bytes(small), fp16_bytes(small))


COMPEFT_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
COMPEFT_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def compeft(adapter: AdapterWeights, limit: int, loss: Callable[[AdapterWeights], float]) -> Candidate:
    """ComPEFT (Yadav et al., arXiv:2311.13171): the signs of the largest changes times one scale, Golomb-coded.

    The change is that from A's start, as in the paper, where the start is known. The share of numbers that is kept
    is the largest of the paper's that fits; the scale is alpha times the standard deviation of the change, alpha
    chosen from the paper's values by validation loss.
    """
    starts = {n: s if (s := adapter.start(n)) is not None else np.float32(0) for n in adapter.layers}
    changes = {n: (p.a.astype(np.float32) - starts[n], p.b.astype(np.float32)) for n, p in adapter.layers.items()}
    fitting = [d for d in COMPEFT_DENSITIES if golomb_bits(d) * adapter.parameters + 16 <= 8 * limit]
    density = max(fitting, default=COMPEFT_DENSITIES[0])
    both = [x for pair in changes.values() for x in pair]
    cut = _quantile(both, density)
    spread = float(np.std(np.concatenate([x.ravel() for x in both])))

    def build(alpha: float) -> AdapterWeights:
        scale = np.float32(alpha * spread)
        layers = {
            n: LoraPair(*(scale * np.sign(x) * (np.abs(x) >= cut) + y for x, y in ((a, starts[n]), (b, np.float32(0)))))
            for n, (a, b) in changes.items()
        }
        return replace(adapter, layers=layers)

    chosen = min((build(alpha) for alpha in COMPEFT_SCALES), key=loss)
    size = math.ceil((golomb_bits(density) * adapter.parameters + 16) / 8)
    return Candidate(chosen, size, fp16_bytes(adapter))


def golomb_bits(density: float) -> float:
    """Bits per number, kept or not, of Golomb-coded gaps and a sign for each kept one (the paper's formula)."""
    golden = (math.sqrt(5) + 1) / 2
    b = max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - density))))
    return density * (b + 1 / (1 - (1 - density) ** (2**b)) + 1)


def dense_int4(adapter: AdapterWeights) -> Candidate:
    """All numbers of A and B in 4 bits, groups of 64 with an fp16 scale, at whatever that weighs."""
    packed = compress(replace(adapter, init_seed=None), Recipe(values="int4"))
    size = packed.a.values.size + packed.b.values.size + packed.a.scales.nbytes + packed.b.scales.nbytes
    return Candidate(expand(packed), size, size)


def _entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share) if 0 < share < 1 else 0.0


def _solve(cost: Callable[[float], float], budget: float) -> float:
    """The largest density whose cost is within the budget."""
    low, high = 1e-4, 0.999
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _quantile(arrays: list[np.ndarray], density: float) -> float:
    """The magnitude above which a share `density` of all numbers lies."""
    flat = np.abs(np.concatenate([x.ravel() for x in arrays])).astype(np.float32)
    at = flat.size - max(1, round(density * flat.size))
    return float(np.partition(flat, at)[at])
