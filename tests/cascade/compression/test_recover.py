"""Training what compression left: masks and number format stay, answers come back to the uncompressed adapter's."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from torch import nn

from cascade.compression.adapter import AdapterWeights
from cascade.compression.apply import LoraSlot
from cascade.compression.compressed import FACTORS
from cascade.compression.decoding import expanded_sha256
from cascade.compression.format import decode_modifier, encode_modifier
from cascade.compression.packed import compress, expand
from cascade.compression.quantise import decode
from cascade.compression.recipe import Prune, Recipe, Truncate
from cascade.compression.recover import RecoveryEngine, kept_numbers, masks, recover, repack
from cascade.config import Lora
from cascade.errors import DataError
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, mean_loss, run_steps, target_losses
from cascade.training.packing import Row, Step

HARD = Recipe(prune=Prune(density_a=0.1, density_b=0.1), values="int4")
RECIPES = {
    "pruned, A0 known": HARD,
    "rotated": HARD.model_copy(update={"truncate": Truncate(keep=0.5)}),
    "low-rank": Recipe(truncate=Truncate(keep=0.25), values="int8"),
    "signs": HARD.model_copy(update={"values": "ternary"}),
    "ternary": Recipe(truncate=Truncate(keep=0.25), values="ternary"),
    "fp16": HARD.model_copy(update={"values": "fp16"}),
}
SETTINGS = Lora(rank=8, learning_rate=1e-2)


def rows(start: int, count: int) -> list[Row]:
    """Sequences in which every token is the one before plus three: the same to learn everywhere."""

    def example(n: int) -> EncodedExample:
        ids = tuple((n * 11 + 3 * k) % 97 for k in range(24))
        return EncodedExample(f"e{n}", ids, (False,) * 2 + (True,) * 22)

    return [Row((example(n),)) for n in range(start, start + count)]


def plan(steps: int) -> list[Step]:
    packed = [Row(tuple(e for row in rows(4 * n, 4) for e in row.examples)) for n in range(5)]
    return list(islice(cycle(Step((row,)) for row in packed), steps))


@pytest.fixture(scope="module")
def pupil(llama) -> nn.Module:
    """The tiny Llama with a head that can be sure of something."""
    model = copy.deepcopy(llama)
    model.lm_head.weight.data.mul_(10)
    return model.requires_grad_(False)


@pytest.fixture
def losses(pupil):
    slot = LoraSlot(pupil)

    def measure(adapter) -> np.ndarray:
        """Of every target of rows that nobody trains on."""
        slot.fill(adapter)
        try:
            return target_losses(TargetLoss(pupil), rows(60, 6), torch.device("cpu"))
        finally:
            slot.clear()

    yield measure
    slot.remove()


class LearnAnswers(RecoveryEngine):
    """Learns the examples' own answers instead."""

    def loss(self, row: Row) -> torch.Tensor:
        return self.module(**self.module.inputs(row, self.device))


@pytest.fixture(scope="module")
def taught(pupil, untaught) -> AdapterWeights:
    """An adapter that has learned the sequence."""
    engine = LearnAnswers(pupil, compress(untaught, Recipe()), untaught, SETTINGS)
    list(run_steps(engine, plan(60), SETTINGS))
    engine.close()
    return expand(engine.compressed, verify=False)


@pytest.mark.parametrize("name", RECIPES)
def test_what_hard_compression_lost_comes_back_with_the_mask_as_it_was(pupil, taught, losses, name):
    before = compress(taught, RECIPES[name])
    after, curve = recover(pupil, before, taught, plan(15), SETTINGS)
    whole, lost, found = losses(taught), losses(before), losses(after)
    assert whole.mean() + 2 < lost.mean(), "the adapter has learned, and hard compression has taken it"
    assert found.mean() < lost.mean() - 0.1 * (lost.mean() - whole.mean())
    assert abs(found - whole).mean() < 0.9 * abs(lost - whole).mean()
    assert curve[-1].loss < curve[0].loss
    assert [report.step for report in curve] == list(range(15))
    assert after.recipe == before.recipe
    assert [layer.kept for layer in after.layers] == [layer.kept for layer in before.layers]
    for factor in FACTORS:
        assert all(map(np.array_equal, masks(before, factor), masks(after, factor)))
        assert not all(map(np.array_equal, kept_numbers(before, factor), kept_numbers(after, factor)))
    expanded = expand(after)
    for layer, mask in zip(after.layers, masks(after, "b"), strict=True):
        assert not expanded.layers[layer.name].b.T.ravel()[~mask].any(), "a pruned number came back"


