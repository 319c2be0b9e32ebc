"""A tiny random Llama and LoRA adapters of its shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.training.seeded_init import initial_lora_a

BASE = BaseRef("tiny", "b" * 64)
TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    torch.set_num_threads(1)  # tiny products; threads would only wait for each other
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_adapter(model: torch.nn.Module, *, rank: int = 8, seed: int | None = 5, noise: int = 0) -> AdapterWeights:
    """As training leaves it: A near its start, B away from zero."""
    rng = np.random.default_rng(noise)
    layers = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] not in TARGETS:
            continue
        start = initial_lora_a(5, name, rank, module.in_features)
        a = start + rng.normal(scale=0.02, size=start.shape).astype(np.float32)
        b = rng.normal(scale=0.2, size=(module.out_features, rank)).astype(np.float32)
        layers[name] = LoraPair(a, b)
    return AdapterWeights(layers, 2.0, rank, BASE, TARGETS, seed)


@pytest.fixture(scope="session")
def untaught(llama: LlamaForCausalLM) -> AdapterWeights:
    """As `adapter`, one for all; not to be written to."""
    return make_adapter(llama)


@pytest.fixture
def adapter(llama: LlamaForCausalLM) -> AdapterWeights:
    return make_adapter(llama)


@pytest.fixture
def foreign(llama: LlamaForCausalLM) -> AdapterWeights:
    """Made elsewhere: the start of A is unknown."""
    return replace(make_adapter(llama), init_seed=None)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(2 * 11).reshape(2, 11) * 7 % 97
