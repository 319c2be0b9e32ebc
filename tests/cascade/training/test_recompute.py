"""Gradient checkpointing changes nothing but memory, whatever the base drops out or adds in training mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from cascade.training.recompute import recompute_activations

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
BASES = {
    "attention": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=32, attention_dropout=0.5, attn_implementation="eager")
    ),
    "modules": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ),
    "functions and whole layers": lambda: OPTForCausalLM(
        OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    ),
}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.arange(1, 13)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    parameters = list(model.parameters())
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


@pytest.mark.parametrize("name", BASES)
def test_recomputed_activations_give_the_gradients_of_evaluation_mode(name: str) -> None:
    torch.manual_seed(0)
    model = BASES[name]().eval()
    other = copy.deepcopy(model)
    recompute_activations(other)
    assert other.training
    for x, y in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(x, y)
    again = copy.deepcopy(model).train()
    assert not torch.equal(gradients(model)[0], gradients(again)[0])  # what the test above would notice
