"""A LoRA made by stock PEFT becomes a modifier file within both limits, and a folder that stock PEFT loads again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cascade.compression.adapter import fp16_bytes
from cascade.compression.apply import LoraSlot
from cascade.compression.convert import compress_folder, export_modifier
from cascade.compression.format import load_modifier
from cascade.compression.methods import Prune, Recipe
from cascade.compression.packed import resident_bytes
from cascade.config import Compression
from cascade.errors import DataError, FormatError


@pytest.fixture
def foreign_folder(llama, tmp_path: Path) -> Path:
    """Saved by stock PEFT: nothing is known of A's start."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(llama), LoraConfig(r=64, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "made-elsewhere")
    return tmp_path / "made-elsewhere"


@pytest.mark.parametrize("share", [0.5, 48 / 260])
@pytest.mark.parametrize("values", [None, "fp16", "int4"])
def test_a_foreign_lora_keeps_both_limits_and_means_the_same_exported(llama, tokens, foreign_folder, share, values):
    file, folder = foreign_folder.with_name("m.safetensors"), foreign_folder.with_name("exported")
    wanted = Compression(max_ratio=share, max_resident_ratio=share)
    adapter, compressed = compress_folder(foreign_folder, file, wanted=wanted, values=values)
    assert file.stat().st_size <= share * fp16_bytes(adapter)
    assert resident_bytes(compressed) <= share * fp16_bytes(adapter)
    export_modifier(file, folder)
    stock = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    ours = copy.deepcopy(llama)
    LoraSlot(ours).fill(load_modifier(file))
    with torch.no_grad():
        assert (stock(tokens).logits - ours(tokens).logits).abs().max() < 1e-5
        assert (stock(tokens).logits - llama(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize(("values", "number", "int8"), [(None, 4, False), ("fp16", 4, False), ("int8", 2, True)])
def test_both_promises_are_kept_whatever_the_base_is_held_in(llama, foreign_folder, values, number, int8):
    file, share = foreign_folder.with_name("m.safetensors"), 48 / 260
    adapter, compressed = compress_folder(foreign_folder, file, values=values, bytes_per_number=number, int8=int8)
    slot = LoraSlot(copy.deepcopy(llama).to(torch.bfloat16 if int8 else torch.float32), int8=int8)
    assert slot.bytes_for(compressed) <= share * fp16_bytes(adapter)
    assert slot.bytes_for(compressed) > 0.7 * share * fp16_bytes(adapter)


def test_a_recipe_is_done_as_it_says(foreign_folder):
    recipe = Recipe(prune=Prune(density_a=0.3, density_b=0.3), values="int8")
    _, compressed = compress_folder(foreign_folder, foreign_folder.with_name("m.safetensors"), recipe=recipe)
    assert compressed.recipe == load_modifier(foreign_folder.with_name("m.safetensors")).recipe == recipe


def test_a_place_that_cannot_be_written_to_is_said_and_left_as_it_was(foreign_folder):
    beside = foreign_folder.parent
    for place in (beside / "nowhere" / "m.safetensors", foreign_folder):
        with pytest.raises(DataError, match=r"cannot be written: (No such file|Is a)"):
            compress_folder(foreign_folder, place, recipe=Recipe())
    assert list(beside.iterdir()) == [foreign_folder]
    file = beside / "m.safetensors"
    compress_folder(foreign_folder, file, recipe=Recipe())
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        export_modifier(file, file / "exported")


def test_what_cannot_be_is_refused_and_leaves_nothing(foreign_folder):
    file = foreign_folder.with_name("m.safetensors")
    with pytest.raises(DataError, match="allow a larger share"):
        compress_folder(foreign_folder, file, wanted=Compression(max_ratio=1e-4))
    assert not file.exists()
    compress_folder(foreign_folder, file)
    with pytest.raises(DataError, match="new folder"):
        export_modifier(file, foreign_folder)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError):
        export_modifier(file, foreign_folder.with_name("exported"))
    assert not foreign_folder.with_name("exported").exists()
