"""The slot changes a model exactly as stock PEFT does with the exported folder, and leaves no trace when cleared."""

from __future__ import annotations

import copy
import gc
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, save_peft_folder
from cascade.compression.apply import LoraSlot
from cascade.compression.methods import Prune, Recipe, Truncate
from cascade.compression.packed import compress, expand, is_low_bit, resident_bytes
from cascade.errors import DataError, FormatError

RECIPES = {
    "dense": Recipe(),
    "pruned": Recipe(prune=Prune(density_a=0.12, density_b=0.12, rescale_b=3.0)),
    "pruned int4": Recipe(prune=Prune(density_a=0.3, density_b=0.3), values="int4"),
    "truncated": Recipe(truncate=Truncate(keep=0.5), values="int8"),
    "ranks that differ": Recipe(truncate=Truncate(keep=0.4, allocation="global")),
    "energy": Recipe(truncate=Truncate(energy=0.7), values="ternary"),
}


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama)


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_logits_equal_stock_peft_with_the_exported_folder(model, llama, adapter, tokens, tmp_path: Path, recipe):
    compressed = compress(adapter, recipe)
    folder = save_peft_folder(expand(compressed), tmp_path / "peft")
    peft = logits(PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval(), tokens)
    slot = LoraSlot(model, 4 * adapter.parameters)
    slot.fill(compressed)
    filled = logits(model, tokens)
    assert (filled - peft).abs().max() < 1e-5
    assert (filled - logits(llama, tokens)).abs().max() > 1e-2  # and it does change something
    slot.fill(expand(compressed))
    assert torch.equal(logits(model, tokens), filled)


def test_empty_slot_is_the_base_bit_for_bit(model, llama, adapter, tokens):
    before = logits(llama, tokens)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    slot = LoraSlot(model, 4 * adapter.parameters)
    assert slot.is_empty
    assert torch.equal(logits(model, tokens), before)
    slot.fill(adapter)
    assert not slot.is_empty
    assert not torch.equal(logits(model, tokens), before)
    slot.clear()
    assert slot.is_empty
    assert torch.equal(logits(model, tokens), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    slot.fill(adapter)
    slot.remove()
    assert torch.equal(logits(model, tokens), before)


def test_generation_uses_the_slot(model, adapter, tokens):
    slot = LoraSlot(model, 4 * adapter.parameters)
    plain = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    slot.fill(adapter)
    changed = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    slot.clear()
    again = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert plain.shape != changed.shape or not torch.equal(plain, changed)
    assert torch.equal(plain, again)


def test_a_refill_leaves_nothing_of_the_one_before(model, llama, adapter, tokens):
    small = expand(compress(adapter, Recipe(truncate=Truncate(keep=0.3))))
    fewer = replace(small, layers=dict(list(small.layers.items())[:4]))
    slot = LoraSlot(model, 4 * adapter.parameters)
    slot.fill(fewer)
    alone = logits(model, tokens)
    slot.fill(adapter)
    slot.fill(fewer)
    assert torch.equal(logits(model, tokens), alone)


def test_a_slot_that_grows_gives_its_memory_up_first(model, adapter, monkeypatch):
    small, there = compress(adapter, RECIPES["pruned int4"]), []
    slot = LoraSlot(model)
    slot.fill(small)
    before = weakref.ref(slot._blocks[0].buffer)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: there.append(before()) or zeros(*size, **more))
    room = 2 * slot.bytes_for(small)
    slot.reserve(room)
    assert there == [None]
    assert slot.is_empty
    slot.fill(small)
    assert len(there) == 1
    assert slot.resident_bytes == room


def test_hundreds_of_fills_do_not_grow(model, adapter):
    one = compress(adapter, RECIPES["pruned int4"])
    two = expand(compress(adapter, RECIPES["truncated"]))
    slot = LoraSlot(model, 4 * adapter.parameters)
    for content in (one, two) * 5:
        slot.fill(content)
    gc.collect()
    tensors = sum(torch.is_tensor(x) for x in gc.get_objects())
    held, block = slot.resident_bytes, slot.address
    tracemalloc.start()
    for i in range(300):
        slot.fill(one if i % 10 == 0 else two)
    slot.fill(two)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(torch.is_tensor(x) for x in gc.get_objects()) <= tensors
    assert grown < 30_000
    assert (slot.resident_bytes, slot.address) == (held, block)


