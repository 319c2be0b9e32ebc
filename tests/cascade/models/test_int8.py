"""A base in 8 bits against the same base in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import save_tiny_base
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.apply import LoraSlot
from cascade.config import Base
from cascade.errors import ConfigError
from cascade.models import int8
from cascade.models.attention import enable_sharing
from cascade.models.base import load_base
from cascade.models.caches import RowCache
from cascade.models.generation import generate
from cascade.models.int8 import Int8Embedding, Int8Linear, hold_in_int8
from cascade.models.rows import Request
from cascade.models.steps import LlamaSteps

CPU = torch.device("cpu")


def make_model(tied: bool = True, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.2)
    return model


def in_int8(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of a model, in 8 bits."""
    held = copy.deepcopy(model)
    hold_in_int8(held)
    return held


def adapter(model: nn.Module, scaling: float = 0.1) -> AdapterWeights:
    """A LoRA on every linear layer of the decoder."""
    rng = np.random.default_rng(1)
    layers = {
        name: LoraPair(
            rng.normal(size=(4, module.in_features)).astype(np.float32),
            rng.normal(size=(module.out_features, 4)).astype(np.float32),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "proj" in name
    }
    return AdapterWeights(layers, scaling, 4, BaseRef("", ""), ("q_proj",))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 40])
@pytest.mark.parametrize("shape", [(48, 96), (2600, 512)], ids=["whole", "in parts"])  # (outputs, inputs)
@torch.inference_mode()
def test_a_layer_computes_what_its_levels_and_scales_say(rows: int, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    torch.manual_seed(rows)
    layer = nn.Linear(inputs, outputs).bfloat16()
    held = Int8Linear.of(layer)
    x = torch.randn(2, rows, inputs, dtype=torch.bfloat16)[:1]
    exact = (x.double() @ held.weight.double().T) * held.scales.double() + held.bias.double()
    got = held(x)
    assert got.shape == (1, rows, outputs)
    assert got.dtype == torch.bfloat16
    # Rounded to bfloat16 after the sum, the scaling and the bias.
    torch.testing.assert_close(got.double(), exact, rtol=3 * 2**-8, atol=0.02)


@torch.inference_mode()
def test_up_to_sixteen_rows_read_the_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Int8Linear.of(nn.Linear(576, 1536).bfloat16())
    parts, whole = [], int8._in_parts
    monkeypatch.setattr(int8, "_in_parts", lambda rows, levels: parts.append(len(rows)) or whole(rows, levels))
    for count in (1, 5, 16, 17, 64):
        held(torch.randn(count, 576, dtype=torch.bfloat16))
    assert parts == [17, 64]


@torch.inference_mode()
def test_weights_come_back_to_half_a_level() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 64).bfloat16()
    weight[3] = 0
    weight[4] = 1e-30
    layer = nn.Linear(64, 20, bias=False).bfloat16()
    layer.weight.copy_(weight)
    held = Int8Linear.of(layer)
    back = held.weight.double() * held.scales.double()[:, None]
    assert ((back - weight.double()).abs() <= 0.501 * held.scales.double()[:, None]).all()
    assert (back[3] == 0).all()
    assert (back - weight.double()).abs().mean() < 0.3 * held.scales.double().mean()


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("rows", [1, 4, 20])
@torch.inference_mode()
def test_logits_are_close_to_those_of_the_base(tied: bool, bias: bool, rows: int) -> None:
    model = make_model(tied, bias)
    held = in_int8(model)
    ids = torch.randint(0, 97, (rows, 7), generator=torch.Generator().manual_seed(1))
    full, few = (m(input_ids=ids).logits.float() for m in (model, held))
    assert (full - few).norm() < 0.05 * full.norm()
    assert not torch.equal(full, few)


