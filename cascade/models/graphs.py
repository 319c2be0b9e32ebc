"""Decoding steps as CUDA graphs.

A step of a small model is hundreds of kernels of a few microseconds each; launching them one by one from Python takes
far longer than computing them. A CUDA graph launches all of a step at once. It is recorded for fixed shapes and
addresses, so a batch is rounded up to a bucket of rows and columns, and the graphs of a cache are thrown away when
its memory moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers.cache_utils import Cache

from cascade.models.caches import Prefix, RowCache, Shared, Window

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache, Shared | None], torch.Tensor]
"""(token ids, mask, positions, cache, shared beginnings) -> logits after the last token, shape (rows, vocabulary)."""

_ROWS, _COLUMNS = 4, 64
"""Smallest differences between two buckets; they keep the mask aligned as attention kernels need it."""
_MOST_PREFIXES = 8
"""In one graph: every row is computed with each of them, so many would cost more than launches do."""


@dataclass(frozen=True)
class _Step:
    """The tensors that a graph reads, and what it was recorded for.

    Attributes:
        ids, positions: shape (rows, 1). mask: True where a token is seen, shape (rows, 1, 1, columns).
        window: where in the cache the step writes and what it reads.
        shared: the beginnings, each with a tensor that says of every row whether it has it, shape (rows,).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    window: Window
    shared: Shared | None

    @classmethod
    def of(cls, rows: int, columns: int, prefixes: Sequence[Prefix], device: torch.device) -> _Step:
        whole = torch.zeros(rows, 1, dtype=torch.long, device=device)
        mask = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
        window = Window(rows, columns, torch.zeros(1, dtype=torch.long, device=device))
        groups = tuple((p, torch.zeros(rows, dtype=torch.bool, device=device)) for p in prefixes)
        return cls(whole, whole.clone(), mask, window, Shared(groups) if groups else None)

    def set(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, shared: Shared | None) -> None:
        """Copy the inputs of this step in; rows beyond them see but their own token, so that nothing is undefined."""
        rows, used = mask.shape
        self.ids[:rows] = ids
        self.positions[:rows] = positions
        self.mask.zero_()
        self.mask[:rows, 0, 0, :used] = mask
        self.mask[rows:, 0, 0, used - 1] = True
        self.window.column.fill_(used - 1)
        members = {id(prefix): flags for prefix, flags in (self.shared.groups if self.shared else ())}
        for prefix, own in shared.groups if shared else ():
            flags = members[id(prefix)]
            assert flags is not None
            flags.zero_()
            flags[slice(rows) if own is None else own] = True


Recorded = tuple[Callable[[], None], torch.Tensor]
"""A function that computes a step again, and the tensor where its logits are then."""
Recorder = Callable[[Callable[[], torch.Tensor]], Recorded]


class StepGraphs:
    """Computes the decoding steps of one batch, from the second of a bucket on by replaying its graph."""

    def __init__(self, forward: Forward, recorder: Callable[[], Recorder] | None = None) -> None:
        """
        Args:
            recorder: makes what makes graphs of computations; None: CUDA graphs.
        """
        self._forward = forward
        self._recorder = recorder or CudaRecorder
        self._record = self._recorder()
        self._steps: dict[tuple[int, int], _Step] = {}
        self._graphs: dict[tuple[int, int], Recorded | None] = {}
        self._prefixes: Sequence[Prefix] = ()
        self._version = -1

    def forget(self) -> None:
        """Throw the graphs away: something that they read has moved."""
        self._graphs.clear()
        self._steps.clear()
        self._record = self._recorder()

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: RowCache, shared: Shared | None
    ) -> torch.Tensor:
        """Logits of the next token, shape (rows, vocabulary), valid until the next call.

        Args:
            ids, positions: shape (rows, 1).
            mask: True where a token is seen, shape (rows, tokens of the cache and the new one).
        """
        prefixes = [] if shared is None else [prefix for prefix, _ in shared.groups]
        if len(prefixes) > _MOST_PREFIXES:
            return self._forward(ids, mask[:, None, None], positions, cache, shared)
        rows, used = mask.shape
        bucket = round_up(rows, _ROWS), round_up(used, _COLUMNS)
        cache.reserve(*bucket)
        self._drop_stale(cache, prefixes)
        step = self._steps.get(bucket)
        if step is None:
            step = self._steps[bucket] = _Step.of(*bucket, prefixes, ids.device)
        step.set(ids, mask, positions, shared)
        with cache.through(step.window):
            compute = partial(self._forward, step.ids, step.mask, step.positions, cache, step.shared)
            return self._compute(bucket, compute)[:rows]

    def _compute(self, bucket: tuple[int, int], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A bucket's first step is computed as ever, which readies the libraries; its second records the graph."""
        if bucket not in self._graphs:
            self._graphs[bucket] = None
            return compute()
        recorded = self._graphs[bucket]
        if recorded is None:
            recorded = self._graphs[bucket] = self._record(compute)
        replay, logits = recorded
        replay()
        return logits

    def _drop_stale(self, cache: RowCache, prefixes: Sequence[Prefix]) -> None:
        """Forget the graphs of memory that was given up, the cache's or a beginning's that nobody shares any more, and
        those that lack a beginning."""
        if cache.version != self._version or {*map(id, prefixes)} != {*map(id, self._prefixes)}:
            self.forget()
            self._version, self._prefixes = cache.version, prefixes


class CudaRecorder:
    """Records CUDA graphs that share their working memory, since only one of them runs at a time.

    CUDA gives that memory up with the last of the graphs, so a new recorder is needed when all have been thrown away.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Recorded:
        """Record, without computing. (`torch.cuda.graph` would collect garbage and empty caches each time.)"""
        try:
            return self._capture(compute)
        except torch.OutOfMemoryError:  # a graph takes memory of its own: none of what is kept free for other work
            torch.cuda.empty_cache()
            return self._capture(compute)

    def _capture(self, compute: Callable[[], torch.Tensor]) -> Recorded:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, logits


def round_up(count: int, least: int) -> int:
    """The bucket that `count` falls into: 1, 2, then multiples of `least`, further apart as they grow (at most a
    quarter of padding)."""
    if count <= 2 and least <= 4:
        return count
    step = max(least, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step
