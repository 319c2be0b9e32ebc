"""Prompts in parts, from what is known of their beginnings, against prompts computed at once."""

from __future__ import annotations

import random

import pytest
import torch

from cascade.models.generation import Batch, generate
from cascade.models.prompts import Prompts, compute_prefix
from cascade.models.rows import Request, Row


def random_prompt(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(5, 261) for _ in range(length)]


REQUESTS = [Request(random_prompt(n, seed), 12) for seed, n in enumerate((40, 3, 17, 29))]


def rows_of(loaded, requests=REQUESTS):
    return [Row.new(i, r, loaded.device) for i, r in enumerate(requests)]


def until_done(batch):
    while batch.rows:
        batch.step()


def expected(loaded, requests=REQUESTS):
    return [g.token_ids for g in generate(loaded, requests)]


@pytest.mark.parametrize("tokens", [1, 20, 64])
@pytest.mark.parametrize("known", [False, True])
def test_parts_come_to_what_the_whole_does(loaded, tokens, known):
    rows = rows_of(loaded)
    beginnings = [compute_prefix(loaded, r.own[: len(r.own) // 2]) if r.index != 2 else None for r in rows]
    prompts = Prompts(loaded, rows, beginnings if known else ())
    parts = 1
    while not prompts.advance(tokens):
        parts += 1
    assert (parts > 1) == (tokens < 4 * 40) == (not prompts.left)
    batch = Batch(loaded)
    batch.take(prompts)
    until_done(batch)
    assert [tuple(r.tokens) for r in rows] == expected(loaded)


def test_a_shared_beginning_is_not_computed_again(loaded):
    shared = random_prompt(20, 99)
    requests = [Request([*shared, *r.prompt], 12) for r in REQUESTS]
    rows, prefix = rows_of(loaded, requests), compute_prefix(loaded, shared)
    for row in rows:
        row.prefix = prefix
    prompts = Prompts(loaded, rows)
    assert prompts.columns == 40
    while not prompts.advance(32):
        pass
    batch = Batch(loaded)
    batch.take(prompts)
    until_done(batch)
    assert [tuple(r.tokens) for r in rows] == expected(loaded, requests)


def test_rows_can_leave_half_way(loaded):
    rows = rows_of(loaded)
    prompts = Prompts(loaded, rows)
    prompts.advance(60)
    prompts.leave({0, 2})
    while not prompts.advance(60):
        pass
    batch = Batch(loaded)
    batch.take(prompts)
    until_done(batch)
    assert [tuple(r.tokens) for r in rows] == [(), expected(loaded)[1], (), expected(loaded)[3]]


def test_what_a_row_leaves_is_what_its_tokens_come_to(loaded):
    left = []
    batch = Batch(loaded, left.append)
    rows = rows_of(loaded)
    batch.join(rows)
    until_done(batch)
    assert sorted(len(p) for p in left) == sorted(len(r.request.prompt) + 11 for r in rows)
    for prefix in left:
        exact = compute_prefix(loaded, prefix.tokens)
        for found, wanted in zip(prefix.states, exact.states, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert prefix.cut(5).tokens == prefix.tokens[:5]
        assert prefix.cut(5).states[0][0].shape[2] == 5


def test_rows_go_on_in_another_batch_where_they_were(loaded):
    rows, one, other = rows_of(loaded), Batch(loaded), Batch(loaded)
    one.join(rows[:3])
    other.join(rows[3:])
    for _ in range(5):
        one.step()
    one.hand_over({1, 2}, other)
    assert ([r.index for r in one.rows], sorted(r.index for r in other.rows)) == ([0], [1, 2, 3])
    until_done(one)
    until_done(other)
    assert [tuple(r.tokens) for r in rows] == expected(loaded)


def test_a_row_that_gave_way_goes_on_from_its_tokens(loaded):
    rows, batch = rows_of(loaded), Batch(loaded)
    batch.join(rows)
    for _ in range(4):
        batch.step()
    batch.leave({0})
    batch.join([rows[0]])
    until_done(batch)
    assert [tuple(r.tokens) for r in rows] == expected(loaded)
