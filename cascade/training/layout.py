"""How a packed row is laid out for the model: what it computes at least, on the device that it runs on.

Three layouts give the same losses (a test holds each to the example alone):

- plain: tokens and positions; transformers makes the block-diagonal mask of the positions. Any model.
- shared: on the CPU. Where all examples of a row begin alike (the system message, worked examples), that prefix is
  computed once and every example attends to it; attention is computed example by example.
- varlen: on CUDA in half precision. Torch's flash attention for sequences of different lengths.

The work of the last two grows with each example's length squared instead of the row's. In both an example's last
token, which only ever is a target, is no input.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from cascade.models import attention
from cascade.training.packing import Row, model_input

Layout = Callable[[Row, torch.device], dict[str, Any]]
"""A row as keyword arguments of `cascade.training.loop.TargetLoss.forward`."""

SHORTEST_PREFIX = 8
"""Common tokens from which on a prefix is shared."""


def layout_for(model: nn.Module) -> Layout:
    """The fastest layout that a causal LM can take, with or without an adapter around it.

    May set the model's attention to ours, which is `sdpa` for everything that is neither a packed row nor behind a
    shared prefix in generation.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, PreTrainedModel):
        attention.enable_sharing(inner)
    if not attention.can_share(inner):
        return plain
    first = next(inner.parameters())
    if first.device.type != "cuda":
        return shared
    return varlen if _has_varlen(first, inner.config) else plain


def most_tokens(layout: Layout) -> int | None:
    """How many tokens a row has at most where the config does not say; None: no more than an example may have."""
    most: dict[Layout, int] = {shared: 1024, varlen: 16_384}
    return most.get(layout)


def _has_varlen(weight: torch.Tensor, config: Any) -> bool:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return half and head <= 256 and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def plain(row: Row, device: torch.device) -> dict[str, torch.Tensor]:
    """Tokens with positions of their own."""
    return row.tensors(device)


def shared(row: Row, device: torch.device) -> dict[str, Any]:
    """The examples' common prefix once, then what follows it in each."""
    prefix = common_prefix(row)
    if prefix < SHORTEST_PREFIX:
        prefix = 0
    ids, positions = [row.examples[0].ids[:prefix]], [np.arange(prefix)]
    index, targets, starts = [], [], [prefix]
    for example in row.examples:
        own = len(example) - 1 - prefix
        ids.append(example.ids[prefix:-1])
        positions.append(np.arange(prefix, prefix + own))
        asked = example.asked
        # The first learned token may follow the last one of the prefix, which all examples share.
        index.append(np.where(asked >= prefix, asked - prefix + starts[-1], asked))
        targets.append(example.ids[asked + 1])
        starts.append(starts[-1] + own)
    return {
        **model_input(device, ids, positions, index, targets),
        "starts": tuple(starts),
        "attention_mask": _unused_mask(device),
    }


def common_prefix(row: Row) -> int:
    """How many tokens all examples of a row begin with alike, none of them learned in any; 0 for one example."""
    if len(row.examples) < 2:
        return 0
    first = row.examples[0]
    limit = min(e.is_target.index(True) for e in row.examples)
    for other in row.examples[1:]:
        pairs = zip(first.input_ids[:limit], other.input_ids[:limit], strict=True)
        limit = next((i for i, (a, b) in enumerate(pairs) if a != b), limit)
    return limit


def varlen(row: Row, device: torch.device) -> dict[str, Any]:
    """One example behind the other, with the places where they begin."""
    examples = row.examples
    lengths = np.array([len(e) - 1 for e in examples])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    asked = [e.asked for e in examples]
    bounds = torch.from_numpy(starts.astype(np.int32)).to(device)
    longest = 1 << int(lengths.max() - 1).bit_length()  # few values, so that compiled code is seldom compiled anew
    return {
        **model_input(
            device,
            [e.ids[:-1] for e in examples],
            [np.arange(n) for n in lengths],
            [at + start for at, start in zip(asked, starts[:-1], strict=True)],
            [e.ids[at + 1] for e, at in zip(examples, asked, strict=True)],
        ),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "attention_mask": _unused_mask(device),
    }


def _unused_mask(device: torch.device) -> torch.Tensor:
    """Transformers hands a mask of four dimensions on as it is; without one it would make its own of the positions."""
    return torch.empty(1, 1, 0, 0, device=device)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    starts: tuple[int, ...] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention within each example of a row, in the shape of transformers' attention functions.

    Args:
        query: shape (1, heads, tokens, head size); key and value with as many heads or a divisor of that.
        starts: where examples begin and where the last one ends; what lies before the first is everyone's prefix.
        cu_seq_lens_q: the same without a prefix, int32 of shape (examples + 1,), for CUDA.
        max_length_q: with `cu_seq_lens_q`, at least the longest example's length.

    Returns:
        Shape (1, tokens, heads, head size), and None for the weights. Without boundaries, as when the model
        generates, it is `cascade.models.attention`.
    """
    if starts is None and cu_seq_lens_q is None:
        return attention.attention(module, query, key, value, attention_mask, scaling=scaling, **more)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if starts is not None:
        return _by_example(query, key, value, starts, scaling), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    bounds: Any = cu_seq_lens_q
    out: Any = varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0))
    return out[None], None


def _by_example(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: tuple[int, ...], scaling: float | None
) -> torch.Tensor:
    """Attention of each example to the prefix and to itself.

    In float32: torch's CPU kernel is four times slower in bfloat16 at these sizes, and builds code for each new length.
    """
    dtype, prefix = query.dtype, starts[0]
    query, key, value = query.float(), key.float(), value.float()
    lengths = [prefix] * (prefix > 0) + [end - start for start, end in itertools.pairwise(starts)]
    q, k, v = (t.split(lengths, dim=2) for t in (query, key, value))
    attend = nn.functional.scaled_dot_product_attention
    if not prefix:
        parts = [attend(*qkv, is_causal=True, scale=scaling) for qkv in zip(q, k, v, strict=True)]
    else:
        parts = [attend(q[0], k[0], v[0], is_causal=True, scale=scaling)]
        longest = max(lengths[1:])
        seen = torch.ones(longest, prefix + longest, dtype=torch.bool, device=query.device).tril_(prefix)
        for i in range(1, len(lengths)):
            keys, values = torch.cat([k[0], k[i]], 2), torch.cat([v[0], v[i]], 2)
            mask = seen[: lengths[i], : prefix + lengths[i]]
            parts.append(attend(q[i], keys, values, attn_mask=mask, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2).to(dtype)


# One name for both, so that a model trains and generates without being switched.
AttentionInterface.register(attention.NAME, packed_attention)
