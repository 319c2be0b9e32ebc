"""PEFT folders in and out, and the exact fp16 size."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from cascade.compression.adapter import (
    AdapterWeights,
    BaseRef,
    LoraPair,
    fp16_bytes,
    load_peft_folder,
    save_peft_folder,
)
from cascade.compression.format import decode_modifier, encode_modifier
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress
from cascade.errors import DataError


def same(one: AdapterWeights, other: AdapterWeights) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        np.array_equal(p.a, other.layers[n].a) and np.array_equal(p.b, other.layers[n].b) for n, p in one.layers.items()
    )


@torch.no_grad()
def peft_model(llama, **settings):
    """A stock PEFT adapter with weights that do something."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(llama), LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model(input_ids=tokens).logits


def test_round_trip_keeps_every_bit_and_the_origin(adapter, tmp_path: Path):
    read = load_peft_folder(save_peft_folder(adapter, tmp_path / "a"))
    assert same(read, adapter)
    assert (read.scaling, read.rank, read.base, read.init_seed) == (2.0, 8, adapter.base, 5)
    assert read.target_modules == adapter.target_modules
    name = next(iter(adapter.layers))
    start = read.start(name)
    assert start is not None
    assert np.abs(read.layers[name].a - start).max() < 0.15 < np.abs(start).max() * 1.5


@pytest.mark.parametrize(("rank", "layers"), [(1, 1), (8, 21), (13, 5)])
def test_fp16_bytes_is_the_size_on_disk(adapter, tmp_path: Path, rank: int, layers: int):
    few = {
        n: LoraPair(np.resize(p.a, (rank, p.a.shape[1])), np.resize(p.b, (p.b.shape[0], rank)))
        for n, p in list(adapter.layers.items())[:layers]
    }
    few_adapter = replace(adapter, layers=few, rank=rank, init_seed=None)
    folder = save_peft_folder(few_adapter, tmp_path / "a", dtype="float16")
    assert fp16_bytes(few_adapter) == (folder / "adapter_model.safetensors").stat().st_size


def test_fp16_bytes_equals_what_stock_peft_writes(llama, tmp_path: Path):
    peft_model(llama, r=4, target_modules="all-linear", task_type="CAUSAL_LM").half().save_pretrained(tmp_path)
    assert fp16_bytes(load_peft_folder(tmp_path)) == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
        {"r": 6, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"layers.1.*.o_proj": 3}},
    ],
    ids=["plain", "rslora", "regex", "one layer", "ranks", "alphas"],
)
def test_any_plain_lora_of_stock_peft_means_the_same_after_a_round_trip(llama, tokens, tmp_path: Path, settings):
    model = peft_model(llama, task_type="CAUSAL_LM", **settings)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    read = load_peft_folder(tmp_path / "theirs")
    assert read.init_seed is None
    ours = save_peft_folder(read, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(llama), ours).eval()
    assert (logits(again, tokens) - expected).abs().max() < 1e-5
    assert (expected - logits(llama, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_refused_unless_converted(llama, tokens, tmp_path: Path, start: str):
    model = get_peft_model(copy.deepcopy(llama), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    expected = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(DataError, match=f"started as {start}.*path_initial_model_for_weight_conversion"):
        load_peft_folder(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    read = load_peft_folder(tmp_path / "converted")
    ours = PeftModel.from_pretrained(copy.deepcopy(llama), save_peft_folder(read, tmp_path / "ours")).eval()
    assert (logits(ours, tokens) - expected).abs().max() < 1e-4


def test_a_layer_of_a_larger_rank_than_the_others_counts_as_the_adapters(llama, tmp_path: Path):
    peft_model(llama, r=4, target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 6}).save_pretrained(tmp_path)
    read = load_peft_folder(tmp_path)
    assert read.rank == 6
    assert decode_modifier(encode_modifier(compress(read, Recipe())))[1].rank == 6


def test_float16_files_stay_float16_and_bfloat16_becomes_float32(llama, tmp_path: Path):
    model = peft_model(llama, r=4, target_modules=["q_proj"])
    model.half().save_pretrained(tmp_path / "half")
    model.bfloat16().save_pretrained(tmp_path / "brain")
    assert {p.a.dtype for p in load_peft_folder(tmp_path / "half").layers.values()} == {np.dtype(np.float16)}
    assert {p.a.dtype for p in load_peft_folder(tmp_path / "brain").layers.values()} == {np.dtype(np.float32)}


def test_the_base_can_be_said_where_the_folder_does_not(adapter, tmp_path: Path):
    folder = save_peft_folder(adapter, tmp_path / "a")
    (folder / "cascade_adapter.json").unlink()
    read = load_peft_folder(folder)
    assert (read.base, read.init_seed) == (BaseRef("tiny", ""), None)
    assert read.start(next(iter(read.layers))) is None
    assert load_peft_folder(folder, base=BaseRef("x", "c" * 64)).base.sha256 == "c" * 64


def _edit(name: str, **changes):
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(value))

    return edit


def _weights(change):
    def edit(folder: Path) -> None:
        tensors = change(dict(load_file(folder / "adapter_model.safetensors")))
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


BROKEN = {
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "config is no JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "config is a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "weights cut off": lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x20" + b"\0" * 20),
    "other kind": _edit("adapter_config.json", peft_type="IA3"),
    "dora": _edit("adapter_config.json", use_dora=True),
    "bias": _edit("adapter_config.json", bias="all"),
    **{
        f"{key} is {value!r}": _edit("adapter_config.json", **{key: value})
        for key, value in [
            ("r", None),
            ("r", "x"),
            ("r", 0),
            ("lora_alpha", None),
            ("lora_alpha", True),
            ("lora_alpha", 1e300),
            ("alpha_pattern", [1]),
            ("alpha_pattern", {"(": 3}),
            ("alpha_pattern", {"q_proj": None}),
            ("target_modules", 5),
            ("use_rslora", "yes"),
            ("init_lora_weights", "PiSSA_niter_4"),
            ("init_lora_weights", "loftq"),
        ]
    },
    "whole numbers": _weights(lambda t: {k: v.astype(np.int8) for k, v in t.items()}),
    "whole modules": _edit("adapter_config.json", modules_to_save=["lm_head"]),
    "no scaling": _edit("adapter_config.json", lora_alpha=0),
    "seed is text": _edit("cascade_adapter.json", init_seed="5"),
    "seed is a truth value": _edit("cascade_adapter.json", init_seed=True),
    "base is text": _edit("cascade_adapter.json", base="tiny"),
    "one factor": _weights(lambda t: {k: v for k, v in t.items() if k != max(t)}),
    "no factors": _weights(lambda t: {}),
    "an embedding": _weights(lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": t[min(t)]}),
    "factors do not fit": _weights(lambda t: t | {max(t): t[max(t)][:, :3].copy()}),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_refused_with_a_reason(adapter, tmp_path: Path, harm):
    folder = save_peft_folder(adapter, tmp_path / "a")
    harm(folder)
    with pytest.raises(DataError):
        load_peft_folder(folder)


def test_only_float_types_are_written(adapter, tmp_path: Path):
    with pytest.raises(DataError, match="float32 or float16"):
        save_peft_folder(adapter, tmp_path, dtype="int8")