@pytest.mark.parametrize("fixed", [False, True])
def test_kept_adapters_are_exchanged_and_nothing_grows(model, adapter, tokens, fixed):
    contents = {n: expand(compress(adapter, RECIPES[n])) for n in ("pruned int4", "truncated")} | {"whole": adapter}
    slot, alone, exchanged = LoraSlot(model, 4 * adapter.parameters, adapters=2, fixed=fixed), {}, 0
    for name, content in contents.items():
        slot.fill(content)
        alone[name] = logits(model, tokens)
    slot.retain(())

    def swap(name):
        nonlocal exchanged
        if slot.select(name):
            exchanged += 1
        else:
            slot.fill(contents[name], name)

    order, addresses = [*contents, "whole", "truncated"], set()  # the last three are kept
    for name in order * 2:
        swap(name)
        addresses.add(slot.address)
        assert torch.equal(logits(model, tokens), alone[name])
    assert exchanged == 5
    assert len(addresses) == (1 if fixed else 2)
    gc.collect()
    tensors = sum(torch.is_tensor(x) for x in gc.get_objects())
    tracemalloc.start()
    for i in range(300):
        swap(order[i % 5])
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert exchanged == 185
    assert sum(torch.is_tensor(x) for x in gc.get_objects()) <= tensors
    assert grown < 30_000
    assert slot.resident_bytes == 2 * 4 * adapter.parameters


def test_what_cannot_be_selected_leaves_the_slot_as_it_is(model, llama, adapter, tokens):
    slot = LoraSlot(model, adapters=2)
    slot.fill(adapter, "kept")
    filled, address = logits(model, tokens), slot.address
    assert not slot.select("unknown")
    assert slot.address == address
    assert torch.equal(logits(model, tokens), filled)
    slot.clear()
    assert slot.address == 0
    assert torch.equal(logits(model, tokens), logits(llama, tokens))
    assert slot.select("kept")
    assert slot.address == address
    slot.retain(["another"])
    assert not slot.select("kept")
    slot.fill(adapter, "kept")
    slot.reserve(2 * slot.resident_bytes)  # blocks that grow keep nothing
    assert not slot.select("kept")
    assert slot.is_empty


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_slot_in_8_bits_holds_a_byte_for_each_number(model, adapter, recipe):
    compressed = compress(adapter, recipe)
    slot = LoraSlot(model.to(torch.bfloat16), int8=True)
    slot.fill(compressed)
    assert slot.resident_bytes == slot.bytes_for(compressed) == resident_bytes(compressed, int8=True)
    ranks = sum(spec.rank for spec in compressed.layers)
    assert compressed.parameters < slot.resident_bytes < compressed.parameters + 2 * ranks + 64


@pytest.mark.parametrize("rank", [15, 30, 45])
def test_components_that_only_fill_up_are_counted_in_8_bits(model, foreign, rank):
    layers = {
        name: LoraPair(np.resize(pair.a, (rank, pair.a.shape[1])), np.resize(pair.b, (pair.b.shape[0], rank)))
        for name, pair in foreign.layers.items()
    }
    compressed = compress(replace(foreign, layers=layers, rank=rank), Recipe(values="int8"))
    slot = LoraSlot(model.to(torch.bfloat16), int8=True)
    assert slot.bytes_for(compressed) == resident_bytes(compressed, int8=True) > 1.06 * compressed.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_slot_holds_exactly_what_is_promised(model, adapter, recipe, dtype):
    compressed = compress(adapter, recipe)
    slot = LoraSlot(model.to(dtype))
    assert slot.resident_bytes == 0
    slot.fill(compressed)
    assert (
        slot.resident_bytes == slot.bytes_for(compressed) == resident_bytes(compressed, bytes_per_number=dtype.itemsize)
    )
    exact = LoraSlot(model, slot.resident_bytes)
    exact.fill(compressed)
    with pytest.raises(DataError, match="bytes"):
        LoraSlot(model, slot.resident_bytes - 1).fill(compressed)


@pytest.mark.parametrize("values", ["int8", "int4", "ternary"])
@pytest.mark.parametrize("group", [8, 64, 4096])
def test_few_bits_stay_few_in_memory_and_mean_the_same_numbers(model, foreign, values, group):
    recipe = Recipe(truncate=Truncate(keep=0.5), values=values, group=group)
    compressed = compress(foreign, recipe)
    assert is_low_bit(compressed)
    assert resident_bytes(compressed, bytes_per_number=4) < 2 * compressed.parameters or group == 4096
    slot = LoraSlot(model)
    slot.fill(compressed)
    exact = expand(compressed).layers
    for spec in compressed.layers:
        patch, pair, sixteenth = slot._patches[spec.name], exact[spec.name], 0 if values == "int8" else 4
        assert patch.held.levels.dtype == torch.int8
        for held, wanted, exponent in zip(patch.held.matrices(), (pair.a, pair.b.T), spec.exponents, strict=True):
            assert np.array_equal(np.ldexp(held.numpy(), exponent - sixteenth), wanted)
        assert patch.factor == np.ldexp(compressed.scaling, sum(spec.exponents) - 2 * sixteenth)


