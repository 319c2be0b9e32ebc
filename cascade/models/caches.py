"""Keys and values: of a beginning that many sequences share, and of rows that come and go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

_ROOM = 64
"""Tokens that a cache grows by at least."""
_versions = itertools.count()
"""One for each place that keys and values have ever lain in, so that no two caches are taken for one another."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values, per layer, of tokens that rows begin with: tensors of shape (1, heads, length, width)."""

    tokens: tuple[int, ...]
    states: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, tokens: Sequence[int], cache: DynamicCache) -> Prefix:
        """What a forward pass of the tokens alone has left in a cache."""
        return cls(tuple(tokens), tuple(_states(layer) for layer in cache.layers))

    @classmethod
    def of_row(cls, tokens: Sequence[int], cache: Cache, row: int, own: torch.Tensor) -> Prefix:
        """A copy of what a cache holds of one row; `own` is True where a column holds one of its tokens."""
        layers = (_states(layer) for layer in cache.layers)
        return cls(tuple(tokens), tuple((k[row : row + 1, :, own], v[row : row + 1, :, own]) for k, v in layers))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Memory that the states take."""
        return sum(x.nbytes for pair in self.states for x in pair)

    def cut(self, length: int) -> Prefix:
        """The first so many tokens, in the same memory."""
        if length >= len(self):
            return self
        return Prefix(self.tokens[:length], tuple((k[:, :, :length], v[:, :, :length]) for k, v in self.states))

    def as_cache(self) -> DynamicCache:
        """A cache that holds these tokens, in the same memory until it grows."""
        return DynamicCache(self.states)


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
        self.rows = self.used = 0
        self.version = next(_versions)
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
        """Make room; columns before `start` are given up, and so is room for far more rows than there are now."""
        room_rows, _, room_tokens, _ = self._tensors()[0].shape
        if start == 0 and rows <= room_rows and tokens <= room_tokens:
            return
        rows = max(rows, self.rows)
        if start == 0 and room_rows <= 2 * rows:
            rows = max(rows, room_rows)
        kept = self.used - start
        room = max(tokens - start, kept + max(_ROOM, kept // 2))
        grown = []
        for old in self._tensors():
            new = old.new_zeros(rows, old.shape[1], room, old.shape[3])
            new[: self.rows, :, :kept] = old[: self.rows, :, start : self.used]
            grown.append(new)
        self.keys, self.values = grown
        self.used = kept
        self.version = next(_versions)

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
        self.version = next(_versions)

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
        """Another number whenever the memory has moved, and than any other cache has had."""
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

    def rewind(self, count: int) -> None:
        """Take the last columns back."""
        for layer in self.row_layers:
            layer.used -= count

    def drop_columns(self, count: int) -> None:
        """Give up the first columns, which no row uses any more."""
        for layer in self.row_layers:
            layer.reserve(layer.rows, layer.used, start=count)


def _states(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache layer, each of shape (rows, heads, tokens, width)."""
    assert isinstance(layer, DynamicLayer | _RowLayer)
    assert layer.keys is not None
    assert layer.values is not None
    if isinstance(layer, _RowLayer):
        return layer.keys[: layer.rows, :, : layer.used], layer.values[: layer.rows, :, : layer.used]
    return layer.keys, layer.values
