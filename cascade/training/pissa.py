"""PiSSA: A and B start as the first singular vectors of the weight they stand beside.

What they start as is taken off again by a second adapter, frozen and of negative scale, instead of off the weight: the
same function, while the base keeps its numbers, no type rounds them anew, and processes may go on sharing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

START = "start"
"""PEFT's name of the adapter that takes the start off again."""


def add_start(model: PeftModel, layers: Mapping[str, LoraLayer]) -> None:
    """Start the model's adapter by PEFT's PiSSA and add the frozen one, after which nothing is changed yet."""
    model.add_adapter(START, model.peft_config["default"])
    tuner: Any = model.base_model
    tuner.set_adapter(["default", START])
    for layer in layers.values():
        _start(layer)


def _start(layer: LoraLayer) -> None:
    """A layer with fewer singular vectors than the rank has zeros in the place of those that are missing."""
    weight = layer.get_base_layer().weight
    kept = weight.data
    layer.pissa_init("default", "pissa")  # puts a new tensor in the weight's place
    weight.data = kept
    for mine, start in zip(factors(layer), factors(layer, START), strict=True):
        found = mine.data
        mine.data = torch.zeros_like(start)
        # In numbers that bfloat16 holds: DeepSpeed rounds frozen parameters to it, and both must stay alike.
        mine.data[: found.shape[0], : found.shape[1]] = found.bfloat16()
        start.data.copy_(mine.data)
        start.requires_grad_(False)
    layer.scaling[START] = -layer.scaling["default"]


def factors(layer: LoraLayer, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """A, shape (rank, in), and B, shape (out, rank), of a layer as they are held."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[return-value]


def change_alone(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What training changed, B A − B0 A0, as one pair of twice the rank that fits the base as it is.

    By singular vectors: both products are nearly as large as the weight and their difference is small, so that fp16
    numbers of A, A0, B and B0 side by side, as PEFT would write them, lose a good part of it.

    Args:
        a: of the trained adapter, shape (rank, in). b: shape (out, rank).

    Returns:
        float64, shapes (2 rank, in) and (out, 2 rank).
    """
    a, b = a.detach().double(), b.detach().double()
    a0, b0 = (t.detach().to(a) for t in factors(layer, START))
    across, inner = torch.linalg.qr(torch.cat([a, a0]).T)
    down, outer = torch.linalg.qr(torch.cat([b, -b0], 1))
    u, s, v = torch.linalg.svd(outer @ inner.T)
    count, root = len(s), s.sqrt()
    whole_a, whole_b = a.new_zeros(2 * len(a), a.shape[1]), b.new_zeros(len(b), 2 * b.shape[1])
    whole_a[:count] = root[:, None] * (v[:count] @ across.T)
    whole_b[:, :count] = (down @ u[:, :count]) * root
    return whole_a, whole_b
