"""Layers with LoRA as one autograd function, and compiled: the same figures as PEFT's, and few programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM

from cascade.config import Base, Lora
from cascade.models.base import load_base
from cascade.training import layout
from cascade.training.examples import EncodedExample
from cascade.training.fused import LoraProduct, compile_layers
from cascade.training.loop import TargetLoss
from cascade.training.lora import add_lora, trainable
from cascade.training.packing import Row

CPU = torch.device("cpu")
DEPTH = 3


def row(count):
    return Row(
        tuple(
            EncodedExample(
                f"e{i}", tuple(5 + (i * 31 + j * 7) % 250 for j in range(9 + i)), (False,) * 4 + (True,) * (5 + i)
            )
            for i in range(count)
        )
    )


@pytest.fixture
def make_module(tiny_folder):
    """A deeper model with an adapter that is not at its start."""

    def make(*, fused):
        torch.manual_seed(0)
        base = load_base(Base(model=str(tiny_folder), dtype="float32"), CPU)
        config = AutoConfig.from_pretrained(tiny_folder, num_hidden_layers=DEPTH)
        base = replace(base, model=AutoModelForCausalLM.from_config(config).eval())
        module = TargetLoss(add_lora(base, Lora(rank=4), seed=1), fused=fused)
        for parameter in trainable(module):
            parameter.data += 0.02 * torch.randn(parameter.shape)
        return module

    return make


def loss_and_gradients(module, rows):
    loss = sum(module(**layout.plain(r, CPU)) for r in rows)
    loss.backward()
    return loss.detach(), [p.grad for p in trainable(module)]


def test_the_fused_layer_computes_what_pefts_does(make_module):
    ours, theirs = (loss_and_gradients(make_module(fused=fused), [row(3)]) for fused in (True, False))
    torch.testing.assert_close(ours[0], theirs[0])
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, atol=float(1e-5 * other.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layers_gradients_are_those_of_its_formula(with_bias, compiled):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 6), (7, 6), (3, 6), (7, 3)))
    bias = torch.randn(7, dtype=torch.float64) if with_bias else None
    product = torch.compile(LoraProduct.apply, backend="aot_eager") if compiled else LoraProduct.apply
    given = [tensor.requires_grad_() for tensor in (x, a, b)]
    expected = torch.nn.functional.linear(x, weight, bias) + 0.5 * x @ a.T @ b.T
    found = product(x, weight, bias, a, b, 0.5)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_is_one_that_torch_can_compile_around(with_bias):
    x, w, low, v = torch.randn(5, 6), torch.randn(6, 7), torch.randn(5, 3), torch.randn(3, 7)
    torch.library.opcheck(torch.ops.cascade.two_products, (x, w, low, v, torch.randn(7) if with_bias else None))


def test_all_layers_and_lengths_share_two_programs(make_module):
    torch.compiler.reset()
    module, counter = make_module(fused=True), CompileCounter()
    plain = loss_and_gradients(make_module(fused=True), [row(2), row(5), row(7)])
    compile_layers(module.model, backend=counter)
    compiled = loss_and_gradients(module, [row(2), row(5), row(7)])
    assert counter.frame_count == 2, "the first layer's input needs no gradient; the others are alike"
    torch.testing.assert_close(compiled[0], plain[0])


def test_answering_between_two_steps_compiles_nothing_anew(make_module):
    torch.compiler.reset()
    module, counter = make_module(fused=True), CompileCounter()
    compile_layers(module.model, backend=counter)
    loss_and_gradients(module, [row(2), row(5)])
    was_training = module.model.training
    module.model.eval()
    module.model.train(was_training)
    loss_and_gradients(module, [row(2), row(5)])
    assert counter.frame_count == 2


def test_the_compiled_loss_is_one_program_more_and_the_same_loss(make_module):
    torch.compiler.reset()
    module, counter = make_module(fused=True), CompileCounter()
    plain = loss_and_gradients(make_module(fused=True), [row(2), row(5), row(7)])
    module.compile_parts(backend=counter)
    compiled = loss_and_gradients(module, [row(2), row(5), row(7)])
    assert counter.frame_count == 3
    torch.testing.assert_close(compiled[0], plain[0])
    for one, other in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(one, other)
