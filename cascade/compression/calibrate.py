"""What an adapter's components do on real examples: the second moments that measured metrics of truncation need.

For each layer z = A x is what the adapter's components see of a token, and dL/dz what the loss makes of what they
say. Both live in as few dimensions as the adapter has ranks, so their moments are small at any width of the model. Of
the layer's own input and output, which pruning asks for, mean squares are enough.
One pass forward and backward over a few dozen examples is enough; the model is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cascade.compression.adapter import AdapterWeights, LoraPair
from cascade.compression.truncate import Calibration, Grams
from cascade.errors import DataError
from cascade.training.loop import TargetLoss
from cascade.training.packing import Row


class _Meter:
    """Adds one layer's share of the adapter to its output and sums up the moments of z and dL/dz."""

    def __init__(self, pair: LoraPair, scaling: float, weight: torch.Tensor) -> None:
        self.a = torch.tensor(pair.a, dtype=weight.dtype, device=weight.device)
        self.b = torch.tensor(pair.b * scaling, dtype=weight.dtype, device=weight.device)
        self.inputs = torch.zeros(pair.rank, pair.rank, device=weight.device)
        self.outputs = torch.zeros_like(self.inputs)
        self.effects, self.features = (torch.zeros(n, device=weight.device) for n in weight.shape)

    def hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(args[0], self.a)
        if not low.requires_grad:  # the first layers see the embeddings, which need no gradient
            low.requires_grad_()
        self._add(self.inputs, low.detach())
        self._add_squares(self.features, args[0].detach())
        low.register_hook(lambda gradient: self._add(self.outputs, gradient))
        changed = output + nn.functional.linear(low, self.b)
        changed.register_hook(lambda gradient: self._add_squares(self.effects, gradient))
        return changed

    @staticmethod
    def _add(moment: torch.Tensor, values: torch.Tensor) -> None:
        flat = values.reshape(-1, values.shape[-1]).float()
        moment.addmm_(flat.T, flat)

    @staticmethod
    def _add_squares(squares: torch.Tensor, values: torch.Tensor) -> None:
        squares += values.reshape(-1, values.shape[-1]).float().square().sum(0)

    def grams(self, tokens: int) -> Grams:
        measured = (self.inputs, self.outputs, self.features, self.effects)
        return Grams(*((moment / tokens).cpu().numpy() for moment in measured))


def calibrate(model: nn.Module, adapter: AdapterWeights, rows: Sequence[Row]) -> Calibration:
    """Measure an adapter on examples, which should be ones that it was trained on.

    Args:
        model: the bare base (no slot filled), on any device, gradients off.
        rows: packed examples; their target tokens make the loss.

    Raises:
        DataError: there is no target to measure on, or the model lacks one of the adapter's layers.
    """
    if not sum(row.targets for row in rows):
        raise DataError("calibration needs examples with something to learn")
    modules = dict(model.named_modules())
    missing = [name for name in adapter.layers if not isinstance(modules.get(name), nn.Linear)]
    if missing:
        raise DataError(f"the model has no linear layer {missing[0]}: the adapter was made for another base")
    meters, handles = {}, []
    loss = TargetLoss(model)
    try:
        for name, pair in adapter.layers.items():
            layer = modules[name]
            assert isinstance(layer, nn.Linear)
            meters[name] = _Meter(pair, adapter.scaling, layer.weight)
            handles.append(layer.register_forward_hook(meters[name].hook))
        device = next(model.parameters()).device
        with torch.enable_grad():
            for row in rows:
                loss(**row.tensors(device)).backward()
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(row.tokens for row in rows)
    return {name: meter.grams(tokens) for name, meter in meters.items()}
