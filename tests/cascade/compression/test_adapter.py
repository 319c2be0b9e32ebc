"""PEFT folders in and out, and the exact fp16 size."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
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
from cascade.compression.peft_config import PeftConfig
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
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"layers.1.*.o_proj": 3}},
    ],
    ids=["plain", "rslora", "regex", "one layer", "the first layer", "ranks", "alphas"],
)
def test_any_plain_lora_of_stock_peft_means_the_same_after_a_round_trip(llama, tokens, tmp_path: Path, settings):
    model = peft_model(llama, task_type="CAUSAL_LM", **settings)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    read = load_peft_folder(tmp_path / "theirs")
    assert read.init_seed is None
    ours = save_peft_folder(read, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        again = PeftModel.from_pretrained(copy.deepcopy(llama), ours).eval()
    assert (logits(again, tokens) - expected).abs().max() < 1e-5
    assert (expected - logits(llama, tokens)).abs().max() > 1e-3


def test_a_lora_of_the_head_is_plain_once_the_base_is_left_out(llama, tokens, tmp_path: Path):
    model = peft_model(llama, r=4, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "with")
    with pytest.raises(DataError, match=r"lm_head\.base_layer\.weight.*save_embedding_layers=False"):
        load_peft_folder(tmp_path / "with")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    ours = save_peft_folder(load_peft_folder(tmp_path / "without"), tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(llama), ours).eval()
    assert (logits(again, tokens) - logits(model, tokens)).abs().max() < 1e-5


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


def alphas(folder: Path, patterns: dict[str, float]) -> list[float]:
    """Which alpha each layer of a folder with such patterns has."""
    _edit("adapter_config.json", lora_alpha=1, r=1, alpha_pattern=patterns)(folder)
    config = PeftConfig.read(folder)
    return list(config.scalings(dict.fromkeys(NAMES, 1)).values())


NAMES = [
    f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_up_proj")
]


@pytest.mark.parametrize(
    "patterns",
    [
        ["up_proj", "q_proj"],
        [r"layers\.\d+\.mlp\.up_proj", "q"],
        ["layers.1.*.q_proj", "layers.[01].*"],
        ["^model.layers.0.self_attn.q_proj", "^layers.0.self_attn.q_proj"],
        ["mlp|self_attn.q_proj", "(gate_)?up_proj"],
        [r"(?:.*\.)?layers\.(0|1)\..*", ".*"],
        [r"model\.layers\.1\w*\..*proj$", "proj"],
    ],
)
def test_alphas_go_to_the_layers_that_peft_gives_them_to(adapter, tmp_path: Path, patterns):
    folder = save_peft_folder(adapter, tmp_path)
    given = {pattern: i + 2.0 for i, pattern in enumerate(patterns)}
    assert alphas(folder, given) == [given.get(get_pattern_key(given, name), 1.0) for name in NAMES]


def test_a_pattern_that_takes_for_ever_to_match_is_matched_in_no_time(adapter, tmp_path: Path):
    folder = save_peft_folder(adapter, tmp_path)
    assert alphas(folder, {r"((\w+\.?)+)+!": 2.0, r"(([a-z0-9_.]*)*)*q_proj": 3.0}) == [3.0, 1.0, 1.0] * 3


@pytest.mark.parametrize("pattern", [r"(?!q)_proj", r"(q)_\1", "(?<=layers.)1", "a{1001}", "a{99999999999}"])
def test_a_pattern_whose_matching_has_no_bound_is_refused_and_named(adapter, tmp_path: Path, pattern):
    folder = save_peft_folder(adapter, tmp_path)
    _edit("adapter_config.json", alpha_pattern={"up_proj": 2, pattern: 3})(folder)
    with pytest.raises(
        DataError, match=rf"adapter_config\.json is wrong at alpha_pattern: .*{re.escape(repr(pattern))}"
    ):
        load_peft_folder(folder)


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_refused_with_a_reason(adapter, tmp_path: Path, harm):
    folder = save_peft_folder(adapter, tmp_path / "a")
    harm(folder)
    with pytest.raises(DataError):
        load_peft_folder(folder)


def test_only_float_types_are_written(adapter, tmp_path: Path):
    with pytest.raises(DataError, match="float32 or float16"):
        save_peft_folder(adapter, tmp_path, dtype="int8")
