"""Putting an adapter onto a Hugging Face model: one slot of fixed buffers, filled and cleared in place.

`LoraSlot` adds a forward hook to every linear layer once. Empty, the hooks hand the layer's own output through
untouched; filled, they add `scaling * B @ A @ x`. The model's modules, weights and state_dict stay as they are.
A modifier whose numbers have few bits stays so in the slot (see `cascade.compression.flat`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cascade.compression.adapter import AdapterWeights, BaseRef
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.flat import FlatAdapter, factors_of, layout_of, write_block
from cascade.compression.layout import Held, Layout
from cascade.errors import DataError
from cascade.models.int8 import Int8Linear

Adapter = AdapterWeights | CompressedAdapter | FlatAdapter


class _Patch:
    """What one layer adds; None while the slot is empty."""

    __slots__ = ("factor", "held")

    def __init__(self) -> None:
        self.held: Held | None = None
        self.factor = 1.0

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if self.held is None else self.held.onto(output, args[0], self.factor)


class LoraSlot:
    """Room for one adapter on a model.

    The buffer is one block of memory on the model's device; adapters of any rank, also of different ranks per layer,
    lie in it one after the other, so nothing is padded.
    The caller sees to it that nobody computes with the model while the slot is being filled or cleared.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int | None = None,
        *,
        base: BaseRef | None = None,
        int8: bool | None = None,
    ) -> None:
        """Install the hooks.

        Args:
            model: any module; its `nn.Linear` and `Int8Linear` layers, by name, can be adapted.
            capacity: bytes that fit: `bytes_for` the largest adapter, which keeps the memory promise; larger ones are
                refused. None: the buffer grows to the largest adapter that ever came, or that room was reserved for.
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
        self._buffer = torch.zeros(capacity or 0, dtype=torch.uint8, device=weight.device)
        self._patches = {name: _Patch() for name in self._layers}
        self._views: dict[str, Held] = {}
        self._viewed: Layout | None = None  # what the views are of; most adapters have the same layout
        self._handles = [m.register_forward_hook(self._patches[n].hook) for n, m in self._layers.items()]

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
        return self._buffer.numel()

    @property
    def is_empty(self) -> bool:
        return all(patch.held is None for patch in self._patches.values())

    def bytes_for(self, adapter: Adapter) -> int:
        """What the slot holds of an adapter."""
        return layout_of(adapter, self._dtype, self._int8).nbytes

    def reserve(self, nbytes: int) -> None:
        """See that so many bytes fit. A slot that grows is emptied, and gives its memory up before it takes more."""
        if nbytes <= self.resident_bytes:
            return
        self.clear()
        self._views, self._viewed = {}, None
        self._buffer = self._buffer.new_empty(0)
        self._buffer = self._buffer.new_zeros(nbytes)

    def fill(self, adapter: Adapter) -> None:
        """Put an adapter in, in place of the one that is there.

        A refused adapter leaves the slot as it was; a failure while decoding leaves it empty.

        Raises:
            DataError: it does not fit this model, its base or the capacity.
            FormatError: its packed streams are inconsistent, or its flat file was cut off.
        """
        self.check(adapter)
        self.clear()
        try:
            self._copy(adapter)
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Take the adapter out: the model is the base again, bit for bit."""
        for patch in self._patches.values():
            patch.held = None

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
        if layout.nbytes > self.resident_bytes and not self._may_grow:
            raise DataError(
                f"the adapter needs {layout.nbytes} bytes, the slot has {self.resident_bytes}: "
                "make the slot with the capacity of the largest adapter"
            )

    @torch.no_grad()
    def _copy(self, adapter: Adapter) -> None:
        layout = layout_of(adapter, self._dtype, self._int8)
        factors = factors_of(adapter, layout)
        self.reserve(layout.nbytes)
        block = self._buffer[: layout.nbytes]
        if isinstance(adapter, FlatAdapter):
            adapter.read_into(block)
        elif block.device.type == "cpu":
            write_block(adapter, layout, block)
        else:  # to a GPU in one go, rather than in hundreds of small copies
            staged = torch.empty(layout.nbytes, dtype=torch.uint8)
            write_block(adapter, layout, staged)
            block.copy_(staged)
        if layout != self._viewed:
            self._views, self._viewed = layout.views(block), layout
        for (name, held), factor in zip(self._views.items(), factors, strict=True):
            self._patches[name].held, self._patches[name].factor = held, factor
