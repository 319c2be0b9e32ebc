"""A base of 8 or 4 bits to train a LoRA on, by bitsandbytes: optional, and made for GPUs."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal

from cascade.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BLOCK = 64
"""Weights that share a scale in 4 bits."""


def check_installed(bits: Literal[16, 8, 4]) -> None:
    """
    Raises:
        ConfigError: bits below 16 need bitsandbytes, which is not there.
    """
    if bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.base_bits: {bits} needs bitsandbytes: pip install 'cascade-modifiers[qlora]', or set it to 16"
        )


def quantization(bits: Literal[8, 4], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes for linear layers of 8 bits (LLM.int8) or 4 (QLoRA: NF4, scales packed too).

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    check_installed(bits)
    from transformers import BitsAndBytesConfig  # not for those who only ask whether it is installed

    if bits == 8:
        # It computes in float16 between, and would say so at every layer of every step.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_to_sound_kernels(model: PreTrainedModel) -> None:
    """See that a model in 4 bits is computed correctly on a CPU, as bitsandbytes 0.50 does not in two cases.

    Where the CPU computes in bfloat16 it would pack the weights anew at the first look at answers, and fail at a layer
    whose outputs are no multiple of 32: it is told not to. And where a layer's inputs are no multiple of 64, it takes
    wrong scales for a part of the weights (a third of their size off).

    Raises:
        ConfigError: a layer's inputs are no multiple of 64.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if module.in_features % _BLOCK:
                raise ConfigError(
                    f"training.base_bits: 4 cannot be computed on a CPU for this base: {name} has {module.in_features} "
                    f"inputs, no multiple of {_BLOCK}; set it to 8 or 16, or train on a GPU"
                )
            module.support_avx512bf16_for_cpu = False
