"""LoRA on a base of 8 or 4 bits (QLoRA): it learns, and what it learned fits the base as it is."""

from __future__ import annotations

import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from stand_in import save_tiny_base
from torch.nn.functional import cross_entropy

from cascade.compression.adapter import load_peft_folder
from cascade.compression.apply import LoraSlot
from cascade.config import Base, Lora, Training
from cascade.errors import ConfigError
from cascade.models.base import load_base
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora, save_adapter, trainable
from cascade.training.packing import Row, plan_steps

CPU = torch.device("cpu")
SETTINGS = Lora(rank=4, learning_rate=1e-2, epochs=20, tokens_per_step=64, max_length=64)
IDS = torch.arange(5, 37) * 7 % 256 + 5
EXAMPLES = [EncodedExample(f"e{i}", tuple((IDS + i).tolist()), (False,) * 8 + (True,) * 24) for i in range(4)]


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory):
    """A base whose layers have multiples of 64 inputs."""
    folder = tmp_path_factory.mktemp("even-base")
    save_tiny_base(folder, hidden=64, intermediate=128)
    return folder


def held_in(bits, folder, dtype="float32"):
    return load_base(Base(model=str(folder), dtype=dtype), CPU, bits=bits)


def mean_loss(model):
    """Of the examples' targets, each asked alone."""
    losses = []
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, 7:-1]
        losses.append(cross_entropy(logits.float(), ids[0, 8:]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("bits", "layer"), [(8, Linear8bitLt), (4, Linear4bit)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_held_in_so_many_bits(even_folder, bits, layer, dtype):
    whole, packed = held_in(16, even_folder, dtype), held_in(bits, even_folder, dtype)
    pairs = [
        (mine, theirs)
        for (name, mine), theirs in zip(packed.model.named_modules(), whole.model.modules(), strict=True)
        if isinstance(mine, torch.nn.Linear) and name != "lm_head"
    ]
    assert {type(mine) for mine, _ in pairs} == {layer}
    assert packed.sha256 == whole.sha256
    assert not any(p.requires_grad for p in packed.model.parameters())
    for mine, theirs in pairs:
        x = torch.randn(16, mine.in_features, generator=torch.Generator().manual_seed(1)).to(theirs.weight.dtype)
        exact = theirs(x).float()
        assert (mine(x).float() - exact).norm() / exact.norm() < (0.03 if bits == 8 else 0.2)
    if bits == 4:
        assert all(2 * mine.weight.nbytes == theirs.weight.numel() for mine, theirs in pairs)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_learned_on_few_bits_fits_the_whole_base(even_folder, tmp_path, bits):
    packed = held_in(bits, even_folder)
    model = add_lora(packed, SETTINGS, seed=3)
    engine = TorchEngine(TargetLoss(model), SETTINGS)
    reports = list(run_steps(engine, plan_steps(EXAMPLES, SETTINGS, seed=3), SETTINGS))
    assert reports[-1].loss < 0.7 * reports[0].loss
    save_adapter(model, packed, 3, tmp_path)
    whole = held_in(16, even_folder)
    before = mean_loss(whole.model)
    slot = LoraSlot(whole.model)
    slot.fill(load_peft_folder(tmp_path))
    assert mean_loss(whole.model) < 0.6 * before


def step_on_few_bits(folder, bits, dtype, *, fused):
    """Loss, gradients, and the bytes of activations that the backward pass needed."""
    model = add_lora(held_in(bits, folder, dtype), SETTINGS, seed=3)
    module = TargetLoss(model, fused=fused)
    for number, parameter in enumerate(trainable(model)):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module(**module.inputs(Row(tuple(EXAMPLES)), CPU))
    loss.backward()
    return loss.detach(), [p.grad for p in trainable(model)], sum(kept.values())


@pytest.mark.parametrize(("bits", "near"), [(8, 0.01), (4, 1e-4)])
def test_layers_of_few_bits_train_as_pefts_do(even_folder, bits, near):
    ours, theirs = (step_on_few_bits(even_folder, bits, "float32", fused=fused) for fused in (True, False))
    torch.testing.assert_close(ours[0], theirs[0], rtol=near / 10, atol=0)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert (one - other).norm() < near * other.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_of_few_bits_keep_no_float32_activations(even_folder, bits):
    ours, theirs = (step_on_few_bits(even_folder, bits, "bfloat16", fused=fused)[2] for fused in (True, False))
    assert ours < 0.8 * theirs


def test_without_bitsandbytes_the_error_says_what_to_install(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"training.base_bits: 4 needs bitsandbytes: pip install"):
        held_in(4, tiny_folder)


def test_four_bits_that_a_cpu_would_compute_wrongly_are_refused(tiny_folder):
    with pytest.raises(ConfigError, match=r"training.base_bits: 4 .* has 48 inputs, no multiple of 64; set it to 8"):
        held_in(4, tiny_folder)


def test_parameters_of_few_bits_cannot_be_spread():
    with pytest.raises(ValueError, match=r"zero_stage: 3 cannot spread a base of base_bits 8 or 4"):
        Training(zero_stage=3, base_bits=4)
