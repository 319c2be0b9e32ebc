"""Steps written out against the model's own forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.apply import LoraSlot
from cascade.models.attention import enable_sharing
from cascade.models.caches import Prefix, RowCache, Shared
from cascade.models.steps import LlamaSteps

ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 32


def make_model(heads=6, key_heads=2, bias=False, tied=True, rope=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=256,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        **({"rope_parameters": rope} if rope else {}),
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    enable_sharing(model)
    return model


def fill_slot(model):
    """A modifier on all linear layers of the model's decoder."""
    rng = np.random.default_rng(1)
    layers = {
        name: LoraPair(
            rng.normal(size=(4, module.in_features)).astype(np.float32),
            rng.normal(size=(module.out_features, 4)).astype(np.float32),
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "proj" in name
    }
    slot = LoraSlot(model)
    slot.fill(AdapterWeights(layers, 0.1, 4, BaseRef("", ""), ("q_proj",)))
    return slot


class Rows:
    """Prompts of 9 and 4 tokens in a cache, maybe behind a shared beginning of 6, and what comes next."""

    def __init__(self, model, shared):
        self.model = model
        generator = torch.Generator().manual_seed(3)
        self.prompts = [torch.randint(0, 97, (n,), generator=generator) for n in (9, 4)]
        self.beginning = torch.randint(0, 97, (6 if shared else 0,), generator=generator)
        self.next = torch.randint(0, 97, (2, 3), generator=generator)

    def expected(self, row, made):
        """Logits after so many of the next tokens, by one forward over everything."""
        ids = torch.cat([self.beginning, self.prompts[row], self.next[row, :made]])
        return self.model(input_ids=ids[None]).logits[0, -1]

    def computed(self):
        """Logits of both rows after each of the next tokens, step by step."""
        steps = LlamaSteps.of(self.model)
        cache, shared, start = RowCache(3), None, len(self.beginning)
        if start:
            states = DynamicCache(config=self.model.config)
            self.model(input_ids=self.beginning[None], past_key_values=states, use_cache=True)
            shared = Shared.of([Prefix.of(self.beginning.tolist(), states)] * 2, torch.device("cpu"))
        for prompt in self.prompts:
            alone = DynamicCache(config=self.model.config)
            whole = torch.cat([self.beginning, prompt])
            self.model(input_ids=whole[None], past_key_values=alone, use_cache=True)
            for layer in alone.layers:
                layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]
            cache.add(alone)
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, :5] = False
        for i in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            positions = torch.tensor([[start + len(p) + i] for p in self.prompts])
            yield steps(self.next[:, i : i + 1], mask, positions, cache, shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "kind", [{}, {"key_heads": 6}, {"bias": True, "tied": False}, {"rope": ROPE}], ids=["gqa", "mha", "bias", "rope"]
)
@torch.inference_mode()
def test_steps_give_the_logits_of_the_models_own_forward(kind, adapted, shared):
    model = make_model(**kind)
    bare = Rows(model, shared).expected(0, 1)
    if adapted:
        fill_slot(model)
    rows = Rows(model, shared)
    assert adapted != torch.allclose(rows.expected(0, 1), bare, atol=1e-3)
    for made, logits in enumerate(rows.computed(), 1):
        for row in (0, 1):
            torch.testing.assert_close(logits[row], rows.expected(row, made), atol=2e-4, rtol=1e-4)


def test_other_models_are_left_to_their_own_forward():
    config = Qwen2Config(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert LlamaSteps.of(Qwen2ForCausalLM(config)) is None
    gelu = make_model().config
    gelu.hidden_act = "gelu"
    assert LlamaSteps.of(LlamaForCausalLM(gelu)) is None