@torch.inference_mode()
def test_an_adapter_changes_it_as_it_changes_the_base() -> None:
    model = make_model()
    held, ids = in_int8(model), torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    bare = held(input_ids=ids).logits.float()
    slots = LoraSlot(model), LoraSlot(held)
    assert slots[1].dtype == torch.bfloat16
    for slot in slots:
        slot.fill(adapter(model))
    full, few = (m(input_ids=ids).logits.float() for m in (model, held))
    assert (full - few).norm() < 0.05 * full.norm() < 0.5 * (full - bare).norm()
    slots[1].clear()
    assert torch.equal(held(input_ids=ids).logits.float(), bare)


@pytest.mark.parametrize("tied", [True, False])
def test_it_takes_a_byte_for_each_number(tied: bool) -> None:
    model = make_model(tied)
    held = in_int8(model)
    size = sum(p.numel() * p.element_size() for p in held.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    rows = sum(m.weight.shape[0] for m in held.modules() if isinstance(m, Int8Linear)) + (0 if tied else 97)
    norms = 5 * 64
    assert size == numbers - norms + 2 * (norms + rows)
    embedding, head = held.get_input_embeddings(), held.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding)
    assert isinstance(head, Int8Linear)
    assert (embedding.weight is head.weight) == tied
    assert not any(p.requires_grad for p in held.parameters())


@torch.inference_mode()
def test_inputs_that_the_kernel_does_not_take_are_computed_too() -> None:
    held = Int8Linear.of(nn.Linear(37, 5, bias=False).bfloat16())
    x = torch.randn(2, 37, dtype=torch.bfloat16)
    exact = (x.double() @ held.weight.double().T) * held.scales.double()
    torch.testing.assert_close(held(x).double(), exact, rtol=2**-6, atol=0.02)


@pytest.mark.parametrize("rows", [1, 6])
@torch.inference_mode()
def test_steps_give_the_logits_of_its_own_forward(rows: int) -> None:
    held = in_int8(make_model())
    enable_sharing(held)
    slot = LoraSlot(held)
    ids = torch.randint(0, 97, (rows, 8), generator=torch.Generator().manual_seed(4))
    bare = held(input_ids=ids).logits[:, -1].float()
    slot.fill(adapter(make_model(), 0.02))
    begun, cache = DynamicCache(config=held.config), RowCache(2)
    held(input_ids=ids[:, :7], past_key_values=begun, use_cache=True)
    cache.add(begun)
    steps = LlamaSteps.of(held)
    assert steps is not None
    positions = torch.full((rows, 1), 7)
    got = steps(ids[:, 7:], torch.ones(rows, 8, dtype=torch.bool), positions, cache, None)
    wanted = held(input_ids=ids).logits[:, -1].float()
    assert (got - wanted).norm() < 0.05 * wanted.norm() < 0.3 * (wanted - bare).norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base")
    save_tiny_base(target)
    return target


@torch.inference_mode()
def test_greedy_answers_do_not_depend_on_the_batch_but_for_ties(folder: Path) -> None:
    """Sums in another order round to another bfloat16 now and then, which shows where two tokens are level."""
    loaded = load_base(Base(model=str(folder), dtype="bfloat16"), CPU, "int8")
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, 200, (int(n),), generator=generator).tolist() for n in range(3, 15)]
    asked = [Request(p, 12) for p in prompts]
    together = [answer.token_ids for answer in generate(loaded, asked)]
    alone = [generate(loaded, [request])[0].token_ids for request in asked]
    differing = [(p, a, b) for p, a, b in zip(prompts, together, alone, strict=True) if a != b]
    assert len(differing) <= 2
    for prompt, one, other in differing:
        at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *one[:at]]])).logits[0, -1].float()
        assert logits.max() - logits[[one[at], other[at]]].min() <= 2**-6 * logits.abs().max()


def test_it_is_the_same_base_to_modifiers(folder: Path) -> None:
    base = Base(model=str(folder), dtype="bfloat16")
    assert load_base(base, CPU, "int8").sha256 == load_base(base, CPU).sha256


def test_a_base_in_float32_cannot_be_held_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"serving\.weights.*base\.dtype: bfloat16"):
        load_base(Base(model=str(folder), dtype="float32"), CPU, "int8")
