"""Attention to a beginning that many sequences share.

Tasks of one family begin alike: a system message, worked examples. Their keys and values are computed and kept once,
in a `Prefix`; each row of a `RowCache` holds its own tokens alone. A row's attention is that to its own tokens and
that to its prefix, put together by their log-sum-exp, which is exact ("cascade" or "bifurcated" attention, e.g.
Juravsky et al. 2024, arXiv 2402.05099). So a batch of hundreds of rows behind 1,500 shared tokens costs the memory
and the memory traffic of short rows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from cascade.models.caches import Shared

NAME = "shared_prefix"
"""As transformers knows our attention; without prefixes it is its own `sdpa`."""


def enable_sharing(model: PreTrainedModel) -> None:
    """Let a model take `shared=` in its forward, if its attention is of the plain kind; others stay as they are."""
    config = model.config.get_text_config()
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    sdpa = model.config._attn_implementation == "sdpa"
    if plain and sdpa and not capped and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(NAME)


def can_share(model: torch.nn.Module) -> bool:
    """Whether `enable_sharing` took effect on the model (or, under PEFT, on what it wraps)."""
    return getattr(getattr(model, "config", None), "_attn_implementation", "") == NAME


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    shared: Shared | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (rows, heads, queries, width) in, (rows, queries, heads, width) out."""
    if shared is None and query.is_cuda and query.shape[2] == 1 and attention_mask is not None:
        return one_query(query, key, value, attention_mask, scaling), None
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, total = _attend(query * scaling, key, value, attention_mask)
    for prefix, rows in shared.groups:
        keys, values = prefix.states[module.layer_idx]  # type: ignore[index]
        some = rows is not None and rows.dtype != torch.bool
        extra, weight = _attend_together((query[rows] if some else query) * scaling, keys, values)
        if some:
            output[rows] = _merge(output[rows], total[rows], extra, weight)
        else:
            if rows is not None:
                weight = weight.masked_fill(~rows[:, None, None, None], float("-inf"))
            output = _merge(output, total, extra, weight)
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def one_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention of one token per row, shapes as in `attention`; `mask` as PyTorch takes it, None where all is seen.

    The query heads of a key head are taken for queries of one head, so that keys and values need no copy for each (as
    transformers makes wherever there is a mask).
    """
    rows, heads, _, width = query.shape
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, 1, heads, -1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (rows, heads, queries, width), float32, and the log of the softmax's denominator (…, queries, 1).

    `query` is scaled; `mask` is True where a query sees a key, which each does at least once.
    """
    rows, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if queries == 1 or mask is None:
        query = query.reshape(rows, key.shape[1], groups * queries, width)
    else:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attend = {"cpu": _fused_on_cpu, "cuda": _fused_on_gpu}.get(query.device.type, _step_by_step)
    output, total = attend(query, key, value, mask)
    return output.reshape(rows, heads, queries, -1), total.reshape(rows, heads, queries, 1)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores for a mask that is True where a query sees a key."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _fused_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel behind `scaled_dot_product_attention`, which also gives the denominators."""
    if mask is not None:
        mask = additive(mask, query.dtype)
    output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=1.0
    )
    return output.float(), total.float()


def _fused_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As on the CPU; this kernel wants its mask in full shape, and rows of it aligned to 16 bytes."""
    if mask is not None:
        if mask.shape[-1] % 8:
            return _step_by_step(query, key, value, mask)
        mask = additive(mask, query.dtype).expand(*query.shape[:3], key.shape[2])
    output, total = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, compute_log_sumexp=True, scale=1.0
    )[:2]
    return output.float(), total[..., : query.shape[2], None]


def _step_by_step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with every score in memory, in float32."""
    scores = (query @ key.transpose(2, 3)).float()
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
    total = scores.logsumexp(-1, keepdim=True)
    return (scores.sub_(total).exp_().to(value.dtype) @ value).float(), total


def _attend_together(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_attend`, of all rows to the same keys and values of shape (1, heads, length, width): one product for all."""
    rows, heads, queries, width = query.shape
    lined_up = query.transpose(0, 1).reshape(1, heads, rows * queries, width)
    output, total = _attend(lined_up, key, value, None)
    shape = (heads, rows, queries, -1)
    return output.reshape(shape).transpose(0, 1), total.reshape(shape).transpose(0, 1)


def _merge(one: torch.Tensor, one_total: torch.Tensor, two: torch.Tensor, two_total: torch.Tensor) -> torch.Tensor:
    """Attention to two sets of keys from the attention to each."""
    share = torch.sigmoid(two_total - one_total)
    return torch.lerp(one, two, share)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
