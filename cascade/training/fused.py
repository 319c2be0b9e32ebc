"""One autograd function for a linear layer with its LoRA, in place of the eight operations that autograd strings up.

y = x Wᵀ + s (x Aᵀ) Bᵀ. The low-rank product is added into the layer's own output, and its gradient into dx, so that
no tensor of the layer's size is made, scaled or added apart; x is kept once, not once in each dtype; A and B, which
may be float32, are multiplied in x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cascade.training.pissa import START, factors


class LoraProduct(torch.autograd.Function):
    """x Wᵀ (+ bias) + s (x Aᵀ) Bᵀ; gradients to x, A and B, none to the frozen W and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            x: shape (…, in). weight: (out, in). bias: (out,) or None. a: (rank, in). b: (out, rank).
        """
        flat = x.reshape(-1, x.shape[-1])
        low, scaled = a.to(x.dtype), (b * scaling).to(x.dtype)
        hidden = flat @ low.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(hidden, scaled.T)
        ctx.save_for_backward(flat, weight, low, scaled, hidden)
        ctx.scaling, ctx.dtypes, ctx.shape = scaling, (a.dtype, b.dtype), x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, low, scaled, hidden = ctx.saved_tensors
        out = gradients[0].reshape(-1, gradients[0].shape[-1])
        back = out @ scaled
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (out @ weight).addmm_(back, low).view(ctx.shape)
        a_gradient = (back.T @ flat).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
        b_gradient = (out.T @ hidden).to(ctx.dtypes[1]) * ctx.scaling if ctx.needs_input_grad[4] else None
        return x_gradient, None, None, a_gradient, b_gradient, None


class FusedLoraLinear(LoraLinear):
    """PEFT's layer with the forward pass of `LoraProduct`.

    A class, not a `forward` of each layer's own: torch.compile takes that for another program in every layer, compiles
    the first eight and leaves the others as they are.
    """

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """x: shape (…, in). Returns shape (…, out)."""
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged or more or named:
            plain: torch.Tensor = super().forward(x, *more, **named)
            return plain
        name = self.active_adapters[0]
        base = self.get_base_layer()
        a, b = factors(self, name)
        if START in self.lora_A:
            start_a, start_b = factors(self, START)
            a, b = torch.cat([a, start_a]), torch.cat([b, -start_b], 1)
        out: torch.Tensor = LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return out


def fuse_lora(model: nn.Module) -> None:
    """Let a PEFT model's plain LoRA layers train through `LoraProduct`; without gradients they compute as before."""
    if not isinstance(model, PeftModel):
        return
    for layer in model.modules():
        if type(layer) is LoraLinear and not layer.fan_in_fan_out and _is_plain(layer):
            layer.__class__ = FusedLoraLinear


def compile_layers(model: nn.Module, backend: Any = "inductor") -> None:
    """Let torch.compile join a model's decoder layers into fewer kernels: once, for all layers and lengths of rows.

    Worth its minute of compiling on a GPU. Around generation, whose calls differ, use
    `torch.compiler.set_stance("force_eager")`.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True, backend=backend)


def _is_plain(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    name = next(iter(layer.lora_A), "")
    return bool(
        name
        and type(base) is nn.Linear
        and list(layer.active_adapters) in ([name], [name, START])
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )
