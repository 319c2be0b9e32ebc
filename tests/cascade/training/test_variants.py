"""PiSSA and DoRA: they start at the base, learn, and what is saved fits the base as it is."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from cascade.compression.adapter import load_peft_folder
from cascade.config import Base, Lora
from cascade.errors import DataError
from cascade.models.base import load_base
from cascade.training import layout
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, TorchEngine, mean_loss, run_steps
from cascade.training.lora import SIDECAR, add_lora, lora_layers, remove_lora, save_adapter, trainable
from cascade.training.packing import plan_steps
from cascade.training.pissa import change_alone, factors

CPU = torch.device("cpu")
IDS = torch.arange(5, 45).reshape(2, 20) * 5 % 256 + 5
EXAMPLES = [
    EncodedExample(f"e{i}", tuple(5 + (i * 31 + j * 7) % 250 for j in range(n)), tuple(j >= n // 2 for j in range(n)))
    for i, n in enumerate([12, 30, 7, 40, 9, 22])
]
VARIANTS = {
    "pissa": {"init": "pissa"},
    "pissa of more than the full rank": {"init": "pissa", "rank": 96},
    "pissa, rslora": {"init": "pissa", "rslora": True},
    "dora": {"dora": True},
    "dora, LoRA+": {"dora": True, "lora_plus": 4.0},
}


def settings(**more):
    shape = {"rank": 4, "learning_rate": 5e-3, "epochs": 6, "tokens_per_step": 90, "max_length": 48}
    return Lora(**(shape | more))


def load(folder):
    return load_base(Base(model=str(folder), dtype="float32"), CPU)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_it_learns_and_what_is_saved_does_the_same_on_the_plain_base(variant, tiny_folder, tmp_path):
    base, wanted = load(tiny_folder), settings(**variant)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    plain = logits(base.model)
    model = add_lora(base, wanted, seed=3)
    torch.testing.assert_close(logits(model), plain, atol=5e-5, rtol=0)
    module, plan = TargetLoss(model), plan_steps(EXAMPLES, wanted, seed=1)
    rows = [row for step in plan[:3] for row in step.rows]
    first = mean_loss(module, rows, CPU)
    list(run_steps(TorchEngine(module, wanted), plan, wanted))
    assert mean_loss(module, rows, CPU) < first - 0.1
    trained = logits(model)
    save_adapter(model, base, 3, tmp_path)
    fresh = load(tiny_folder)
    theirs = PeftModel.from_pretrained(fresh.model, str(tmp_path))
    assert (trained - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), trained, atol=5e-3, rtol=0)
    # All of the difference is fp16: with the numbers before they were rounded to it the logits are the same.
    for mine, saved in zip(lora_layers(model).values(), lora_layers(theirs).values(), strict=True):
        exact = change_alone(mine, *factors(mine)) if wanted.init == "pissa" else factors(mine)
        for rounded, number in zip(factors(saved), exact, strict=True):
            assert torch.equal(rounded.data, number.detach().half().float())
            rounded.data = number.detach().float()
    torch.testing.assert_close(logits(theirs), trained, atol=1e-4, rtol=0)
    assert json.loads((tmp_path / SIDECAR).read_text())["base"]["sha256"] == fresh.sha256 == base.sha256
    remove_lora(model)
    after = base.model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_pissa_starts_at_the_first_singular_vectors_and_trains_no_more_than_its_rank(tiny_folder):
    base = load(tiny_folder)
    model = add_lora(base, settings(init="pissa"), seed=3)
    for layer in lora_layers(model).values():
        u, s, v = torch.linalg.svd(layer.get_base_layer().weight)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nearest = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
        close = 0.01 * float(nearest.abs().max())  # they are numbers of bfloat16
        torch.testing.assert_close(layer.scaling["default"] * b @ a, nearest, atol=close, rtol=0)
    assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)
    assert len(trainable(model)) == 2 * len(lora_layers(model))


def test_pissa_is_the_same_through_the_fused_layer_and_through_pefts(tiny_folder):
    found = []
    for fused in (True, False):
        module = TargetLoss(add_lora(load(tiny_folder), settings(init="pissa"), seed=3), fused=fused)
        torch.manual_seed(0)
        for parameter in trainable(module):
            parameter.data += 0.02 * torch.randn(parameter.shape)
        row = plan_steps(EXAMPLES, settings(), seed=1)[0].rows[0]
        loss = module(**layout.plain(row, CPU))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in trainable(module)]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=float(1e-4 * other.abs().max()), rtol=1e-3)


def test_a_saved_pissa_adapter_is_plain_lora_of_twice_the_rank(tiny_folder, tmp_path):
    base = load(tiny_folder)
    model = add_lora(base, settings(init="pissa"), seed=3)
    save_adapter(model, base, 3, tmp_path)
    adapter = load_peft_folder(tmp_path)
    assert (adapter.rank, adapter.scaling, adapter.init_seed) == (8, 2.0, None)
    assert not any((pair.b.astype(float) @ pair.a).round(4).any() for pair in adapter.layers.values()), (
        "not trained yet"
    )


def test_fp16_does_not_touch_a_magnitude(tiny_folder, tmp_path):
    base = load(tiny_folder)
    model = add_lora(base, settings(dora=True), seed=3)
    save_adapter(model, base, 3, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(t.dtype): "magnitude" in k for k, t in state.items()} == {"torch.float32": True, "torch.float16": False}
    with pytest.raises(DataError, match="use_dora; only plain LoRA on linear layers can be compressed"):
        load_peft_folder(tmp_path)
