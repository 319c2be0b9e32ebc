"""One autograd function for a linear layer with its LoRA, in place of the eight operations that autograd strings up.

y = x Wᵀ + s (x Aᵀ) Bᵀ. The low-rank product is added into the layer's own output, and its gradient into dx, so that
no tensor of the layer's size is made, scaled or added apart; x is kept once, not once in each dtype; A and B, which
may be float32, are multiplied in x's dtype. Where the layer has weights of few bits, x Wᵀ and its gradient are its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cascade.training.pissa import START, factors

torch.library.define("cascade::two_products", "(Tensor x, Tensor w, Tensor low, Tensor v, Tensor? bias=None) -> Tensor")


@torch.library.impl("cascade::two_products", "CompositeExplicitAutograd")
def two_products(
    x: torch.Tensor, w: torch.Tensor, low: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x w (+ bias) + low v, the second product added into what the first made.

    As an operator of its own torch.compile leaves it alone: of `addmm_` it makes an `addmm` that first copies the first
    product, a tensor of the layer's size. (`torch.library.custom_op` would define it in a line less, and take five
    times as long a call.)

    Args:
        x: shape (tokens, in). w: (in, out). low: (tokens, rank). v: (rank, out). bias: (out,).

    Returns:
        Shape (tokens, out).
    """
    first = x @ w if bias is None else torch.addmm(bias, x, w)
    return first.addmm_(low, v)


@torch.library.register_fake("cascade::two_products")
def _(
    x: torch.Tensor, w: torch.Tensor, low: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


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
        out: torch.Tensor = torch.ops.cascade.two_products(flat, weight.T, hidden, scaled.T, bias)
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
            x_gradient = torch.ops.cascade.two_products(out, weight, back, low).view(ctx.shape)
        return x_gradient, None, None, *_factor_gradients(ctx, out, back, flat, hidden), None


class LowRankAddition(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ, where y is what a layer makes of x by itself; gradients to y, x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, scaling: float, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            x: shape (…, in). y: (…, out). a: (rank, in). b: (out, rank).
        """
        flat = x.reshape(-1, x.shape[-1])
        low, scaled = a.to(x.dtype), (b * scaling).to(x.dtype)
        hidden = flat @ low.T
        ctx.save_for_backward(flat, low, scaled, hidden)
        ctx.scaling, ctx.dtypes, ctx.shape = scaling, (a.dtype, b.dtype), x.shape
        return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, scaled.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, low, scaled, hidden = ctx.saved_tensors
        out = gradients[0].reshape(-1, gradients[0].shape[-1])
        back = out @ scaled
        x_gradient = (back @ low).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return x_gradient, gradients[0], None, *_factor_gradients(ctx, out, back, flat, hidden)


def _factor_gradients(
    ctx: Any, out: torch.Tensor, back: torch.Tensor, flat: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of A and B, the fourth and fifth arguments of either function.

    Args:
        out: gradient of the output, shape (tokens, out). back: the same times s B, shape (tokens, rank).
    """
    a = (back.T @ flat).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
    b = (out.T @ hidden).to(ctx.dtypes[1]) * ctx.scaling if ctx.needs_input_grad[4] else None
    return a, b


class _Fused:
    """Before one of PEFT's classes of layers: its forward pass through the functions above.

    A class, not a `forward` of each layer's own: torch.compile takes that for another program in every layer, compiles
    the first eight and leaves the others as they are.
    """

    def forward(self: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """x: shape (…, in). Returns shape (…, out)."""
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged or more or named:
            plain: torch.Tensor = super().forward(x, *more, **named)  # type: ignore[misc]
            return plain
        name = self.active_adapters[0]
        base = self.get_base_layer()
        a, b = factors(self, name)
        if START in self.lora_A:
            start_a, start_b = factors(self, START)
            a, b = torch.cat([a, start_a]), torch.cat([b, -start_b], 1)
        if type(base) is nn.Linear:
            out: torch.Tensor = LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        else:
            out = LowRankAddition.apply(x, base(x), self.scaling[name], a, b)
        return out


@cache
def _fused(plain: type[LoraLayer]) -> type[LoraLayer]:
    return type(f"Fused{plain.__name__}", (_Fused, plain), {})


def fuse_lora(model: nn.Module) -> None:
    """Let a PEFT model's plain LoRA layers train through these functions; without gradients they compute as before."""
    if not isinstance(model, PeftModel):
        return
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            fused: Any = _fused(type(layer))
            layer.__class__ = fused


def compile_layers(model: nn.Module, backend: Any = "inductor") -> None:
    """Let torch.compile join a model's decoder layers into fewer kernels: once, for all layers and lengths of rows.

    Worth its minute of compiling on a GPU. Around generation, whose calls differ, use
    `torch.compiler.set_stance("force_eager")`.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True, backend=backend)


def _is_plain(layer: LoraLayer) -> bool:
    whole = type(layer) is LoraLinear and type(layer.get_base_layer()) is nn.Linear and not layer.fan_in_fan_out
    few_bits = type(layer).__module__ == "peft.tuners.lora.bnb"  # which is empty where bitsandbytes is not installed
    name = next(iter(layer.lora_A), "")
    return bool(
        name
        and (whole or few_bits)
        and list(layer.active_adapters) in ([name], [name, START])
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )
