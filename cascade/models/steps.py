"""One more token of every row, computed without the modules around a model's arithmetic.

On a CPU, a step of a small model is bound by the calls that lead to its kernels: some 5,000 of Python's, hooks and
views included, for 30 layers. Decoders of Llama's kind are simple enough to be written out. The numbers are those of
the model's own `forward`, but for the order of a few roundings; prompts are still computed by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, rms_norm, silu
from transformers import LlamaForCausalLM, PreTrainedModel

from cascade.models.attention import additive, attention, one_query
from cascade.models.caches import RowCache, Shared
from cascade.models.int8 import Int8Linear

_PLAIN = (nn.Linear, Int8Linear)
"""Linear layers whose forward is all that there is to them, besides hooks."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules of one layer that hold numbers."""

    attention_norm: Any
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    attention: nn.Module
    mlp_norm: Any
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class LlamaSteps:
    """Steps of a Llama-like model. Adapters that hang on its linear layers as forward hooks take part.

    Attributes:
        few_as_one: whether a few tokens take little longer than one.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._layers = [
            _Layer(
                layer.input_layernorm,
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.self_attn.o_proj,
                layer.self_attn,
                layer.post_attention_layernorm,
                layer.mlp.gate_proj,
                layer.mlp.up_proj,
                layer.mlp.down_proj,
            )
            for layer in model.model.layers
        ]
        attention: Any = self._layers[0].attention
        self._width: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._heads: int = model.config.num_attention_heads
        self._key_heads = int(model.config.num_key_value_heads or self._heads)
        self.few_as_one = isinstance(model.lm_head, Int8Linear)

    @classmethod
    def of(cls, model: PreTrainedModel) -> LlamaSteps | None:
        """Steps of a model that is of this kind, else None."""
        if type(model) is LlamaForCausalLM and model.config.hidden_act == "silu":
            return cls(model)
        return None

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: RowCache, shared: Shared | None
    ) -> torch.Tensor:
        """Logits of the next token, shape (rows, vocabulary). Extends the cache.

        Args:
            ids, positions: shape (rows, 1); or (1, tokens) for several tokens of one row without a shared beginning,
                and logits after each.
            mask: True where a token is seen, shape (rows, tokens of the cache and the first new one).
        """
        core, rows, several = self._model.model, ids.numel(), ids.shape[1] > 1
        hidden = core.embed_tokens(ids.view(-1))
        cos, sin = self._turn(hidden, positions.view(-1, 1))
        bias = _bias(mask, hidden.dtype)
        for layer, cached in zip(self._layers, cache.row_layers, strict=True):
            query, key, value = self._states(layer, _normed(layer.attention_norm, hidden), cos, sin)
            if several:
                key, value = key.transpose(0, 2), value.transpose(0, 2)
            keys, values = cached.update(key, value)
            query = query.view(rows, self._heads, 1, self._width)
            if several:
                found = self._one_by_one(query, keys, values, bias)
            elif shared is None:
                found = one_query(query, keys, values, bias, self._scaling)
            else:
                seen = mask[:, None, None]
                found, _ = attention(layer.attention, query, keys, values, seen, self._scaling, shared)
            hidden = hidden + _linear(layer.output, found.reshape(rows, -1))
            normed = _normed(layer.mlp_norm, hidden)
            gated = silu(_linear(layer.gate, normed)).mul_(_linear(layer.up, normed))
            hidden = hidden + _linear(layer.down, gated)
        return _linear(self._model.lm_head, _normed(core.norm, hidden)).float()

    def _one_by_one(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of the last tokens of one row, each to those up to it, as if it were computed alone: with others'
        keys masked instead, sums would be rounded otherwise, and answers depend on what was guessed."""
        before, found = keys.shape[2] - len(query), []
        for place in range(1, len(query) + 1):
            seen = before + place
            more = None if bias is None else pad(bias, (0, place - 1))
            one = query[place - 1 : place]
            found.append(one_query(one, keys[:, :, :seen], values[:, :, :seen], more, self._scaling))
        return torch.cat(found)

    def _turn(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding, shape (rows, 1, width); the first half of the sines is negated."""
        cos, sin = self._model.model.rotary_emb(hidden, positions)
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def _states(
        self, layer: _Layer, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of shape (rows, heads, width), keys and values of shape (rows, key heads, 1, width)."""
        rows, width = len(normed), self._width
        both = torch.cat([_linear(layer.query, normed), _linear(layer.key, normed)], dim=1).view(rows, -1, width)
        turned = torch.addcmul(both * cos, both.roll(width // 2, -1), sin)
        value = _linear(layer.value, normed).view(rows, self._key_heads, 1, width)
        return turned[:, : self._heads], turned[:, self._heads :, None], value


def _linear(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A linear layer with what hangs on it; another module in its place is called."""
    if type(module) not in _PLAIN:
        return module(rows)  # type: ignore[no-any-return]
    output = module.forward(rows)
    for hook in module._forward_hooks.values():
        changed = hook(module, (rows,), output)
        output = output if changed is None else changed
    return output


def _normed(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    return rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores, shape (rows, 1, 1, tokens); None where every token is seen."""
    if mask.all():
        return None
    return additive(mask, dtype)[:, None, None]