def test_the_base_stays_as_it_is(llama, adapter):
    weights = {n: p.clone() for n, p in llama.named_parameters()}
    recover(llama, compress(adapter, HARD), adapter, plan(2), SETTINGS)
    assert all(torch.equal(p, weights[n]) for n, p in llama.named_parameters())
    assert not any(module._forward_hooks for module in llama.modules())


def test_what_is_trained_with_is_what_the_file_holds(llama, adapter):
    engine = LearnAnswers(llama, compress(adapter, HARD), adapter, SETTINGS)
    step = plan(1)[0]
    for row in step.rows:
        engine.backward(engine.loss(row))
    engine.step(1e-2)
    trained_with = float(engine.loss(step.rows[0]).detach())
    engine.close()
    made = replace(engine.compressed, expanded_sha256=expanded_sha256(engine.compressed))
    slot = LoraSlot(llama)
    slot.fill(decode_modifier(encode_modifier(made))[1])
    served = mean_loss(TargetLoss(llama), step.rows[:1], torch.device("cpu")) * step.rows[0].targets
    assert trained_with == pytest.approx(served, abs=1e-3)
    slot.remove()


def test_answers_that_the_adapter_does_not_give_are_not_learned(llama, adapter):
    """What is kept exactly has nothing to recover, however wrong its answers are."""
    compressed = compress(adapter, Recipe(values="fp16"))
    engine = RecoveryEngine(llama, compressed, expand(compressed), SETTINGS)
    row = plan(1)[0].rows[0]
    loss = engine.loss(row)
    engine.backward(loss)
    gradients = [p.grad.abs().max() for f in FACTORS for p in engine._stored[f]]
    engine.close()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert max(gradients) < 1e-4 < mean_loss(TargetLoss(llama), [row], torch.device("cpu"))


@pytest.mark.parametrize("name", ["pruned, A0 known", "signs"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(llama, adapter, name):
    compressed = compress(adapter, RECIPES[name])
    engine = RecoveryEngine(llama, compressed, adapter, SETTINGS)
    row = plan(1)[0].rows[0]
    before = float(engine.loss(row).detach())
    engine.backward(engine.loss(row) * math.nan)
    assert math.isnan(engine.step(1e-2))
    assert engine.compressed is compressed
    assert float(engine.loss(row).detach()) == before
    engine.backward(engine.loss(row))
    assert math.isfinite(engine.step(1e-2))
    assert engine.compressed is not compressed
    assert math.isfinite(float(engine.loss(row).detach()))
    engine.close()


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_numbers_packed_again_expand_to_the_same(adapter, name):
    compressed = compress(adapter, RECIPES[name])
    again = repack(compressed, kept_numbers(compressed, "a"), kept_numbers(compressed, "b"))
    one, two = expand(compressed), expand(again, verify=False)
    for layer, pair in one.layers.items():
        assert np.allclose(pair.a, two.layers[layer].a, rtol=2e-3, atol=1e-6)
        assert np.allclose(pair.b, two.layers[layer].b, rtol=2e-3, atol=1e-6)


def test_a_modifier_of_another_base_is_refused(adapter):
    with pytest.raises(DataError, match="another base"):
        recover(nn.Sequential(nn.Linear(3, 3)), compress(adapter, HARD), adapter, plan(1), SETTINGS)


def test_decode_is_what_kept_numbers_gives(adapter):
    compressed = compress(adapter, Recipe(values="fp16"))
    numbers = np.concatenate(kept_numbers(compressed, "b"))
    exponents = np.repeat([s.exponents[1] for s in compressed.layers], [s.kept[1] for s in compressed.layers])
    flat = decode(compressed.b.values, compressed.b.scales, "fp16", 64, numbers.size)
    assert np.array_equal(numbers, np.ldexp(flat, exponents))
