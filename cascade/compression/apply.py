"""Putting an adapter onto a Hugging Face model: a slot of fixed buffers, filled and cleared in place.

`LoraSlot` adds a forward hook to every linear layer once. Empty, the hooks hand the layer's own output through
untouched; filled, they add `scaling * B @ A @ x`. The model's modules, weights and state_dict stay as they are.
A slot may keep several adapters in memory, of which one takes part.
A modifier whose numbers have few bits stays so in the slot (see `cascade.compression.flat`).
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from typing import Any

import torch
from torch import nn

from cascade.compression.adapter import AdapterWeights, BaseRef
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.flat import FlatAdapter, factors_of, layout_of, write_block
from cascade.compression.layout import Held, Layout
from cascade.errors import DataError
from cascade.models.int8 import Int8Linear

_PART = 2**22
"""Bytes that are exchanged at a time."""
Adapter = AdapterWeights | CompressedAdapter | FlatAdapter


class _Patch:
    """What one layer adds; None while the slot is empty."""

    __slots__ = ("factor", "held")

    def __init__(self) -> None:
        self.held: Held | None = None
        self.factor = 1.0

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if self.held is None else self.held.onto(output, args[0], self.factor)


class _Block:
    """Memory for one adapter, and what lies there."""

    __slots__ = ("buffer", "factors", "layout", "views")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.layout: Layout | None = None  # what the views are of; most adapters have the same layout
        self.views: dict[str, Held] = {}
        self.factors: tuple[float, ...] = ()

    @torch.no_grad()
    def write(self, adapter: Adapter, layout: Layout) -> None:
        self.factors = factors_of(adapter, layout)
        part = self.buffer[: layout.nbytes]
        if isinstance(adapter, FlatAdapter):
            adapter.read_into(part)
        elif part.device.type == "cpu":
            write_block(adapter, layout, part)
        else:  # to a GPU in one go, rather than in hundreds of small copies
            staged = torch.empty(layout.nbytes, dtype=torch.uint8)
            write_block(adapter, layout, staged)
            part.copy_(staged)
        self._lay(layout)

    @torch.no_grad()
    def exchange(self, other: _Block) -> None:
        """Exchange what lies in two blocks of one size."""
        for mine, theirs in zip(self.buffer.split(_PART), other.buffer.split(_PART), strict=True):
            before = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(before)
        self.factors, other.factors = other.factors, self.factors
        layouts = self.layout, other.layout
        for block, layout in zip((other, self), layouts, strict=True):
            if layout is not None:
                block._lay(layout)

    def _lay(self, layout: Layout) -> None:
        if layout != self.layout:
            self.views, self.layout = layout.views(self.buffer[: layout.nbytes]), layout


class LoraSlot:
    """Room on a model for one adapter, or for several of which one takes part.

    Each has one block of memory on the model's device; adapters of any rank, also of different ranks per layer, fit
    into any block, since their layers lie in it one after the other and nothing is padded.
    The caller sees to it that nobody computes with the model while the slot is being filled, exchanged or cleared.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int | None = None,
        *,
        adapters: int = 1,
        fixed: bool | None = None,
        base: BaseRef | None = None,
        int8: bool | None = None,
    ) -> None:
        """Install the hooks.

        Args:
            model: any module; its `nn.Linear` and `Int8Linear` layers, by name, can be adapted.
            capacity: bytes of a block: `bytes_for` the largest adapter, which keeps the memory promise; larger ones are
                refused. None: blocks grow to the largest adapter that ever came, or that room was reserved for.
            adapters: most that are kept in memory. A block is taken when there is first something to keep in it.
            fixed: whether the one that takes part always lies in the first block, contents being exchanged, for
                computing that is recorded with its addresses; else any block may take part. None: on GPUs.
            base: what the model is; adapters that name another base are then refused.
            int8: whether adapters are held in 8 bits; None: if the model is. A search says so beside a base in
                bfloat16, which it needs for gradients, to measure the numbers that will be served.
        """
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Int8Linear)}
        if not self._layers:
            raise DataError("the model has no linear layers that an adapter could change")
        weight = next(p for p in model.parameters() if p.is_floating_point())  # levels are not
        self._dtype: torch.dtype = weight.dtype
        self._int8 = any(isinstance(m, Int8Linear) for m in self._layers.values()) if int8 is None else int8
        self._base = base
        self._may_grow = capacity is None
        self._device, self._most = weight.device, adapters
        self._fixed = weight.device.type == "cuda" if fixed is None else fixed
        self._room = self._address = 0
        self._blocks: list[_Block] = []
        self._kept: dict[Hashable, _Block] = {}  # by name; the one that took part longest ago comes first
        self._patches = {name: _Patch() for name in self._layers}
        self._handles = [m.register_forward_hook(self._patches[n].hook) for n, m in self._layers.items()]
        self.reserve(capacity or 0)

    @property
    def dtype(self) -> torch.dtype:
        """That the model computes in."""
        return self._dtype

    @property
    def int8(self) -> bool:
        """Whether adapters are held in 8 bits."""
        return self._int8

    @property
    def resident_bytes(self) -> int:
        """What the slot holds in memory, full or empty."""
        return sum(block.buffer.numel() for block in self._blocks)

    @property
    def address(self) -> int:
        """Where the adapter lies that takes part; 0 while the slot is empty. What was recorded of the model's
        computing with an adapter (a CUDA graph) holds while that adapter lies there."""
        return self._address

    @property
    def is_empty(self) -> bool:
        return all(patch.held is None for patch in self._patches.values())

    def bytes_for(self, adapter: Adapter) -> int:
        """What the slot holds of an adapter."""
        return layout_of(adapter, self._dtype, self._int8).nbytes

    def reserve(self, nbytes: int, adapters: int = 1) -> None:
        """See that as many adapters of so many bytes fit, at most those that the slot may keep. A slot whose blocks
        grow is emptied, keeps nothing, and gives its memory up before it takes more."""
        count = max(min(adapters, self._most), len(self._blocks))
        if nbytes > self._room:
            self.clear()
            self._kept.clear()
            self._blocks.clear()
            self._room = nbytes
        while self._room and len(self._blocks) < count:
            self._blocks.append(_Block(self._room, self._device))

    def fill(self, adapter: Adapter, name: Hashable = None) -> None:
        """Put an adapter in, in place of the one that takes part.

        It is kept under its name, in place of what was kept under that; where the slot keeps all that it may, in
        place of the one that took part longest ago.
        A refused adapter leaves the slot as it was; a failure while decoding leaves it empty.

        Raises:
            DataError: it does not fit this model, its base or the capacity.
            FormatError: its packed streams are inconsistent, or its flat file was cut off.
        """
        self.check(adapter)
        self.clear()
        layout = layout_of(adapter, self._dtype, self._int8)
        self._kept.pop(name, None)
        block = self._vacant(layout.nbytes)
        block.write(adapter, layout)
        self._kept[name] = block
        self.select(name)

    def select(self, name: Hashable) -> bool:
        """Let a kept adapter take part, in place of the one that does; False, and nothing is done, where none of that
        name is kept."""
        block = self._kept.pop(name, None)
        if block is None:
            return False
        self.clear()
        if self._fixed:
            block = self._brought_to_front(block)
        self._kept[name] = block
        for (layer, held), factor in zip(block.views.items(), block.factors, strict=True):
            self._patches[layer].held, self._patches[layer].factor = held, factor
        self._address = block.buffer.data_ptr()
        return True

    def retain(self, names: Container[Hashable]) -> None:
        """Keep no others: their blocks are the next to be filled."""
        self._kept = {name: block for name, block in self._kept.items() if name in names}

    def clear(self) -> None:
        """Let no adapter take part: the model is the base again, bit for bit."""
        for patch in self._patches.values():
            patch.held = None
        self._address = 0

    def remove(self) -> None:
        """Take the hooks off the model for good."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def check(self, adapter: Adapter) -> None:
        """
        Raises:
            DataError: the adapter does not fit this model, its base or the capacity.
        """
        if self._base is not None and adapter.base.sha256 not in ("", self._base.sha256):
            raise DataError(f"the adapter was made for {adapter.base.name or 'another base'}, not {self._base.name}")
        layout = layout_of(adapter, self._dtype, self._int8)
        for name, _, fan_in, fan_out in layout.layers:
            layer = self._layers.get(name)
            if layer is None:
                raise DataError(f"the model has no linear layer {name}: the adapter was made for another base")
            if (layer.in_features, layer.out_features) != (fan_in, fan_out):
                raise DataError(
                    f"layer {name} has {layer.in_features} inputs and {layer.out_features} outputs, the adapter "
                    f"{fan_in} and {fan_out}: it was made for another base"
                )
        if (layout.dtype, layout.int8) != (self._dtype, self._int8):
            said = (
                f"{'int8 and ' if i else ''}{d}" for d, i in ((layout.dtype, layout.int8), (self._dtype, self._int8))
            )
            raise DataError("the flat adapter is in {}, the slot in {}".format(*said))
        if layout.nbytes > self._room and not self._may_grow:
            raise DataError(
                f"the adapter needs {layout.nbytes} bytes, the slot has {self._room}: "
                "make the slot with the capacity of the largest adapter"
            )

    def _brought_to_front(self, block: _Block) -> _Block:
        """The first block, once it holds what the other does, and the other what was in the first."""
        first = self._blocks[0]
        if block is not first:
            first.exchange(block)
            self._kept = {name: block if kept is first else kept for name, kept in self._kept.items()}
        return first

    def _vacant(self, nbytes: int) -> _Block:
        """A block of at least so many bytes in which nothing is kept (any more)."""
        self.reserve(nbytes, len(self._kept) + 1)
        free = [block for block in self._blocks if block not in self._kept.values()]
        return free[0] if free else self._kept.pop(next(iter(self._kept)))
