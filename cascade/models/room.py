"""How many tokens a device has room for: held at once while answers are generated, and computed in one pass."""

from __future__ import annotations

import torch

from cascade.models.base import LoadedBase

_CPU_TOKENS = 32_768
"""Tokens in memory at once on a CPU, where many rows are computed no faster than some."""
_GPU_SHARE = 0.4
"""Share of a GPU's free memory for keys and values."""


def tokens_in_memory(loaded: LoadedBase) -> int:
    """How many tokens' keys and values to hold: on a GPU what a share of its free memory takes."""
    if loaded.device.type != "cuda":
        return _CPU_TOKENS
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * loaded.model.dtype.itemsize
    free, total = torch.cuda.mem_get_info(loaded.device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(loaded.device)
    used = torch.cuda.memory_allocated(loaded.device)
    unused = torch.cuda.memory_reserved(loaded.device) - used  # an earlier batch's: torch keeps it, for us to take
    room = min(free + unused, allowed - used)
    return max(_CPU_TOKENS, int(_GPU_SHARE * room / per_token))


def tokens_in_a_pass(device: torch.device) -> int:
    """How many prompt tokens to compute in one forward pass, which bounds the memory for activations."""
    return 32_768 if device.type == "cuda" else 2048
