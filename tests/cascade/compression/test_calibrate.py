"""Calibration measures what autograd sees at stock PEFT's lora_A, and leaves the model alone."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from cascade.compression.adapter import LoraPair, save_peft_folder
from cascade.compression.calibrate import calibrate
from cascade.errors import DataError
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss
from cascade.training.packing import Row

ROWS = [
    Row((EncodedExample("a", tuple(range(3, 20)), (False,) * 9 + (True,) * 8),)),
    Row((EncodedExample("b", (5, 9, 33, 70, 2), (False,) * 2 + (True,) * 3),) * 2),
]


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama).requires_grad_(False)


def _note(outputs: list[torch.Tensor], _module, _inputs, output: torch.Tensor) -> None:
    output.retain_grad()
    outputs.append(output)


def test_moments_are_those_at_stock_pefts_lora_a(model, adapter, tmp_path):
    found = calibrate(model, adapter, ROWS)
    peft = PeftModel.from_pretrained(copy.deepcopy(model), save_peft_folder(adapter, tmp_path)).eval()
    peft.requires_grad_(True)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in adapter.layers}
    for name in adapter.layers:
        layer = peft.get_submodule(f"base_model.model.{name}").lora_A["default"]
        layer.register_forward_hook(functools.partial(_note, seen[name]))
    for row in ROWS:
        TargetLoss(peft, fused=False)(**row.tensors(torch.device("cpu"))).backward()
    for name, outputs in seen.items():
        z = torch.cat([o.detach().reshape(-1, 8) for o in outputs]).double().numpy()
        g = torch.cat([o.grad.reshape(-1, 8) for o in outputs]).double().numpy()
        assert np.allclose(found[name].inputs, z.T @ z / len(z), rtol=1e-3, atol=1e-7)
        assert np.allclose(found[name].outputs, g.T @ g / len(g), rtol=1e-3, atol=1e-7)


def test_mean_squares_are_those_at_the_layers_own_ends(model, adapter, tmp_path):
    found = calibrate(model, adapter, ROWS)
    peft = PeftModel.from_pretrained(copy.deepcopy(model), save_peft_folder(adapter, tmp_path)).eval()
    peft.requires_grad_(True)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in adapter.layers}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in adapter.layers}
    for name in adapter.layers:
        layer = peft.get_submodule(f"base_model.model.{name}")
        layer.register_forward_hook(functools.partial(_note, outputs[name]))
        layer.register_forward_pre_hook(lambda _module, args, name=name: inputs[name].append(args[0].detach()))
    for row in ROWS:
        TargetLoss(peft, fused=False)(**row.tensors(torch.device("cpu"))).backward()
    for name, grams in found.items():
        x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs[name]]).double().numpy()
        g = torch.cat([o.grad.reshape(-1, o.shape[-1]) for o in outputs[name]]).double().numpy()
        assert np.allclose(grams.features, (x**2).mean(0), rtol=1e-3, atol=1e-9)
        assert np.allclose(grams.effects, (g**2).mean(0), rtol=1e-3, atol=1e-9)


def test_the_model_is_the_same_afterwards(model, adapter):
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    calibrate(model, adapter, ROWS)
    assert torch.equal(model(tokens).logits, before)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_measured_is_refused(model, adapter):
    with pytest.raises(DataError, match="something to learn"):
        calibrate(model, adapter, [])
    foreign = replace(adapter, layers={"model.layers.9.mlp.up_proj": LoraPair(np.ones((2, 3)), np.ones((3, 2)))})
    with pytest.raises(DataError, match=r"layers\.9"):
        calibrate(model, foreign, ROWS)
