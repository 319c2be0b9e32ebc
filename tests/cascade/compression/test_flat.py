"""The serving form: the same numbers as the modifier, checked when it is opened, read into a fixed buffer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import random_adapter, save_tiny_base
from transformers import LlamaForCausalLM

from cascade.compression.adapter import AdapterWeights
from cascade.compression.apply import LoraSlot
from cascade.compression.decoding import iter_layers
from cascade.compression.flat import layout_of, open_flat, save_flat, write_block
from cascade.compression.methods import Recipe, Truncate
from cascade.compression.packed import compress, resident_bytes
from cascade.errors import DataError, FormatError
from cascade.models.int8 import hold_in_int8

RECIPES = {"plain": Recipe(), "few bits": Recipe(truncate=Truncate(keep=0.5), values="int4")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat") / "base"
    save_tiny_base(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> AdapterWeights:
    return random_adapter(base, seed=3)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_computes_the_same_from_either_form(
    base: Path, adapter, tmp_path: Path, dtype: torch.dtype, recipe: Recipe
) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    slot, ids = LoraSlot(model), torch.arange(5, 30)[None]
    compressed = compress(adapter, recipe)
    bare = model(ids).logits
    slot.fill(compressed)
    wanted = model(ids).logits
    save_flat(tmp_path / "form.safetensors", compressed, dtype)
    form = open_flat(tmp_path / "form.safetensors")
    for _ in range(2):
        slot.clear()
        assert torch.equal(model(ids).logits, bare)
        slot.fill(form)
        assert torch.equal(model(ids).logits, wanted)
    held = resident_bytes(compressed, bytes_per_number=dtype.itemsize)
    assert slot.resident_bytes == form.layout.nbytes == held
    assert (tmp_path / "form.safetensors").stat().st_size < held + 10_000
    slot.fill(adapter)  # layers of the same shapes: the same views, other numbers
    slot.fill(form)
    assert torch.equal(model(ids).logits, wanted)
    slot.remove()


def test_it_goes_on_reading_what_it_opened(adapter: AdapterWeights, tmp_path: Path) -> None:
    path = tmp_path / "form.safetensors"
    save_flat(path, adapter, torch.float32)
    form = open_flat(path)
    path.unlink()
    buffer = torch.zeros(form.layout.nbytes + 7, dtype=torch.uint8)
    form.read_into(buffer)
    written = torch.empty(form.layout.nbytes, dtype=torch.uint8)
    write_block(adapter, layout_of(adapter, torch.float32), written)
    assert torch.equal(buffer[:-7], written)
    assert not buffer[-7:].any()


@pytest.mark.parametrize("place", [0, 5, 60, -1, -2000])
def test_damage_is_refused(adapter: AdapterWeights, tmp_path: Path, place: int) -> None:
    path = tmp_path / "form.safetensors"
    save_flat(path, adapter, torch.float32)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError):
        open_flat(path)


def test_what_is_no_flat_file_is_refused(tmp_path: Path, adapter: AdapterWeights) -> None:
    path = tmp_path / "form.safetensors"
    with pytest.raises(FormatError, match="no flat modifier file"):
        open_flat(path)
    path.write_bytes(np.zeros(100, np.uint8).tobytes())
    with pytest.raises(FormatError, match="no flat modifier file"):
        open_flat(path)
    save_flat(path, adapter, torch.float32)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FormatError):
        open_flat(path)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 2.0], ids=str)
def test_levels_beyond_all_numbers_are_refused(adapter: AdapterWeights, scale: float) -> None:
    compressed = compress(adapter, Recipe(truncate=Truncate(keep=0.5), values="int8"))
    first = replace(compressed.layers[0], exponents=(120, 0))  # 128 * 2**120 are within float32, twice that is not
    scales = np.zeros_like(compressed.a.scales)
    scales[0] = np.nextafter(np.float16(2), np.float16(0))
    odd = replace(compressed, layers=(first, *compressed.layers[1:]), a=replace(compressed.a, scales=scales))
    layout = layout_of(odd, torch.float32)
    write_block(odd, layout, torch.empty(layout.nbytes, dtype=torch.uint8))
    scales[0] = scale
    with pytest.raises(FormatError, match="not finite"):
        write_block(odd, layout, torch.empty(layout.nbytes, dtype=torch.uint8))


def test_a_slot_takes_its_own_type_alone(base: Path, adapter: AdapterWeights, tmp_path: Path) -> None:
    save_flat(tmp_path / "form.safetensors", adapter, torch.bfloat16)
    slot = LoraSlot(LlamaForCausalLM.from_pretrained(base))
    with pytest.raises(DataError, match=r"bfloat16.*float32"):
        slot.fill(open_flat(tmp_path / "form.safetensors"))
    assert slot.is_empty


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@torch.inference_mode()
def test_beside_a_base_in_8_bits_it_is_in_8_bits_too(base: Path, adapter, tmp_path: Path, recipe: Recipe) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    hold_in_int8(model)
    slot, compressed = LoraSlot(model), compress(adapter, recipe)
    slot.fill(compressed)
    expected = {n: (a, bt * np.float32(compressed.scaling)) for n, a, bt in iter_layers(compressed)}
    for name, layer in model.named_modules():
        if name not in expected:
            continue
        a, bt = (torch.from_numpy(np.array(x)) for x in expected[name])
        for rows in (1, 3, 50):
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
            wanted = x.float() @ a.T @ bt
            added = layer(x).float() - layer.forward(x).float()
            assert (added - wanted).norm() < 0.02 * wanted.norm() + 0.01 * layer.forward(x).float().norm()
    ids = torch.arange(5, 30)[None]
    wanted = model(ids).logits
    save_flat(tmp_path / "form.safetensors", compressed, torch.bfloat16, int8=True)
    form = open_flat(tmp_path / "form.safetensors")
    slot.clear()
    slot.fill(form)
    assert torch.equal(model(ids).logits, wanted)
    assert slot.resident_bytes == form.layout.nbytes == resident_bytes(compressed, int8=True)
    save_flat(tmp_path / "other.safetensors", compressed, torch.bfloat16)
    with pytest.raises(DataError, match="the slot in int8"):
        slot.fill(open_flat(tmp_path / "other.safetensors"))
    with pytest.raises(DataError, match="flat adapter is in int8"):
        LoraSlot(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)).fill(form)
