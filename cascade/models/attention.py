"""Attention to a beginning that many sequences share, and a key-value cache whose rows come and go.

Tasks of one family begin alike: a system message, worked examples. Their keys and values are computed and kept once,
in a `Prefix`; each row of a `RowCache` holds its own tokens alone. A row's attention is that to its own tokens and
that to its prefix, put together by their log-sum-exp, which is exact ("cascade" or "bifurcated" attention, e.g.
Juravsky et al. 2024, arXiv 2402.05099). So a batch of hundreds of rows behind 1,500 shared tokens costs the memory
and the memory traffic of short rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "shared_prefix"
"""As transformers knows our attention; without prefixes it is its own `sdpa`."""
_ROOM = 64
"""Tokens that a cache grows by at least."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values, per layer, of tokens that rows begin with: tensors of shape (1, heads, length, width)."""

    tokens: tuple[int, ...]
    states: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, tokens: Sequence[int], cache: DynamicCache) -> Prefix:
        """What a forward pass of the tokens alone has left in a cache."""
        return cls(tuple(tokens), tuple(_states(layer) for layer in cache.layers))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Shared:
    """Prefixes of the rows of one forward pass, each with its rows: their indices, or for every row whether it is one
    of them (which has the same shape for any rows, but computes with all of them); None means all."""

    groups: tuple[tuple[Prefix, torch.Tensor | None], ...]

    @classmethod
    def of(cls, prefixes: Sequence[Prefix | None], device: torch.device) -> Shared | None:
        """From the prefix of each row; None if no row has one."""
        distinct = {id(p): p for p in prefixes if p is not None}
        if len(distinct) == 1 and None not in prefixes:
            return cls(((next(iter(distinct.values())), None),))
        members = [(p, [i for i, other in enumerate(prefixes) if other is p]) for p in distinct.values()]
        groups = tuple((p, torch.tensor(rows, device=device)) for p, rows in members)
        return cls(groups) if groups else None


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


def _states(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache layer, each of shape (rows, heads, tokens, width)."""
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


# --------------------------------------------------------------------------------------------- rows that come and go


@dataclass(frozen=True)
class Window:
    """What a step of fixed shape reads and writes of a `RowCache`.

    Attributes:
        rows, columns: the first so many, in use or not, are read.
        column: where the new token's states are written; a tensor of one number, so that it can change in place.
    """

    rows: int
    columns: int
    column: torch.Tensor


class _RowLayer(CacheLayerMixin):
    """One layer of a `RowCache`: keys and values of shape (room for rows, heads, room for tokens, width)."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.used = self.version = 0
        self.window: Window | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (x.new_empty(0, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def reserve(self, rows: int, tokens: int, start: int = 0) -> None:
        """Make room; columns before `start` are given up."""
        room_rows, _, room_tokens, _ = self._tensors()[0].shape
        if start == 0 and rows <= room_rows and tokens <= room_tokens:
            return
        kept = self.used - start
        room = max(tokens - start, kept + max(_ROOM, kept // 2))
        grown = []
        for old in self._tensors():
            new = old.new_zeros(max(rows, room_rows if start == 0 else 0), old.shape[1], room, old.shape[3])
            new[: self.rows, :, :kept] = old[: self.rows, :, start : self.used]
            grown.append(new)
        self.keys, self.values = grown
        self.used = kept
        self.version += 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens of every row; returns those of all tokens."""
        if self.window is not None:
            return self._update_through(self.window, key_states, value_states)
        end = self.used + key_states.shape[2]
        self.reserve(self.rows, end)
        keys, values = self._tensors()
        keys[: self.rows, :, self.used : end] = key_states
        values[: self.rows, :, self.used : end] = value_states
        self.used = end
        return keys[: self.rows, :, :end], values[: self.rows, :, :end]

    def _update_through(
        self, window: Window, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in fixed shapes; `used` is the caller's to count."""
        keys, values = (x[: window.rows] for x in self._tensors())
        keys.index_copy_(2, window.column, key_states)
        values.index_copy_(2, window.column, value_states)
        return keys[:, :, : window.columns], values[:, :, : window.columns]

    def add(self, keys: torch.Tensor, values: torch.Tensor, rows: int, columns: int) -> None:
        """Put new rows below ours, all ending in the same column; make room for so many rows and columns."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        count, _, length, _ = keys.shape
        if length > self.used:
            self._shift(length - self.used)
        self.reserve(max(rows, self.rows + count), max(columns, self.used))
        for ours, new in zip(self._tensors(), (keys, values), strict=True):
            ours[self.rows : self.rows + count, :, : self.used - length] = 0
            ours[self.rows : self.rows + count, :, self.used - length : self.used] = new
        self.rows += count

    def _shift(self, columns: int) -> None:
        """Make room on the left."""
        wider = [torch.nn.functional.pad(x[: self.rows, :, : self.used], (0, 0, columns, 0)) for x in self._tensors()]
        self.keys, self.values = wider
        self.used += columns
        self.version += 1

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Overwrite rows with others."""
        for tensor in self._tensors():
            tensor[targets, :, : self.used] = tensor[sources, :, : self.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """Keys and values of rows of different lengths, padded on the left, in room that is reused as rows leave."""

    def __init__(self, layers: int) -> None:
        self.row_layers = [_RowLayer() for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))

    @property
    def used(self) -> int:
        """Columns: tokens of the longest row, and what is left of longer ones."""
        return self.row_layers[0].used

    @property
    def version(self) -> int:
        """Another number whenever the memory has moved."""
        return self.row_layers[0].version

    def reserve(self, rows: int, columns: int) -> None:
        """See that there is memory for so many rows and columns, in use or not."""
        for layer in self.row_layers:
            layer.reserve(rows, columns)

    @contextmanager
    def through(self, window: Window) -> Iterator[None]:
        """Compute one step in fixed shapes: `window` says what is read, and where the new token's states go."""
        for layer in self.row_layers:
            layer.window = window
        try:
            yield
        finally:
            for layer in self.row_layers:
                layer.window = None
                layer.used += 1

    def add(self, prefilled: DynamicCache, rows: int = 0, columns: int = 0) -> None:
        """Put the rows of another cache below ours, with memory for so many rows and columns at least."""
        for ours, new in zip(self.row_layers, prefilled.layers, strict=True):
            ours.add(*_states(new), rows, columns)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all other rows. Those at the end move into the gaps, so that little is copied.

        Args:
            rows: in rising order.

        Returns:
            The old index of each row in its new place.
        """
        order = list(rows)
        staying = set(order)
        gaps = [i for i in range(len(order)) if i not in staying]
        movers = [i for i in order if i >= len(order)]
        placed = list(range(len(order)))
        for gap, mover in zip(gaps, movers, strict=True):
            placed[gap] = mover
        device = self.row_layers[0].device
        sources, targets = (torch.tensor(rows, device=device) for rows in (movers, gaps))
        for layer in self.row_layers:
            if gaps:
                layer.move(sources, targets)
            layer.rows = len(order)
        return placed

    def drop_columns(self, count: int) -> None:
        """Give up the first columns, which no row uses any more."""
        for layer in self.row_layers:
            layer.reserve(layer.rows, layer.used, start=count)
