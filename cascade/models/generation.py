"""Batched decoding: rows join and leave between any two steps, and what they begin with alike is computed once.

transformers' `generate` computes every row of a batch until the last one has ended. Here a row that is done makes
room for one that waits, stop strings are checked row by row, and a batch is as large as a budget of tokens allows.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from cascade.models import prompts
from cascade.models.attention import can_share
from cascade.models.base import LoadedBase, end_token_ids
from cascade.models.beginnings import COST, Group, shared_beginnings
from cascade.models.caches import Prefix, RowCache, Shared
from cascade.models.graphs import StepGraphs
from cascade.models.prompts import Prompts
from cascade.models.room import tokens_in_a_pass, tokens_in_memory
from cascade.models.rows import Generated, OnToken, Request, Row, append, choose
from cascade.models.steps import LlamaSteps

_log = logging.getLogger(__name__)


class Batch:
    """Rows that are computed together; rows join, and leave when they are done, between any two steps.

    Attributes:
        shares: whether the model's cache is of the kind in which rows can be padded, and told apart.
    """

    def __init__(self, loaded: LoadedBase, on_done: Callable[[Prefix], None] | None = None) -> None:
        """
        Args:
            on_done: given what the cache holds of a row that is done, where rows' caches can be told apart.
        """
        self.rows: list[Row] = []
        self._loaded, self._on_done = loaded, on_done
        self._ends = end_token_ids(loaded)
        self.shares = can_share(loaded.model)
        self._cache: Cache = DynamicCache(config=loaded.model.config)
        self._mask = torch.empty(0)  # (rows, cached tokens of their own), False where padded
        self._logits = torch.empty(0)  # (rows, vocabulary) of the token to choose next
        self._shared: Shared | None = None
        self._room = 0, 0
        self._ahead: list[int] = []  # what was guessed, and is in the cache already
        self._ahead_logits = torch.empty(0)  # after each of these, shape (guessed, vocabulary)
        self._steps = self._special_steps()

    @property
    def open(self) -> bool:
        """Whether rows can join now: always, unless running rows are in a cache that cannot be padded."""
        return not self.rows or self.shares

    @property
    def columns(self) -> int:
        """Cached tokens of the longest row, and what is left of longer ones; shared beginnings left out."""
        return self._mask.shape[1] if self.rows else 0

    @property
    def padded_tokens(self) -> int:
        """Cached tokens of all rows, padding included, and each shared beginning once."""
        prefixes = {id(row.prefix): len(row.prefix) for row in self.rows if row.prefix is not None}
        return self._mask.numel() + sum(prefixes.values()) if self.rows else 0

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Compute the prompts of new rows, from where their prefixes end, and put them beside those that run.

        Raises:
            ValueError: the batch is not `open`.
        """
        if not rows:
            return
        coming = Prompts(self._loaded, rows)
        coming.advance(coming.left)
        self.take(coming)

    @torch.inference_mode()
    def take(self, coming: Prompts) -> None:
        """Put rows whose prompts have been computed beside those that run.

        Raises:
            ValueError: the batch is not `open`.
        """
        if not self.open:
            raise ValueError("rows run in a cache that others cannot join; wait until they are done")
        self._rewind()
        if self.shares:
            self._add(coming.cache, coming.mask, coming.logits)
        else:
            self._cache, self._mask, self._logits = coming.cache, coming.mask, coming.logits
        self.rows = [*self.rows, *coming.rows]
        self._shared = Shared.of([row.prefix for row in self.rows], self._loaded.device)

    @torch.inference_mode()
    def hand_over(self, indices: Container[int], other: Batch) -> None:
        """Let rows, by their `index`, go on in another batch, where they are padded to others' length.

        Raises:
            ValueError: this batch is of a model whose rows cannot join others.
        """
        if not self.shares:
            raise ValueError("rows run in a cache that they cannot leave alone")
        self._rewind()
        other._rewind()
        for place, row in enumerate(self.rows):
            if row.index in indices:
                states = self.prefix(place)
                other._add(states.as_cache(), self._mask.new_ones(1, len(states)), self._logits[place : place + 1])
                other.rows = [*other.rows, row]
        other._shared = Shared.of([row.prefix for row in other.rows], self._loaded.device)
        self.leave(indices)

    def prefix(self, place: int) -> Prefix:
        """What the cache holds of a row, a copy; the tokens of a shared beginning are not part of it."""
        own = self._mask[place]
        return Prefix.of_row(self.rows[place].own[: int(own.sum())], self._cache, place, own)

    @torch.inference_mode()
    def step(self, on_token: OnToken | None = None) -> list[Row]:
        """Add a token to every row, and those that were guessed right; returns the rows that this finished, which have
        left the batch."""
        chosen = self._follow(self._choose(on_token), on_token)
        done = [row for row in self.rows if row.finish is not None]
        if self._on_done is not None and self.shares:
            for place, row in enumerate(self.rows):
                if row.finish is not None and row.prefix is None:
                    self._on_done(self.prefix(place))
        if done:
            chosen = chosen[self._keep([i for i, row in enumerate(self.rows) if row.finish is None])]
        if self.rows:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
            self._logits = self._guess(int(chosen[0])) if self._guesses() else self._forward_one(chosen[:, None])
        return done

    def _choose(self, on_token: OnToken | None) -> torch.Tensor:
        """Choose the next token of every row, and add it."""
        chosen = choose(self._logits, self.rows)
        for row, token in zip(self.rows, chosen.tolist(), strict=True):
            append(row, token, self._ends, self._loaded, on_token)
        return chosen

    def _follow(self, chosen: torch.Tensor, on_token: OnToken | None) -> torch.Tensor:
        """While the one row goes on as was guessed, its next token needs no step; returns the last one chosen."""
        if not self._ahead:
            return chosen
        row, right = self.rows[0], 0
        while right < len(self._ahead) and row.finish is None and int(chosen) == self._ahead[right]:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
            self._logits = self._ahead_logits[right : right + 1]
            right += 1
            chosen = self._choose(on_token)
        row.guesses.came(right, row.length)
        self._rewind(right)
        return chosen

    def _rewind(self, right: int = 0) -> None:
        """Give up what was guessed, but for so many tokens."""
        if self._ahead:
            assert isinstance(self._cache, RowCache)
            self._cache.rewind(len(self._ahead) - right)
            self._ahead = []

    def _guesses(self) -> bool:
        """Whether several tokens of a row take little longer than one."""
        alone = len(self.rows) == 1 and self._shared is None and isinstance(self._cache, RowCache)
        return alone and isinstance(self._steps, LlamaSteps) and self._steps.few_as_one

    def _guess(self, token: int) -> torch.Tensor:
        """Logits after one more token of the one row; those after what may follow are kept."""
        assert isinstance(self._steps, LlamaSteps)
        assert isinstance(self._cache, RowCache)
        row = self.rows[0]
        left = row.request.max_tokens - len(row.tokens) - 1
        self._ahead = row.guesses.next(row.own)[: max(left, 0)]
        ids = torch.tensor([[token, *self._ahead]])
        positions = torch.arange(row.length - 1, row.length + len(self._ahead))[None]
        logits = self._steps(ids, self._mask, positions, self._cache, None)
        self._ahead_logits = logits[1:]
        return logits[:1]

    def _forward_one(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after one more token of every row."""
        positions = torch.tensor([[row.length - 1] for row in self.rows], device=self._loaded.device)
        if self._steps is not None and isinstance(self._cache, RowCache):
            return self._steps(ids, self._mask, positions, self._cache, self._shared)
        mask = self._mask[:, None, None] if self.shares else self._mask
        return prompts.forward(self._loaded.model, ids, mask, positions, self._cache, self._shared)

    def _special_steps(self) -> StepGraphs | LlamaSteps | None:
        """What computes a step with less overhead than the model's own forward, where there is such a thing."""
        if not self.shares:
            return None
        if self._loaded.device.type == "cuda":
            return StepGraphs(partial(prompts.forward, self._loaded.model))
        return LlamaSteps.of(self._loaded.model)

    def expect(self, rows: int, tokens: int) -> None:
        """Say how many rows there will be and how long the next to join may become, so that memory is taken once for
        all: growing it, row by row and token by token, leaves a GPU's in pieces."""
        self._room = rows, tokens if self._loaded.device.type == "cuda" else 0

    def forget_graphs(self) -> None:
        """To be called when weights, an adapter's included, have moved to other memory."""
        if isinstance(self._steps, StepGraphs):
            self._steps.forget()

    @torch.inference_mode()
    def leave(self, indices: Container[int]) -> None:
        """Take rows out, by their `index`, whether they are done or not."""
        alive = [i for i, row in enumerate(self.rows) if row.index not in indices]
        if len(alive) < len(self.rows):
            self._rewind()
            self._logits = self._logits[self._keep(alive)]

    def _add(self, cache: DynamicCache, mask: torch.Tensor, logits: torch.Tensor) -> None:
        """Put the rows of another cache below ours, both padded on the left to the longer."""
        if not self.rows:
            self._cache = RowCache(len(cache.layers))
            self._mask, self._logits = mask[:0], logits[:0]
        assert isinstance(self._cache, RowCache)
        self._cache.add(cache, *self._room)
        padded = [torch.nn.functional.pad(m, (self._cache.used - m.shape[1], 0)) for m in (self._mask, mask)]
        self._mask = torch.cat(padded)
        self._logits = torch.cat([self._logits, logits])

    def _keep(self, alive: list[int]) -> torch.Tensor:
        """Drop the other rows, and columns that only they had use for. Returns the old index of each row in place."""
        placed = self._cache.keep(alive) if isinstance(self._cache, RowCache) else alive
        kept = torch.tensor(placed, device=self._mask.device, dtype=torch.long)
        self.rows = [self.rows[i] for i in placed]
        self._mask = self._mask[kept]
        if not self.rows:
            self._cache, self._shared = DynamicCache(config=self._loaded.model.config), None
        elif isinstance(self._cache, RowCache):
            self._shared = Shared.of([row.prefix for row in self.rows], self._loaded.device)
            unused = int(self._mask.any(dim=0).int().argmax())
            if unused > self._mask.shape[1] // 4:
                self._mask = self._mask[:, unused:]
                self._cache.drop_columns(unused)
        elif isinstance(self._cache, DynamicCache):
            self._cache.batch_select_indices(kept)
        return kept


def generate(
    loaded: LoadedBase, requests: Sequence[Request], *, tokens: int | None = None, on_token: OnToken | None = None
) -> list[Generated]:
    """Continue every prompt; results in the order of the requests. See `stream`."""
    results = dict(stream(loaded, requests, tokens=tokens, on_token=on_token))
    return [results[i] for i in range(len(requests))]


def stream(
    loaded: LoadedBase, requests: Sequence[Request], *, tokens: int | None = None, on_token: OnToken | None = None
) -> Iterator[tuple[int, Generated]]:
    """Continue every prompt; yields (index, answer) as answers are done.

    Args:
        tokens: how many may be in memory at once, padding and what answers may yet come to included (a shared
            beginning not); one row always may. None: as suits the device, see `tokens_in_memory`.
        on_token: told every token; from an answer's first again where memory ran out.

    Raises:
        ValueError: a prompt is empty.
        torch.OutOfMemoryError: the memory does not do for a single row. (Where it does not do for a batch, what is
            not done begins again in batches of half the size.)
    """
    if any(len(r.prompt) == 0 for r in requests):
        raise ValueError("a prompt must have at least one token")
    left = {i: request for i, request in enumerate(requests) if request.max_tokens > 0}
    yield from ((i, Generated((), "", "length")) for i in range(len(requests)) if i not in left)
    budget = tokens or tokens_in_memory(loaded)
    while left:
        try:
            for row in _until_done(loaded, left, budget, on_token):
                del left[row.index]
                yield row.index, Generated(tuple(row.tokens), row.text, row.finish or "length", row.seconds)
        except torch.OutOfMemoryError:
            if budget <= max(len(r.prompt) + r.max_tokens for r in left.values()):
                raise
        if left:  # outside of `except`, whose traceback keeps what is to be given up
            budget //= 2
            _log.warning("out of memory with %d answers to go; again with %d tokens at once", len(left), budget)
            if loaded.device.type == "cuda":
                torch.cuda.empty_cache()


def _until_done(
    loaded: LoadedBase, requests: Mapping[int, Request], budget: int, on_token: OnToken | None
) -> Iterator[Row]:
    """Rows as they are done, with at most `budget` tokens in memory."""
    waiting, batch = _Waiting(loaded, requests), Batch(loaded)
    while waiting or batch.rows:
        began = time.perf_counter()
        waiting.join(batch, budget)
        running = batch.rows
        done = batch.step(on_token)
        share = (time.perf_counter() - began) / len(running)
        for row in running:
            row.seconds += share
        yield from done


def _cost_of_a_group(device: torch.device) -> int:
    """Tokens that rows must save by sharing a beginning. On a GPU prompts are cheap, but each beginning is one more
    attention of every layer at every step: what a whole pass computes, and a few beginnings at a time at most."""
    return tokens_in_a_pass(device) if device.type == "cuda" else COST


class _Waiting:
    """Requests that have not begun, those that begin alike together, longest first."""

    def __init__(self, loaded: LoadedBase, requests: Mapping[int, Request]) -> None:
        self._loaded = loaded
        self._prefix: Prefix | None = None
        ready = list(requests)
        prompts, cost = [requests[i].prompt for i in ready], _cost_of_a_group(loaded.device)
        groups = shared_beginnings(prompts, cost) if can_share(loaded.model) else []
        if not groups:
            groups = [Group(0, tuple(range(len(ready))))]
        self._queue: deque[tuple[int, Row]] = deque()
        for group in groups:
            rows = [Row.new(ready[i], requests[ready[i]], loaded.device) for i in group.members]
            rows.sort(key=lambda row: (-row.need, row.index))
            self._queue.extend((group.length, row) for row in rows)

    def __bool__(self) -> bool:
        return bool(self._queue)

    def join(self, batch: Batch, budget: int) -> None:
        """Let as many rows join as there is room for, once that is worth an interruption of those that run."""
        room = self._room(batch, budget)
        if not batch.open or (batch.rows and room < min(len(self._queue), 1 + len(batch.rows) // 4)):
            return
        most = min(tokens_in_a_pass(self._loaded.device), budget)
        coming = [row.need - length for length, row in itertools.islice(self._queue, room)]
        batch.expect(len(batch.rows) + room, max(coming, default=0))
        joining: list[Row] = []
        for _ in range(room):
            length, row = self._queue.popleft()
            row.prefix = self._prefix_of(row, length)
            longest = max(len(r.own) for r in [*joining, row])
            if joining and (row.prefix is not joining[0].prefix or (len(joining) + 1) * longest > most):
                batch.join(joining)
                joining = []
            joining.append(row)
        batch.join(joining)

    def _room(self, batch: Batch, budget: int) -> int:
        """How many of the next rows the budget has room for, every row being padded to the longest."""
        widest, count = max((row.need for row in batch.rows), default=0), len(batch.rows)
        for taken, (length, row) in enumerate(self._queue):
            widest = max(widest, row.need - length)
            if (count + taken + 1) * widest > budget and count + taken > 0:
                return taken
        return len(self._queue)

    def _prefix_of(self, row: Row, length: int) -> Prefix | None:
        """The beginning that a row shares with its group, computed when the group's first row comes."""
        if length == 0:
            return None
        tokens = tuple(row.request.prompt[:length])
        if self._prefix is None or self._prefix.tokens != tokens:
            self._prefix = prompts.compute_prefix(self._loaded, tokens)
        return self._prefix
