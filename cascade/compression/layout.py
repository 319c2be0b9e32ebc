"""How an adapter lies in a block of memory while it is served, and how a layer computes with its part of the block.

There are three forms, each all that a layer needs of it in memory:

- plain: every number in the model's own type;
- levels, for modifiers whose numbers have few bits and of which nothing was pruned: a byte for each number, or half of
  one where it has four bits or less, and the file's own fp16 scale per group. A layer is brought to the model's type
  when it computes, both factors at once, and every number is rounded to it once;
- int8, beside a base in 8 bits: a byte for each number and one scale for each component, multiplied by the base's own
  kernel (`cascade.models.int8`). Numbers of any modifier are rounded for it, so a search must measure this form if it
  is what will be served.

What all of a layer's numbers share (the adapter's scaling, powers of two) multiplies their product, not them: so they
are the file's own, whatever the scaling is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear

from cascade.compression.compressed import CompressedAdapter
from cascade.compression.packed import filled, is_low_bit, level_bits, level_groups
from cascade.models.int8 import BLOCK, product

ALIGNED = 64
"""Bytes that the levels of a block begin at a multiple of."""
LayerShape = tuple[str, int, int, int]
"""Name, rank, inputs, outputs."""


class Held(Protocol):
    """One layer's part of a block."""

    def onto(self, output: torch.Tensor, rows: torch.Tensor, factor: float) -> torch.Tensor:
        """The output (…, outputs) of a layer for rows (…, inputs), with `factor * B @ A @ rows` added."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Both factors in the model's type: A (rank, inputs) and B transposed (rank, outputs)."""

    a: torch.Tensor
    bt: torch.Tensor

    def onto(self, output: torch.Tensor, rows: torch.Tensor, factor: float) -> torch.Tensor:
        return _added(output, rows, self.a, self.bt, factor)


