"""The folder of a trained adapter by the rules that vLLM loads one by.

vLLM cannot be installed here. The rules below are those of its `vllm/lora/peft_helper.py` (PEFTHelper: required and
refused settings, scaling), `vllm/lora/lora_model.py` (from_local_checkpoint: file, expected modules) and
`vllm/lora/utils.py` (parse_fine_tuned_lora_name: names of tensors), read in its repository.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from cascade.compression.adapter import load_peft_folder, save_peft_folder
from cascade.config import Base, Lora
from cascade.models.base import load_base
from cascade.training.lora import add_lora, save_adapter, trainable

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""What vLLM can put LoRA on in a Llama, `qkv_proj` and `gate_up_proj` unpacked."""
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""


def vllm_load(folder):
    """What vLLM would compute with, as module -> A, B times its scaling; AssertionError where it would refuse."""
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(config["target_modules"], list | str)
    assert config.get("bias", "none") == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert 0 < rank <= max(MAX_LORA_RANKS)
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank  # one for all layers
    found: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            parts = name.split(".")
            assert parts[:2] == ["base_model", "model"]
            assert (parts[-1], parts[-2]) in (("weight", "lora_A"), ("weight", "lora_B")), f"{name} is unsupported"
            assert parts[-3] in LLAMA, f"{name} is no expected module"
            found.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = file.get_tensor(name).float()
    for factors in found.values():
        assert factors.keys() == {"lora_A", "lora_B"}
        assert factors["lora_A"].shape[0] == factors["lora_B"].shape[1] <= rank
    return {module: (f["lora_A"], f["lora_B"] * scaling) for module, f in found.items()}


@torch.no_grad()
def logits(model, ids, changes):
    """The plain base's logits with weights changed by what vLLM read."""
    for module, (a, b) in changes.items():
        model.get_submodule(module).weight += b @ a
    return model(ids).logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 3.0}, {"rslora": True}, {"freeze_a": True}, {"init": "pissa"}, {"init": "pissa", "rslora": True}],
    ids=str,
)
def test_vllm_reads_what_was_trained(settings, tiny_folder, tmp_path):
    base = load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))
    model = add_lora(base, Lora(rank=4, **settings), seed=9)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, base, 9, tmp_path / "trained")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        trained = model(ids).logits
    plain = load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu")).model
    torch.testing.assert_close(logits(plain, ids, vllm_load(tmp_path / "trained")), trained, atol=5e-3, rtol=0)


def test_vllm_reads_layers_of_different_ranks_with_the_scaling_they_have(tiny_folder, tmp_path):
    """vLLM ignores PEFT's patterns of ranks and alphas; what a compressed modifier is exported to needs none."""
    base = load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))
    save_adapter(add_lora(base, Lora(rank=4), seed=9), base, 9, tmp_path / "trained")
    adapter = load_peft_folder(tmp_path / "trained")
    for number, pair in enumerate(adapter.layers.values()):
        pair.b[:] = 0.1
        object.__setattr__(pair, "a", pair.a[: 1 + number % 4])
        object.__setattr__(pair, "b", pair.b[:, : 1 + number % 4])
    save_peft_folder(adapter, tmp_path / "exported")
    read = vllm_load(tmp_path / "exported")
    for name, pair in adapter.layers.items():
        a, b = read[name]
        wanted = adapter.scaling * torch.from_numpy(pair.b).float() @ torch.from_numpy(pair.a).float()
        torch.testing.assert_close(b @ a, wanted)


def test_vllm_does_not_load_a_dora_modifier(tiny_folder, tmp_path):
    base = load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))
    save_adapter(add_lora(base, Lora(rank=4, dora=True), seed=9), base, 9, tmp_path)
    with pytest.raises(AssertionError):
        vllm_load(tmp_path)
