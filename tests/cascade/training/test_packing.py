"""Packing: neighbours in a row do not see each other, labels sit where they belong, and every example comes up once."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cascade.config import Lora
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss
from cascade.training.packing import Row, Step, pack, plan_steps

CPU = torch.device("cpu")


def random_example(name, length, targets=None):
    """Random tokens; the last ones, or a random few, are learned."""
    rng = random.Random(name)
    mask = [i > 0 and (i >= length - targets if targets else rng.random() < 0.5) for i in range(length)]
    mask[-1] = True
    return EncodedExample(name, tuple(rng.randrange(5, 261) for _ in range(length)), tuple(mask))


EXAMPLES = [random_example(f"e{n}", n) for n in (23, 2, 9, 40, 9)]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, tiny_folder):
    return AutoModelForCausalLM.from_pretrained(
        tiny_folder, attn_implementation=request.param, dtype=torch.float32
    ).eval()


def token_losses(model, row):
    """−log p of each learned token of a row, as the packed forward pass gives it."""
    tensors = row.tensors(CPU)
    with torch.no_grad():
        logits = model(
            input_ids=tensors["input_ids"],
            position_ids=tensors["position_ids"],
            use_cache=False,
            logits_to_keep=tensors["target_index"],
        ).logits[0]
    return torch.nn.functional.cross_entropy(logits, tensors["target_ids"], reduction="none")


def losses_alone(model, example):
    """−log p of each learned token by definition: a plain forward pass of the example and no one else."""
    with torch.no_grad():
        log_p = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    return torch.stack([-log_p[i - 1, t] for i, t in enumerate(example.input_ids) if example.is_target[i]])


def test_packed_losses_equal_those_of_examples_alone(model):
    packed = token_losses(model, Row(tuple(EXAMPLES)))
    alone = torch.cat([losses_alone(model, e) for e in EXAMPLES])
    assert packed.shape == alone.shape
    assert alone.std() > 0.5  # tokens are told apart, so that a loss at a wrong place would show
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


def test_without_positions_of_their_own_neighbours_would_be_seen(model):
    # What the test above can tell apart: the same row as one text.
    one_text = EncodedExample("all", sum((e.input_ids for e in EXAMPLES), ()), sum((e.is_target for e in EXAMPLES), ()))
    alone = torch.cat([losses_alone(model, e) for e in EXAMPLES])
    assert (token_losses(model, Row((one_text,))) - alone).abs().max() > 0.1


def test_the_loss_of_a_row_is_the_sum_over_its_targets(model):
    row = Row(tuple(EXAMPLES))
    with torch.no_grad():
        loss = TargetLoss(model)(**row.tensors(CPU))
    assert loss.item() == pytest.approx(sum(losses_alone(model, e).sum().item() for e in EXAMPLES), rel=1e-5)


def test_labels_are_the_next_token_of_the_same_example():
    a = EncodedExample("a", (10, 11, 12, 13), (False, False, True, True))
    b = EncodedExample("b", (20, 21, 22), (False, True, False))
    tensors = Row((a, b)).tensors(CPU)
    assert {k: v.tolist() for k, v in tensors.items()} == {
        "input_ids": [[10, 11, 12, 13, 20, 21, 22]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2]],
        "target_index": [1, 2, 4],
        "target_ids": [12, 13, 21],
    }
    assert (Row((a, b)).tokens, Row((a, b)).targets) == (7, 3)


lengths = st.lists(st.integers(2, 60), min_size=1, max_size=40)
settings_of = st.builds(
    Lora,
    epochs=st.floats(0.05, 4).map(lambda x: round(x, 2)),
    tokens_per_step=st.integers(1, 300),
    max_length=st.integers(60, 120),
)


def made(lengths):
    return [EncodedExample(f"e{i}", (7,) * n, (False,) + (True,) * (n - 1)) for i, n in enumerate(lengths)]


def ids(steps):
    return [e.sample_id for s in steps for r in s.rows for e in r.examples]


@given(lengths, st.integers(60, 200))
def test_packing_keeps_every_example_whole_and_within_the_row(lengths, most):
    examples = made(lengths)
    rows = pack(examples, most)
    assert Counter(e for r in rows for e in r.examples) == Counter(examples)
    assert all(r.tokens <= most for r in rows)
    # First fit: no two rows are so empty that they would have been one.
    assert all(a.tokens + b.tokens > most for i, a in enumerate(rows) for b in rows[:i])


def test_a_row_is_filled_to_the_last_token():
    assert [r.tokens for r in pack(made([40, 20, 35, 25]), 60)] == [60, 60]


@given(lengths, settings_of, st.integers(0, 99))
def test_every_example_comes_up_once_in_each_epoch(lengths, settings, seed):
    examples = made(lengths)
    seen = ids(plan_steps(examples, settings, seed))
    whole, part = int(settings.epochs), settings.epochs % 1
    extra = max(1, round(len(examples) * part)) if part else 0
    assert len(seen) == whole * len(examples) + extra
    for epoch in range(whole):
        assert sorted(seen[epoch * len(examples) : (epoch + 1) * len(examples)]) == sorted(
            e.sample_id for e in examples
        )
    rest = seen[whole * len(examples) :]
    assert len(set(rest)) == len(rest)


@given(lengths, settings_of, st.integers(0, 99))
def test_steps_hold_about_as_many_tokens_as_asked_for(lengths, settings, seed):
    steps = plan_steps(made(lengths), settings, seed)
    for step in steps:
        assert step.rows
        assert all(r.tokens <= settings.max_length for r in step.rows)
        alone = sum(len(r.examples) for r in step.rows) == 1
        assert step.tokens <= settings.tokens_per_step or alone
        assert step.targets == sum(r.targets for r in step.rows)


@given(lengths, settings_of, st.integers(0, 99))
def test_a_plan_depends_on_examples_settings_and_seed_alone(lengths, settings, seed):
    examples = made(lengths)
    shuffled = random.Random(1).sample(examples, len(examples))
    assert plan_steps(shuffled, settings, seed) == plan_steps(examples, settings, seed)


def test_epochs_and_seeds_shuffle_anew():
    examples = made([5] * 40)
    settings = Lora(epochs=2, tokens_per_step=20, max_length=60)
    seen = ids(plan_steps(examples, settings, 3))
    assert seen[:40] != seen[40:]
    assert seen != ids(plan_steps(examples, settings, 4))
    assert plan_steps([], settings, 3) == []


@given(st.integers(1, 30), st.integers(1, 40))
def test_workers_share_all_rows_once_and_do_equally_many(rows, world):
    step = Step(tuple(Row((e,)) for e in made([3] * rows)))
    shares = [step.share(rank, world) for rank in range(world)]
    assert {len(s) for s in shares} == {math.ceil(rows / world)}
    assert Counter(r for s in shares for r in s if r is not None) == Counter(step.rows)
