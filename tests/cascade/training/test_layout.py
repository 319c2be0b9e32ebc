"""Every layout of a packed row gives each example the losses and gradients that it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.config import Base, Lora
from cascade.models.attention import NAME
from cascade.models.base import load_base
from cascade.training.examples import EncodedExample
from cascade.training.fused import LoraProduct, LowRankAddition
from cascade.training.layout import common_prefix, layout_for, packed_attention, plain, shared, varlen
from cascade.training.loop import TargetLoss
from cascade.training.lora import add_lora, trainable
from cascade.training.packing import Row

CPU = torch.device("cpu")
PREFIX = tuple(range(20, 32))


def example(name, own, learned=3, prefix=PREFIX):
    """A prefix that others may share, tokens of its own, the last few learned."""
    ids = (*prefix, *(5 + (hash_of(name) * 31 + j * 7) % 250 for j in range(own)))
    return EncodedExample(name, ids, (False,) * (len(ids) - learned) + (True,) * learned)


def hash_of(name):
    return sum(map(ord, name))


ROWS = {
    "a shared prefix": Row((example("a", 9), example("bb", 4), example("c", 17, learned=17))),
    "no shared prefix": Row((example("a", 9, prefix=()), example("b", 5, prefix=()), example("c", 2, 1, prefix=()))),
    "one example": Row((example("a", 9),)),
    "one that is the prefix and a target": Row((example("a", 1, learned=1), example("bb", 8))),
}


@pytest.fixture
def module(tiny_folder):
    """A moved adapter on a base of one's own."""
    base = load_base(Base(model=str(tiny_folder), dtype="float32"), CPU)
    module = TargetLoss(add_lora(base, Lora(rank=4), seed=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(module):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def alone(module, row):
    """Loss and gradients by definition: stock PEFT, each example for itself, logits everywhere."""
    model = module.model
    for layer in model.modules():
        layer.__dict__.pop("forward", None)
    model.get_base_model().set_attn_implementation("eager")
    total = 0.0
    for e in row.examples:
        log_p = model(torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
        total = total - sum(log_p[i - 1, t] for i, t in enumerate(e.input_ids) if e.is_target[i])
    return total, torch.autograd.grad(total, trainable(module))


@pytest.mark.parametrize("name", ROWS)
def test_shared_rows_have_the_losses_and_gradients_of_examples_alone(module, name):
    row = ROWS[name]
    assert module.inputs is shared
    ours = module(**shared(row, CPU))
    gradients = torch.autograd.grad(ours, trainable(module))
    expected, theirs = alone(module, row)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-4 * row.targets)
    for x, y in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)


def test_a_prefix_is_computed_once_and_last_tokens_never():
    row = ROWS["a shared prefix"]
    tensors = shared(row, CPU)
    assert tensors["input_ids"].shape == (1, 12 + 8 + 3 + 16)
    assert tensors["starts"] == (12, 20, 23, 39)
    assert tensors["position_ids"][0].tolist() == [*range(12), *range(12, 20), *range(12, 15), *range(12, 28)]
    assert tensors["target_index"][-17:].tolist() == [11, *range(23, 39)]  # its first one follows the prefix
    alone_too = shared(ROWS["no shared prefix"], CPU)
    assert alone_too["starts"] == (0, 8, 12, 13)


def test_varlen_rows_are_laid_out_one_behind_the_other():
    row = ROWS["a shared prefix"]
    tensors = varlen(row, CPU)
    assert tensors["cu_seq_lens_q"].tolist() == [0, 20, 35, 63]
    assert tensors["cu_seq_lens_q"].dtype == torch.int32
    assert tensors["max_length_q"] == 32
    expected = plain(row, CPU)
    kept = [i for i in range(row.tokens) if i not in (20, 36, 65)]
    assert torch.equal(tensors["input_ids"][0], expected["input_ids"][0, kept])
    assert torch.equal(tensors["position_ids"][0], expected["position_ids"][0, kept])
    assert torch.equal(tensors["target_ids"], expected["target_ids"])
    picked = expected["input_ids"][0, expected["target_index"]]
    assert torch.equal(tensors["input_ids"][0, tensors["target_index"]], picked)


def test_varlen_attention_is_asked_for_causal_attention_in_each_example(module, monkeypatch):
    row = ROWS["a shared prefix"]

    def stand_in(q, k, v, starts, ends, longest_q, longest_k, *, scale, window_size):
        """What torch's kernel, which is for CUDA alone, computes."""
        assert window_size == (-1, 0)
        assert torch.equal(starts, ends)
        out = torch.empty_like(q)
        for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            assert end - begin <= longest_q == longest_k
            q1, k1, v1 = (t[begin:end].transpose(0, 1) for t in (q, k, v))
            scores = (q1 @ k1.transpose(1, 2) * scale).masked_fill(
                ~torch.ones(end - begin, end - begin).tril().bool(), -1e9
            )
            out[begin:end] = (scores.softmax(-1) @ v1).transpose(0, 1)
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    with torch.no_grad():
        ours = module(**varlen(row, CPU))
    assert ours.item() == pytest.approx(alone(module, row)[0].item(), abs=1e-4 * row.targets)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 9))
