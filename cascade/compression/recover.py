"""A short training of what compression left: the masks stay, the numbers learn, in the format that they are stored in.

What they learn is to answer as the uncompressed adapter does: the Kullback-Leibler divergence from its probabilities,
at every target token of training examples (distillation, Hinton et al., arXiv:1503.02531). The examples' own answers
would teach anew what the adapter has learned already, and lead away from it.

Forward and backward run with the numbers as the file holds them; the step is made on float32 ones behind them, which
are then rounded again (the straight-through estimator, Bengio et al., arXiv:1308.3432). So what is learned has the
rounding in it, and the file is of the recipe that it was before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cascade.compression.adapter import AdapterWeights
from cascade.compression.compressed import FACTORS, CompressedAdapter, FactorName, LayerSpec, PackedFactor
from cascade.compression.decoding import expanded_sha256, iter_layers
from cascade.compression.quantise import encode, unit_exponent
from cascade.config import Lora
from cascade.errors import DataError
from cascade.training.loop import TargetLoss, clip_or_drop, run_steps, set_rate
from cascade.training.measures import StepReport
from cascade.training.packing import Row, Step

Numbers = list[NDArray[np.float32]]
"""Per layer, what is kept of a factor (of A's change where A0 is known, of B transposed): flat, in order."""


def recover(
    model: nn.Module, compressed: CompressedAdapter, trained: AdapterWeights, plan: Sequence[Step], settings: Lora
) -> tuple[CompressedAdapter, list[StepReport]]:
    """Train the kept numbers of a compressed adapter to answer as the adapter that it was made of.

    Args:
        model: the bare base (no slot filled), on any device, gradients off; it is not changed.
        trained: the uncompressed adapter.
        plan: steps on examples that may be learned from.
        settings: learning rate, its schedule, and the clipping of gradients.

    Returns:
        The adapter after the last step, masks and recipe as they were, and what each step measured: its loss is the
        mean divergence per target token (nats).

    Raises:
        DataError: the model lacks one of the adapter's layers, or several steps in a row were not finite.
    """
    engine = RecoveryEngine(model, compressed, trained, settings)
    try:
        curve = list(run_steps(engine, plan, settings))
    finally:
        engine.close()
    return replace(engine.compressed, expanded_sha256=expanded_sha256(engine.compressed)), curve


class RecoveryEngine:
    """An engine (`cascade.training.loop`) whose parameters are the kept numbers; `compressed` is them as stored."""

    def __init__(
        self, model: nn.Module, compressed: CompressedAdapter, trained: AdapterWeights, settings: Lora
    ) -> None:
        modules = dict(model.named_modules())
        layers = [modules.get(spec.name) for spec in compressed.layers]
        if missing := [s.name for s, m in zip(compressed.layers, layers, strict=True) if not isinstance(m, nn.Linear)]:
            raise DataError(f"the model has no linear layer {missing[0]}: the modifier was made for another base")
        self.module, self.clip = TargetLoss(model), settings.gradient_clip
        self.device = next(model.parameters()).device
        self.compressed = compressed
        self._indices = {f: [self._on_device(np.flatnonzero(m)) for m in masks(compressed, f)] for f in FACTORS}
        kept = {f: kept_numbers(compressed, f) for f in FACTORS}
        self._behind = {f: [nn.Parameter(self._on_device(n)) for n in kept[f]] for f in FACTORS}
        everything = [p for f in FACTORS for p in self._behind[f]]
        self._optimizer = torch.optim.AdamW(everything, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self._stored: dict[FactorName, list[nn.Parameter]] = {f: [] for f in FACTORS}
        self._patches, self._handles = [], []
        for (name, a, bt), layer in zip(iter_layers(compressed), layers, strict=True):
            assert isinstance(layer, nn.Linear)
            pair = trained.layers[name]
            stored_a, stored_b, whole_a, whole_b = (
                self._on_device(x).to(layer.weight.dtype) for x in (a, bt, pair.a, pair.b.T)
            )
            stored_a, stored_b = nn.Parameter(stored_a), nn.Parameter(stored_b)
            self._stored["a"].append(stored_a)
            self._stored["b"].append(stored_b)
            patch = _Patch(
                _Product(stored_a, stored_b, compressed.scaling), _Product(whole_a, whole_b, trained.scaling)
            )
            self._patches.append(patch)
            self._handles.append(layer.register_forward_hook(patch))

    def _on_device(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def loss(self, row: Row) -> torch.Tensor:
        """Divergence from the uncompressed adapter's probabilities, summed over the row's targets (nats)."""
        inputs = self.module.inputs(row, self.device)
        del inputs["target_ids"]
        with torch.no_grad(), self._uncompressed():
            wanted = self.module.logits(**inputs).float().log_softmax(-1)
        found = self.module.logits(**inputs).float().log_softmax(-1)
        return nn.functional.kl_div(found, wanted, log_target=True, reduction="sum")

    @contextmanager
    def _uncompressed(self) -> Iterator[None]:
        """The model with the adapter as it was trained."""
        for patch in self._patches:
            patch.product = patch.whole
        try:
            yield
        finally:
            for patch in self._patches:
                patch.product = patch.stored

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        for factor in FACTORS:
            each = zip(self._behind[factor], self._stored[factor], self._indices[factor], strict=True)
            for behind, stored, index in each:
                assert stored.grad is not None
                behind.grad = stored.grad.float().ravel()[index]
                stored.grad = None
        set_rate(self._optimizer, learning_rate)
        norm = float(clip_or_drop([p for f in FACTORS for p in self._behind[f]], self.clip))
        if math.isfinite(norm):
            self._optimizer.step()
            self._round()
        return norm

    @torch.no_grad()
    def _round(self) -> None:
        """Bring what is computed with in line with what is behind it."""
        numbers = {f: [p.detach().cpu().numpy() for p in self._behind[f]] for f in FACTORS}
        self.compressed = repack(self.compressed, numbers["a"], numbers["b"])
        for place, (_, a, bt) in enumerate(iter_layers(self.compressed)):
            self._stored["a"][place].copy_(torch.from_numpy(a))
            self._stored["b"][place].copy_(torch.from_numpy(bt))

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class _Product:
    """One layer's share of an adapter: s (x Aᵀ) Bᵀ."""

    def __init__(self, a: torch.Tensor, bt: torch.Tensor, scaling: float) -> None:
        self.a, self.bt, self.scaling = a, bt, scaling

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaling * (nn.functional.linear(x, self.a) @ self.bt)


class _Patch:
    """Adds to one layer's output what is stored of the adapter there, or the whole of it."""

    def __init__(self, stored: _Product, whole: _Product) -> None:
        self.stored, self.whole = stored, whole
        self.product = stored

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + self.product(args[0])


def masks(compressed: CompressedAdapter, factor: FactorName) -> list[NDArray[np.bool_]]:
    """Per layer, which numbers of a factor are kept: flat, all of them where nothing was pruned."""
    packed, found, at = (compressed.a if factor == "a" else compressed.b), [], 0
    for layer in compressed.layers:
        size = layer.size(factor)
        if packed.mask is None:
            found.append(np.ones(size, np.bool_))
            continue
        taken = -(-size // 8)
        found.append(np.unpackbits(packed.mask[at : at + taken], count=size).view(np.bool_))
        at += taken
    return found


def kept_numbers(compressed: CompressedAdapter, factor: FactorName) -> Numbers:
    """Per layer, the numbers of a factor that are kept, as they are decoded."""
    change = iter_layers(replace(compressed, init_seed=None))  # A's change, without its start
    dense = (a if factor == "a" else bt for _, a, bt in change)
    return [d.ravel()[mask] for d, mask in zip(dense, masks(compressed, factor), strict=True)]


def repack(compressed: CompressedAdapter, a: Numbers, b: Numbers) -> CompressedAdapter:
    """The same masks with other numbers, in the same number format; the hash is left empty."""
    packed_a, exponents_a = _packed(compressed, compressed.a, a)
    packed_b, exponents_b = _packed(compressed, compressed.b, b)
    places = zip(compressed.layers, exponents_a, exponents_b, strict=True)
    layers: tuple[LayerSpec, ...] = tuple(replace(spec, exponents=(ea, eb)) for spec, ea, eb in places)
    return replace(compressed, layers=layers, a=packed_a, b=packed_b, expanded_sha256="")


def _packed(compressed: CompressedAdapter, before: PackedFactor, numbers: Numbers) -> tuple[PackedFactor, list[int]]:
    recipe = compressed.recipe
    exponents = [unit_exponent(n) for n in numbers]
    coded = [
        encode(np.ldexp(n, -exponent), recipe.codec, recipe.group)
        for n, exponent in zip(numbers, exponents, strict=True)
    ]
    values, scales = (np.concatenate(parts) for parts in zip(*coded, strict=True))
    return replace(before, values=values, scales=scales), exponents
