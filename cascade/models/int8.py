"""A base whose weights are held in 8 bits: half of bfloat16's memory, and half the bytes to read for each token.

Every row of a weight (an output of a linear layer, a token of an embedding) is whole numbers from -127 to 127 and one
scale. Rows of activations, in bfloat16, are multiplied with the whole numbers, summed in float32, rounded to bfloat16,
and then scaled. The whole numbers are exact in bfloat16 too, so this is one arithmetic computed in two ways: a few rows
by a kernel that reads the 8 bits, many by bringing a part of the weight at a time to bfloat16, which PyTorch multiplies
faster from some rows on. What a row comes to does not depend on how many are beside it, but for the order of sums.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

_FEW = 4
"""Rows up to which the 8 bits are read as they are: as many as the kernel for this computes together."""
_BLOCK = 16
"""Inputs that it reads at once; it must not be given any other number of them."""
_PART = 2**20
"""Numbers of a weight that are brought to bfloat16 at a time: 2 MB, which stay in a core's caches."""


class Int8Linear(nn.Module):
    """A linear layer in 8 bits. Rows of shape (…, in_features), bfloat16, to (…, out_features).

    Attributes:
        weight: levels, int8, (out_features, in_features).
        scales: of each output, bfloat16.
    """

    def __init__(self, weight: nn.Parameter, scales: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scales, self.bias = weight, scales, bias
        self._ones = torch.ones_like(scales)  # scaling comes after rounding, in both ways

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """A layer in bfloat16, rounded."""
        return cls(*_rounded(layer.weight), layer.bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        if len(flat) <= _FEW and self.in_features % _BLOCK == 0:
            output = torch._weight_int8pack_mm(flat.contiguous(), self.weight, self._ones)
        else:
            output = self._many(flat)
        output.mul_(self.scales)
        if self.bias is not None:
            output += self.bias
        return output.view(*rows.shape[:-1], self.out_features)

    def _many(self, rows: torch.Tensor) -> torch.Tensor:
        step = max(_PART // self.in_features, 1)
        if step >= self.out_features:
            return linear(rows, self.weight.to(rows.dtype))
        output = rows.new_empty(len(rows), self.out_features)
        for start in range(0, self.out_features, step):
            part = self.weight[start : start + step].to(rows.dtype)
            output[:, start : start + step] = linear(rows, part)
        return output


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
        held = _rounded(embedding.weight)
        if type(head) is nn.Linear and head.weight is embedding.weight:
            model.set_output_embeddings(Int8Linear(*held, head.bias))
        model.set_input_embeddings(Int8Embedding(*held))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear.of(module))


def _rounded(weight: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Levels, and scales in the weight's own type; the levels go with the scales as they are held."""
    exact = weight.detach().float()
    scales = (exact.abs().amax(1) / 127).to(weight.dtype)
    levels = (exact / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return nn.Parameter(levels.to(torch.int8), requires_grad=False), nn.Parameter(scales, requires_grad=False)