@pytest.mark.parametrize("scaling", [1.3, 16 / 7**0.5, -0.4])
@pytest.mark.parametrize("values", ["fp16", "int8", "int4"])
def test_any_scaling_leaves_the_numbers_as_they_are_in_the_file(model, foreign, tokens, tmp_path, values, scaling):
    compressed = compress(replace(foreign, scaling=scaling), Recipe(truncate=Truncate(keep=0.5), values=values))
    slot = LoraSlot(model)
    slot.fill(compressed)
    for spec, pair in zip(compressed.layers, expand(compressed).layers.values(), strict=True):
        held = slot._patches[spec.name].held
        _, bt = (held.a, held.bt) if values == "fp16" else held.matrices()
        power = 0 if values == "fp16" else spec.exponents[1] - (4 if values == "int4" else 0)
        assert np.array_equal(np.ldexp(bt.numpy(), power), pair.b.T)
    filled = logits(model, tokens)
    folder = save_peft_folder(expand(compressed), tmp_path / "peft")
    slot.remove()
    peft = logits(PeftModel.from_pretrained(model, folder).eval(), tokens)
    assert (filled - peft).abs().max() < 1e-5


def test_in_bfloat16_a_number_of_few_bits_is_rounded_once(model, foreign):
    compressed = compress(foreign, Recipe(values="int8"))
    slot = LoraSlot(model.to(torch.bfloat16))
    slot.fill(compressed)
    for spec, pair in zip(compressed.layers, expand(compressed).layers.values(), strict=True):
        held = slot._patches[spec.name].held.matrices()
        for found, wanted, exponent in zip(held, (pair.a, pair.b.T), spec.exponents, strict=True):
            exact = torch.from_numpy(np.ldexp(wanted, -exponent).copy())
            assert torch.equal(found, exact.bfloat16())


def test_numbers_too_large_together_are_refused(model, foreign):
    compressed = compress(foreign, Recipe(values="int8"))
    huge = tuple(replace(spec, exponents=(100, 100)) for spec in compressed.layers)
    slot = LoraSlot(model)
    with pytest.raises(FormatError, match="too large"):
        slot.fill(replace(compressed, layers=huge))
    assert slot.is_empty


def test_bfloat16_model(model, adapter, tokens, tmp_path: Path):
    model = model.to(torch.bfloat16)
    slot = LoraSlot(model, 4 * adapter.parameters)
    slot.fill(adapter)
    filled = logits(model, tokens).float()
    slot.remove()
    peft = PeftModel.from_pretrained(model, save_peft_folder(adapter, tmp_path / "peft")).eval()
    assert filled.dtype == torch.float32
    assert (filled - logits(peft, tokens).float()).abs().max() < 0.05


def _renamed(adapter: AdapterWeights, old: str, new: str) -> AdapterWeights:
    return replace(adapter, layers={n.replace(old, new): pair for n, pair in adapter.layers.items()})


@pytest.mark.parametrize("kind", ["name", "shape", "base", "capacity"])
def test_refused_adapters_leave_the_slot_as_it_was(model, adapter, tokens, kind):
    slot = LoraSlot(model, 4 * adapter.parameters, base=adapter.base)
    slot.fill(adapter)
    before = logits(model, tokens)
    layers = dict(adapter.layers)
    first = next(iter(layers))
    layers[first] = LoraPair(np.ones((8, 47), np.float32), layers[first].b)
    wide = {n: LoraPair(np.tile(p.a, (2, 1)), np.tile(p.b, (1, 2))) for n, p in adapter.layers.items()}
    bad = {
        "name": _renamed(adapter, "layers.2", "layers.7"),
        "shape": replace(adapter, layers=layers),
        "base": replace(adapter, base=BaseRef("other", "c" * 64)),
        "capacity": replace(adapter, layers=wide),
    }[kind]
    with pytest.raises(DataError):
        slot.fill(bad)
    assert torch.equal(logits(model, tokens), before)


def test_a_failure_while_decoding_leaves_the_base(model, llama, adapter, tokens):
    compressed = compress(adapter, RECIPES["pruned"])
    broken = replace(compressed, b=replace(compressed.b, mask=compressed.b.mask ^ np.uint8(1)))
    slot = LoraSlot(model, 4 * adapter.parameters)
    slot.fill(adapter)
    with pytest.raises(FormatError):
        slot.fill(broken)
    assert slot.is_empty
    assert torch.equal(logits(model, tokens), logits(llama, tokens))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(DataError, match="no linear layers"):
        LoraSlot(torch.nn.LayerNorm(3), 10)
