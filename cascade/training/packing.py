"""Sequence packing: several examples in one row, each with positions of its own and no sight of its neighbours.

A row is a batch of one. Positions start again at 0 with each example, and transformers builds the block-diagonal
attention mask from that (no attention mask is given), for eager, sdpa and flash attention alike.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cascade.config import Lora
from cascade.training.examples import EncodedExample


@dataclass(frozen=True)
class Row:
    """Examples that share one forward pass."""

    examples: tuple[EncodedExample, ...]

    @property
    def tokens(self) -> int:
        return sum(len(e) for e in self.examples)

    @property
    def targets(self) -> int:
        return sum(e.targets for e in self.examples)

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The row as model input.

        Returns:
            input_ids, position_ids: shape (1, tokens). target_index: positions whose *next* token is learned,
            shape (targets,). target_ids: those next tokens, shape (targets,).
        """
        starts = itertools.accumulate((len(e) for e in self.examples), initial=0)
        return model_input(
            device,
            [e.ids for e in self.examples],
            [np.arange(len(e)) for e in self.examples],
            [e.asked + start for e, start in zip(self.examples, starts, strict=False)],
            [e.ids[e.asked + 1] for e in self.examples],
        )


def model_input(device: torch.device, *kinds: Sequence[NDArray[np.int64]]) -> dict[str, torch.Tensor]:
    """What `Row.tensors` returns, of the parts that each of the four is joined from.

    Copied to a GPU together: each copy waits for the GPU, and pinned memory takes longer to get than to copy from.
    """
    names = ("input_ids", "position_ids", "target_index", "target_ids")
    joined = [np.concatenate(kind) for kind in kinds]
    whole = torch.from_numpy(np.concatenate(joined)).to(device)
    ids, positions, index, targets = whole.split([len(kind) for kind in joined])
    return dict(zip(names, (ids[None], positions[None], index, targets), strict=True))


@dataclass(frozen=True)
class Step:
    """What one optimiser step learns from."""

    rows: tuple[Row, ...]

    @property
    def targets(self) -> int:
        return sum(r.targets for r in self.rows)

    @property
    def tokens(self) -> int:
        return sum(r.tokens for r in self.rows)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(sorted(e.sample_id for r in self.rows for e in r.examples))

    def share(self, rank: int, world: int) -> list[Row | None]:
        """The rows of one worker; None where others still have a row and this one has not (all do equally many)."""
        mine: list[Row | None] = list(self.rows[rank::world])
        return mine + [None] * (math.ceil(len(self.rows) / world) - len(mine))


def pack(examples: Sequence[EncodedExample], max_length: int, workers: int = 1) -> list[Row]:
    """Rows of at most `max_length` tokens.

    For one worker as few as first-fit-decreasing finds; for several a multiple of their number if there are as many
    examples, as equally long as may be, so that none waits for another.
    """
    rows = _first_fit(examples, max_length)
    count = math.ceil(len(rows) / workers) * workers
    while workers > 1 and count < len(examples):
        balanced = _emptiest_first(examples, count)
        if all(r.tokens <= max_length for r in balanced):
            return balanced
        count += workers
    return rows if workers == 1 else [Row((e,)) for e in examples]


def _emptiest_first(examples: Sequence[EncodedExample], count: int) -> list[Row]:
    """The longest example first, each into the row that is the shortest so far."""
    bins: list[list[EncodedExample]] = [[] for _ in range(count)]
    lengths = [(0, i) for i in range(count)]
    for example in sorted(examples, key=lambda e: (-len(e), e.sample_id)):
        length, i = heapq.heappop(lengths)
        bins[i].append(example)
        heapq.heappush(lengths, (length + len(example), i))
    return [Row(tuple(b)) for b in bins]


def _first_fit(examples: Sequence[EncodedExample], max_length: int) -> list[Row]:
    bins: list[list[EncodedExample]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: (-len(e), e.sample_id)):
        fit = next((i for i, free in enumerate(room) if free >= len(example)), None)
        if fit is None:
            bins.append([])
            room.append(max_length)
            fit = len(bins) - 1
        bins[fit].append(example)
        room[fit] -= len(example)
    return [Row(tuple(b)) for b in bins]


def plan_steps(
    examples: Sequence[EncodedExample], settings: Lora, seed: int, *, row_tokens: int | None = None, workers: int = 1
) -> list[Step]:
    """Every optimiser step of a training, in order.

    Which examples a step learns from depends on examples, settings and seed alone, so "step k" means the same data on
    any number of workers: the data position of a checkpoint is one number. Each epoch shuffles anew, and packs
    windows of the shuffled examples so that a row mixes what it met by chance.

    Args:
        row_tokens: most tokens of a row, or the longest example's if that is more; None: `settings.max_length`.
        workers: how many share a step's rows. Neither changes what a step learns.
    """
    if not examples:
        return []
    rng = random.Random(seed)
    whole, part = divmod(settings.epochs, 1.0)
    limit = max(row_tokens or settings.max_length, max(len(e) for e in examples))
    steps: list[Step] = []
    for epoch in range(math.ceil(settings.epochs)):
        shuffled = sorted(examples, key=lambda e: e.sample_id)
        rng.shuffle(shuffled)
        if epoch == int(whole):
            shuffled = shuffled[: max(1, round(len(shuffled) * part))]
        steps += [Step(tuple(pack(window, limit, workers))) for window in _windows(shuffled, settings.tokens_per_step)]
    return steps


def _windows(examples: Sequence[EncodedExample], tokens: int) -> list[list[EncodedExample]]:
    """Neighbours of at most `tokens` tokens together, or single examples that are longer."""
    windows: list[list[EncodedExample]] = [[]]
    room = tokens
    for example in examples:
        room -= len(example)
        if room < 0 and windows[-1]:
            windows.append([])
            room = tokens - len(example)
        windows[-1].append(example)
    return windows
