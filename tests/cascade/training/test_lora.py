"""The adapter: its seeded start, what is saved, and the base as it was once it is off again."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from cascade.compression.adapter import load_peft_folder
from cascade.config import Base, Lora
from cascade.models.base import load_base
from cascade.training.lora import SIDECAR, add_lora, lora_layers, remove_lora, save_adapter, trainable
from cascade.training.seeded_init import initial_lora_a

SETTINGS = Lora(rank=4)
IDS = torch.arange(5, 45).reshape(2, 20) * 5 % 256 + 5


@pytest.fixture
def base(tiny_folder):
    """A base of one's own to change."""
    return load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def train_a_little(model, seed=0):
    """Move A and B from their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_the_start_of_a_is_the_same_bits_for_ever():
    a = initial_lora_a(17, "model.layers.3.self_attn.q_proj", 8, 576)
    assert (a.dtype, a.shape) == (np.float32, (8, 576))
    digest = hashlib.sha256(a.astype("<f4").tobytes()).hexdigest()
    assert digest == "0d5c6da247b35693fe8ee256acf3970feb9a9a83e497d727097bcf3f8ecda8ea"


def test_the_start_of_a_is_uniform_within_one_over_root_fan_in():
    a = initial_lora_a(1, "x", 64, 400) * 20
    assert -1 <= a.min() < -0.999
    assert 0.999 < a.max() <= 1
    counts, _ = np.histogram(a, bins=10, range=(-1, 1))
    # χ² of 9 degrees of freedom exceeds 33.7 once in 10,000 draws.
    assert ((counts - 2560) ** 2 / 2560).sum() < 33.7


def test_each_seed_and_layer_has_a_stream_of_its_own():
    draws = [initial_lora_a(s, n, 4, 300) for s, n in ((1, "a"), (1, "b"), (2, "a"), (11, ""))]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.15
    assert (initial_lora_a(1, "a", 2, 300) == draws[0][:2]).all()


def test_an_adapter_starts_from_its_seed_and_changes_nothing_yet(base):
    before = logits(base.model)
    names = {n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    model = add_lora(base, SETTINGS, seed=9)
    layers = lora_layers(model)
    assert set(layers) == names
    assert len(names) == 2 * 7
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (a.detach().numpy() == initial_lora_a(9, name, 4, layer.in_features)).all()
        assert not b.any()
        assert layer.scaling["default"] == 2.0
    assert torch.equal(logits(model), before)
    assert len(trainable(model)) == 2 * len(names)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_alpha_is_twice_the_rank_unless_given(base):
    model = add_lora(base, Lora(rank=4, alpha=2.0), seed=9)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {0.5}


def test_a_saved_adapter_loads_in_stock_peft(base, tiny_folder, tmp_path):
    plain = logits(base.model)
    model = add_lora(base, SETTINGS, seed=9)
    train_a_little(model)
    ours = logits(model)
    assert (ours - plain).abs().max() > 0.5
    save_adapter(model, base, 9, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float16}
    fresh = load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing or too many
        theirs = PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), ours, atol=2e-2, rtol=0)
    # All of the difference is fp16: with weights rounded to it the logits are the same.
    for parameter in trainable(model):
        parameter.data = parameter.data.half().float()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


def test_the_sidecar_names_seed_and_base(base, tmp_path):
    model = add_lora(base, SETTINGS, seed=9)
    save_adapter(model, base, 9, tmp_path)
    sidecar = json.loads((tmp_path / SIDECAR).read_text())
    assert sidecar == {"init_seed": 9, "base": {"name": base.name, "sha256": base.sha256}}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (base.name, 4, 8)
    assert config["inference_mode"] is True


def test_saving_in_the_midst_of_training_does_not_stop_it(base, tmp_path):
    model = add_lora(base, SETTINGS, seed=9)
    count = len(trainable(model))
    save_adapter(model, base, 9, tmp_path)
    assert len(trainable(model)) == count
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert model.peft_config["default"].inference_mode is False


def test_the_base_is_as_it_was_once_the_adapter_is_off(base):
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    plain = logits(base.model)
    for seed in (1, 2):  # a second adapter finds no trace of the first
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = add_lora(base, SETTINGS, seed)
        train_a_little(model)
        assert (logits(model) - plain).abs().max() > 0.5
        remove_lora(model)
        assert not any(isinstance(m, LoraLayer) for m in base.model.modules())
        after = base.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], before[k]) for k in before)
        assert torch.equal(logits(base.model), plain)
        assert not trainable(base.model)
        assert not base.model.training


def test_rslora_scales_by_the_root_of_the_rank(base, tmp_path):
    model = add_lora(base, Lora(rank=4, rslora=True), seed=9)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {4.0}
    save_adapter(model, base, 9, tmp_path)
    assert load_peft_folder(tmp_path).scaling == 4.0


def test_a_frozen_a_stays_at_its_seeded_start(base, tmp_path):
    model = add_lora(base, Lora(rank=4, freeze_a=True), seed=9)
    assert all("lora_B" in n for n, p in model.named_parameters() if p.requires_grad)
    train_a_little(model)
    save_adapter(model, base, 9, tmp_path)
    adapter = load_peft_folder(tmp_path)
    for name, pair in adapter.layers.items():
        assert (pair.a == adapter.start(name).astype(np.float16)).all()
        assert pair.b.any()


def test_weights_that_are_more_exact_are_saved_instead(base, tmp_path):
    model = add_lora(base, SETTINGS, seed=9)
    exact = {n: torch.full_like(p, 0.25) for n, p in model.named_parameters() if "lora_B" in n}
    save_adapter(model, base, 9, tmp_path, exact)
    adapter = load_peft_folder(tmp_path)
    assert all((pair.b == 0.25).all() for pair in adapter.layers.values())
    assert all((pair.a == adapter.start(name).astype(np.float16)).all() for name, pair in adapter.layers.items())