def test_a_common_prefix_is_common_and_longest(tokens, learned):
    examples = [
        EncodedExample(str(i), tuple(ids), tuple(k >= max(0, len(ids) - learned) for k in range(len(ids))))
        for i, ids in enumerate(tokens)
    ]
    n = common_prefix(Row(tuple(examples)))
    if len(examples) == 1:
        assert n == 0
        return
    assert len({e.input_ids[:n] for e in examples}) == 1
    assert not any(any(e.is_target[:n]) for e in examples)
    one_more = {e.input_ids[: n + 1] for e in examples}
    assert len(one_more) > 1 or any(any(e.is_target[: n + 1]) or len(e) == n for e in examples)


def test_a_model_that_attends_otherwise_keeps_its_own_way(module):
    inner = module.model.get_base_model()
    inner.set_attn_implementation("sdpa")
    inner.config.sliding_window = 8
    inner.config.layer_types = ["sliding_attention"] * len(inner.model.layers)
    assert layout_for(module.model) is plain
    inner.config.sliding_window, inner.config.layer_types = None, None
    assert layout_for(module.model) is shared
    inner.set_attn_implementation("eager")
    assert layout_for(module.model) is plain
    assert layout_for(torch.nn.Linear(2, 2)) is plain


def test_generation_is_that_of_sdpa(module):
    inner = module.model.get_base_model()
    assert inner.config._attn_implementation == NAME
    ids = torch.arange(5, 25)[None].repeat(2, 1)
    seen = torch.ones_like(ids)
    seen[1, :6] = 0
    answers = []
    for implementation in (NAME, "sdpa"):
        inner.set_attn_implementation(implementation)
        answers.append(
            module.model.generate(
                input_ids=ids, attention_mask=seen, max_new_tokens=6, do_sample=False, output_logits=True,
                return_dict_in_generate=True, pad_token_id=1,
            ).logits
        )  # fmt: skip
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)


def test_packed_attention_shares_keys_between_groups_of_heads():
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, starts=(0, 7))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2))


@pytest.mark.integration  # it starts a compiler
def test_compiled_layers_compute_the_same_in_one_graph(module):
    row = ROWS["a shared prefix"]
    expected = module(**shared(row, CPU))
    gradients = torch.autograd.grad(expected, trainable(module))
    for layer in module.model.get_base_model().model.layers:
        layer.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    ours = module(**shared(row, CPU))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for x, y in zip(torch.autograd.grad(ours, trainable(module)), gradients, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_layer_has_the_gradients_of_its_definition(bias):
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    x, w, a, b = make(2, 5, 6).requires_grad_(), make(7, 6), make(3, 6).requires_grad_(), make(7, 3).requires_grad_()
    offset = make(7) if bias else None
    expected = torch.nn.functional.linear(x, w, offset) + 1.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(LoraProduct.apply(x, w, offset, a, b, 1.5), expected)
    assert torch.autograd.gradcheck(lambda x, a, b: LoraProduct.apply(x, w, offset, a, b, 1.5), (x, a, b))
    by_layer = lambda x, a, b: LowRankAddition.apply(x, torch.nn.functional.linear(x, w, offset), 1.5, a, b)  # noqa: E731
    torch.testing.assert_close(by_layer(x, a, b), expected)
    assert torch.autograd.gradcheck(by_layer, (x, a, b))


def test_gradients_come_in_each_weights_own_dtype():
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(3, 6, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    out = LoraProduct.apply(x, torch.randn(7, 6, dtype=torch.bfloat16), None, a, b, 2.0)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
