"""Prompts, computed a part at a time, so that whoever else runs need not stand still for a long one."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cascade.models.base import LoadedBase
from cascade.models.caches import Prefix, Shared
from cascade.models.rows import Row

_ALIGNED = 8
"""What a pass's length is a multiple of on a GPU: attention whose mask is not aligned keeps every score in memory,
gigabytes of them."""


class Prompts:
    """The tokens so far of some rows, on their way into a cache of their own.

    The cache's first columns are copies of what was known of each row's beginning, the others are computed; both are
    padded on the left to the longest. A shared `Row.prefix` is attended to and not copied.

    Attributes:
        mask: True where a column holds a token, shape (rows, columns), those to come included.
        logits: after the last token, once all is computed; shape (rows, vocabulary).
    """

    def __init__(self, loaded: LoadedBase, rows: Sequence[Row], known: Sequence[Prefix | None] = ()) -> None:
        """
        Args:
            known: of each row, states of tokens that its own begin with; at least one must be left to compute. They
                must have been computed with the same weights, adapter included.
        """
        self.rows = list(rows)
        self.logits = torch.empty(0)
        self._loaded = loaded
        self._known = list(known) or [None] * len(self.rows)
        self._copied = self._aligned(max(len(k or ()) for k in self._known))
        left = [row.own[len(k or ()) :] for row, k in zip(self.rows, self._known, strict=True)]
        self._own = self._aligned(max(map(len, left)))
        pad, device = loaded.tokenizer.pad_token_id, loaded.device
        self._ids = torch.tensor([[pad] * (self._own - len(ids)) + ids for ids in left], device=device)
        there = [
            [*_on_the_right(len(k or ()), self._copied), *_on_the_right(len(ids), self._own)]
            for k, ids in zip(self._known, left, strict=True)
        ]
        self.mask = torch.tensor(there, device=device)
        start = torch.tensor([[len(row.prefix or ())] for row in self.rows], device=device)
        self._positions = ((self.mask.cumsum(-1) - 1).clamp(min=0) + start)[:, self._copied :]
        self._done = 0
        self.cache = DynamicCache(config=loaded.model.config)

    @property
    def columns(self) -> int:
        """Tokens of the longest row, padding included."""
        return self._copied + self._own

    @property
    def left(self) -> int:
        """Tokens that are not computed yet, of all rows together."""
        return len(self.rows) * (self._own - self._done)

    @torch.inference_mode()
    def advance(self, tokens: int) -> bool:
        """Compute about so many tokens more, or what is left; returns whether that was all."""
        if self._done == 0:
            self._copy_known()
        count = min(self._aligned(max(tokens // len(self.rows), 1)), self._own - self._done)
        end = self._done + count
        mask = self.mask[:, : self._copied + end]
        shared = Shared.of([row.prefix for row in self.rows], self._loaded.device)
        self.logits = forward(
            self._loaded.model,
            self._ids[:, self._done : end],
            mask if shared is None else causal(mask, count),
            self._positions[:, self._done : end],
            self.cache,
            shared,
        )
        self._done = end
        return end == self._own

    def leave(self, indices: Container[int]) -> None:
        """Take rows out, by their `index`."""
        alive = [i for i, row in enumerate(self.rows) if row.index not in indices]
        if len(alive) == len(self.rows):
            return
        kept = torch.tensor(alive, device=self.mask.device, dtype=torch.long)
        self.rows, self._known = [self.rows[i] for i in alive], [self._known[i] for i in alive]
        self._ids, self.mask, self._positions = self._ids[kept], self.mask[kept], self._positions[kept]
        if self._done and alive:
            self.cache.batch_select_indices(kept)  # type: ignore[no-untyped-call]
            self.logits = self.logits[kept]

    def prefix(self, place: int) -> Prefix:
        """What the cache holds of a row, once all is computed: a copy."""
        return Prefix.of_row(self.rows[place].own, self.cache, place, self.mask[place])

    def _copy_known(self) -> None:
        """Put what is known of each row into the cache's first columns."""
        some = next((k for k in self._known if k is not None), None)
        if some is None:
            return
        for layer, pair in enumerate(some.states):
            whole = [x.new_zeros(len(self.rows), x.shape[1], self._copied, x.shape[3]) for x in pair]
            for row, known in enumerate(self._known):
                for target, source in zip(whole, () if known is None else known.states[layer], strict=False):
                    target[row, :, self._copied - source.shape[2] :] = source[0]
            self.cache.update(whole[0], whole[1], layer)

    def _aligned(self, length: int) -> int:
        return -(-length // _ALIGNED) * _ALIGNED if self._loaded.device.type == "cuda" else length


def _on_the_right(count: int, room: int) -> list[bool]:
    return [False] * (room - count) + [True] * count


@torch.inference_mode()
def compute_prefix(loaded: LoadedBase, tokens: Sequence[int]) -> Prefix:
    """Keys and values of tokens that rows begin with."""
    cache = DynamicCache(config=loaded.model.config)
    ids = torch.tensor([list(tokens)], device=loaded.device)
    loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix.of(tokens, cache)


def causal(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """What each of the last tokens may attend to, shape (rows, 1, queries, tokens), from which are there, shape
    (rows, tokens).

    A pad sees itself, so that its attention is defined.
    """
    square = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)[-queries:]
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)[-queries:]
    return (square.tril(mask.shape[1] - queries) & mask[:, None, None]) | itself


def last(count: int, length: int, device: torch.device) -> torch.Tensor:
    """Indices of the last positions, for `logits_to_keep`: given a number, models hand a strided slice to their head,
    for which PyTorch copies the head's weights once for every row."""
    return torch.arange(length - count, length, device=device)


def forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    shared: Shared | None,
) -> torch.Tensor:
    """Logits after the last position, float32, shape (rows, vocabulary). Extends the cache."""
    more = {} if shared is None else {"shared": shared}
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last(1, ids.shape[1], ids.device),
        **more,
    )
    return output.logits[:, -1].float()
