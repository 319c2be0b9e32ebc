"""Putting a LoRA adapter on a base with PEFT, started from our own seeded generator, and saving it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from cascade.config import Lora
from cascade.models.base import LoadedBase
from cascade.training.pissa import START, add_start, change_alone, factors
from cascade.training.seeded_init import initial_lora_a

SIDECAR = "cascade_adapter.json"
"""Beside PEFT's own files: the seed of A's start and the hash of the base."""


def add_lora(loaded: LoadedBase, settings: Lora, seed: int) -> PeftModel:
    """A trainable adapter on all linear layers of a base, in place, which changes nothing yet.

    All of the model is in evaluation mode: nothing drops out here, and code that torch.compile made for modules of one
    mode is compiled anew when some of them change theirs.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else 2 * settings.rank,  # type: ignore[arg-type]
        target_modules="all-linear",
        lora_dropout=0.0,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(loaded.model, config)
    layers = lora_layers(model)
    if settings.init == "pissa":
        add_start(model, layers)
    else:
        for name, layer in layers.items():
            a, _ = factors(layer)
            a.data.copy_(torch.from_numpy(initial_lora_a(seed, name, *a.shape)))
            a.requires_grad_(not settings.freeze_a)
    return model.eval()


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Adapted layers by their name in the base, e.g. "model.layers.0.self_attn.q_proj"."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def save_adapter(
    model: PeftModel,
    loaded: LoadedBase,
    seed: int,
    folder: str | Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """An ordinary PEFT folder in fp16 with our sidecar, which stock PEFT ignores; it fits the base as it is.

    fp16 rather than fp32, so that the sizes that we compare with are not flattered. DoRA's magnitudes stay in float32,
    since one that is rounded scales the base's own output. With PiSSA the folder has twice the rank.

    Args:
        weights: of trainable parameters, by name in the model, where they are more exact than the model's own.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = get_peft_model_state_dict(model, state_dict={**own, **(weights or {})})
    config: Any = copy.copy(model.peft_config["default"])
    start = START in model.peft_config
    if start:
        for name, layer in lora_layers(model).items():
            keys = [f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"]
            found |= zip(keys, change_alone(layer, *(found[key] for key in keys)), strict=True)
        config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    state = {
        key: tensor.detach().to("cpu", torch.float32 if "magnitude" in key else torch.float16).contiguous()
        for key, tensor in found.items()
    }
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = loaded.name
    config.inference_mode = True
    config.save_pretrained(str(path))
    sidecar = {"init_seed": None if start else seed, "base": {"name": loaded.name, "sha256": loaded.sha256}}
    (path / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n")


def remove_lora(model: PeftModel) -> None:
    """Take the adapter off again; the base is as it was."""
    model.unload()