@dataclass(frozen=True, slots=True)
class Levels:
    """Both factors in few bits, one after the other, each filled up to whole groups.

    Attributes:
        levels: int8, (groups, group); of 4 bits (groups / 2, group): the lower ones of all bytes are the first half
            of the groups.
        scales: fp16, (groups, 1).
        shape: rank, inputs, outputs.
    """

    levels: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, inputs) and B transposed (rank, outputs); sixteen times as large where they have 4 bits."""
        (rank, fan_in, fan_out), (groups, group) = self.shape, self.levels.shape
        levels = self.levels
        if groups != len(self.scales):
            levels = levels.new_empty(2, groups, group)
            torch.bitwise_left_shift(self.levels, 4, out=levels[0])
            torch.bitwise_and(self.levels, -16, out=levels[1])
            levels = levels.view(-1, group)
        numbers = levels.float().mul_(self.scales.float()).to(self.dtype).view(-1)
        start = -(-rank * fan_in // group) * group
        a, bt = numbers[: rank * fan_in], numbers[start : start + rank * fan_out]
        return a.view(rank, fan_in), bt.view(rank, fan_out)

    def onto(self, output: torch.Tensor, rows: torch.Tensor, factor: float) -> torch.Tensor:
        return _added(output, rows, *self.matrices(), factor)


@dataclass(frozen=True, slots=True)
class Bytes:
    """Both factors in 8 bits with one bfloat16 scale for each component, the adapter's scaling in it.

    Attributes:
        a: (rank, inputs).
        b: (outputs, rank), of as much of the rank as makes whole blocks of the kernel.
        rest: (rank, outputs), of the rest of the rank, which `filled` may leave none of.
    """

    a: torch.Tensor
    b: torch.Tensor
    rest: torch.Tensor
    scales: torch.Tensor

    def onto(self, output: torch.Tensor, rows: torch.Tensor, factor: float) -> torch.Tensor:
        low = product(rows.reshape(-1, rows.shape[-1]), self.a, self.scales)
        flat, whole = output.reshape(-1, output.shape[-1]), self.b.shape[1]
        if len(self.rest):
            flat = torch.addmm(flat, low[:, whole:], self.rest.to(low.dtype))
        if whole:
            flat = flat + product(low[:, :whole], self.b)
        return flat.view_as(output)


def _added(output: torch.Tensor, rows: torch.Tensor, a: torch.Tensor, bt: torch.Tensor, factor: float) -> torch.Tensor:
    low = linear(rows, a).view(-1, len(a))
    return torch.addmm(output.reshape(-1, output.shape[-1]), low, bt, alpha=factor).view_as(output)


@dataclass(frozen=True, slots=True)
class Layout:
    """How an adapter lies in a block.

    Attributes:
        layers: in the block's order.
        dtype: that the model computes in.
        group: levels that share a scale, of the form "levels"; else None.
        bits: of a level.
        int8: whether it is the form "int8". In both forms first come all scales, then all levels.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    group: int | None = None
    bits: int = 8
    int8: bool = False

    @property
    def parameters(self) -> int:
        """Numbers that the adapter has."""
        return sum(rank * (fan_in + fan_out) for _, rank, fan_in, fan_out in self.layers)

    @property
    def nbytes(self) -> int:
        """Size of the block."""
        if self.int8:
            return self.border + sum(filled(rank) * (fan_in + fan_out) for _, rank, fan_in, fan_out in self.layers)
        if self.group is None:
            return self.parameters * self.dtype.itemsize
        return self.border + sum(self.groups) * self.group * self.bits // 8

    @property
    def border(self) -> int:
        """Byte at which the levels begin."""
        if not self.int8 and self.group is None:
            return 0
        scales = sum(filled(rank) for _, rank, _, _ in self.layers) if self.int8 else sum(self.groups)
        return -(-2 * scales // ALIGNED) * ALIGNED

    @property
    def groups(self) -> list[int]:
        """Of each layer, of the form "levels"."""
        assert self.group is not None
        return [level_groups(rank, fan_in, fan_out, self.group, self.bits) for _, rank, fan_in, fan_out in self.layers]

    def views(self, block: torch.Tensor) -> dict[str, Held]:
        """Each layer's part of a block of `nbytes` bytes."""
        cut = self._bytes if self.int8 else self._plain if self.group is None else self._levels
        return dict(zip((name for name, *_ in self.layers), cut(block), strict=True))

    def _plain(self, block: torch.Tensor) -> Iterator[Plain]:
        numbers, at = block.view(self.dtype), 0
        for _, rank, fan_in, fan_out in self.layers:
            between, end = at + rank * fan_in, at + rank * (fan_in + fan_out)
            yield Plain(numbers[at:between].view(rank, fan_in), numbers[between:end].view(rank, fan_out))
            at = end

    def _levels(self, block: torch.Tensor) -> Iterator[Levels]:
        assert self.group is not None
        scales = block[: self.border].view(torch.float16)
        levels, at, start = block[self.border :].view(torch.int8).view(-1, self.group), 0, 0
        for (_, rank, fan_in, fan_out), groups in zip(self.layers, self.groups, strict=True):
            end = start + groups * self.bits // 8
            yield Levels(levels[start:end], scales[at : at + groups, None], (rank, fan_in, fan_out), self.dtype)
            at, start = at + groups, end

    def _bytes(self, block: torch.Tensor) -> Iterator[Bytes]:
        scales, at = block[: self.border].view(torch.bfloat16), 0
        levels, start = block[self.border :].view(torch.int8), 0
        for _, least, fan_in, fan_out in self.layers:
            rank = filled(least)
            whole = rank - rank % BLOCK
            sizes = (rank * fan_in, fan_out * whole, (rank - whole) * fan_out)
            a, b, rest = levels[start : start + sum(sizes)].split(sizes)
            yield Bytes(a.view(rank, fan_in), b.view(fan_out, whole), rest.view(-1, fan_out), scales[at : at + rank])
            at, start = at + rank, start + sum(sizes)


def compressed_layout(adapter: CompressedAdapter, dtype: torch.dtype, int8: bool = False) -> Layout:
    """How a compressed adapter lies in the block of a model that computes in this dtype, and may be held in 8 bits."""
    layers = tuple((layer.name, layer.rank, layer.fan_in, layer.fan_out) for layer in adapter.layers)
    if int8 or not is_low_bit(adapter):
        return Layout(layers, dtype, int8=int8)
    return Layout(layers, dtype, adapter.recipe.group, level_bits(adapter.recipe.values))
