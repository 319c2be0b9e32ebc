"""A base whose weights are held in 8 bits: half of bfloat16's memory, and half the bytes to read for each token.

Every row of a weight (an output of a linear layer, a token of an embedding) is whole numbers from -127 to 127 and one
scale. Rows of activations, in bfloat16, are multiplied with the whole numbers, summed in float32, rounded to bfloat16,
and then scaled. The whole numbers are exact in bfloat16 too, so this is one arithmetic computed in two ways: a few rows
by a kernel that reads the 8 bits, many by bringing a part of the weight at a time to bfloat16, which PyTorch multiplies
faster from some rows on. What a row comes to does not depend on how many are beside it, but for the order of sums.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

BLOCK = 16
"""Inputs that the kernel for a few rows reads at once; it must not be given any other number of them."""
_TOGETHER = 4
"""Rows that it computes in one pass over the weight."""
_PASSES = 4
"""Passes that take less time than bringing the weight to bfloat16 does: half of it for two, about as long for five."""
_SMALL = 2**18
"""Numbers of a weight, times passes, up to which further passes take less time than another kernel's start."""
_PART = 2**20
"""Numbers of a weight that are brought to bfloat16 at a time: 2 MB, which stay in a core's caches."""


def product(rows: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of shape (…, inputs), bfloat16, times a weight in 8 bits: (…, outputs).

    Args:
        levels: int8, (outputs, inputs).
        scales: of each output, bfloat16; None: all are 1.
    """
    outputs, inputs = levels.shape
    if rows.dim() == 2 and len(rows) <= _TOGETHER and inputs % BLOCK == 0:  # a step's: views of views take their time
        found = torch._weight_int8pack_mm(rows.contiguous(), levels, _ones(outputs))
        return found if scales is None else found.mul_(scales)
    flat = rows.reshape(-1, inputs)
    passes = -(-len(flat) // _TOGETHER)
    if inputs % BLOCK == 0 and (passes <= _PASSES or passes * levels.numel() <= _SMALL):
        # It would scale before it rounds, which the other way cannot.
        found = torch._weight_int8pack_mm(flat.contiguous(), levels, _ones(outputs))
    else:
        found = _in_parts(flat, levels)
    return (found if scales is None else found.mul_(scales)).view(*rows.shape[:-1], outputs)


def _in_parts(rows: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    outputs, inputs = levels.shape
    step = max(_PART // inputs, 1)
    if step >= outputs:
        return linear(rows, levels.to(rows.dtype))
    found = rows.new_empty(len(rows), outputs)
    for start in range(0, outputs, step):
        found[:, start : start + step] = linear(rows, levels[start : start + step].to(rows.dtype))
    return found


@cache
def _ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bfloat16)


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and scales of a weight of shape (outputs, inputs); the levels go with the scales as they are held."""
    exact = weight.detach().float()
    scales = (exact.abs().amax(1) / 127).bfloat16()
    levels = (exact / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return levels.to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer in 8 bits; see `product`.

    Attributes:
        weight: levels.
    """

    def __init__(self, weight: nn.Parameter, scales: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scales, self.bias = weight, scales, bias

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """A layer in bfloat16, rounded."""
        return cls(*_held(layer.weight), layer.bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output = product(rows, self.weight, self.scales)
        return output if self.bias is None else output.add_(self.bias)


class Int8Embedding(nn.Module):
    """An embedding in 8 bits: token ids to vectors in bfloat16.

    Attributes:
        weight: levels, int8, (tokens, width).
        scales: of each token, bfloat16.
    """

    def __init__(self, weight: nn.Parameter, scales: nn.Parameter) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.scales = weight, scales

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].to(self.scales.dtype).mul_(self.scales[ids].unsqueeze(-1))


def hold_in_int8(model: PreTrainedModel) -> None:
    """Bring a model in bfloat16 to 8 bits, layer by layer, in place: its linear layers and the embedding of its tokens.

    A head that is tied to the embedding stays so. Norms and biases stay as they are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding:
        held = _held(embedding.weight)
        if type(head) is nn.Linear and head.weight is embedding.weight:
            model.set_output_embeddings(Int8Linear(*held, head.bias))
        model.set_input_embeddings(Int8Embedding(*held))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear.of(module))


def _held(weight: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    levels, scales = rounded(weight)
    return nn.Parameter(levels, requires_grad=False), nn.Parameter(scales, requires_grad=False)
