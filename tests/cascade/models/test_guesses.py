"""Guessed tokens save steps and change no answer."""

from __future__ import annotations

import random

import pytest
import torch
from stand_in import save_tiny_base

from cascade.config import Base
from cascade.models.base import load_base
from cascade.models.generation import Batch
from cascade.models.guesses import MOST, Guesses
from cascade.models.rows import Request, Row
from cascade.models.steps import LlamaSteps


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    save_tiny_base(folder)
    return load_base(Base(model=str(folder), dtype="bfloat16"), torch.device("cpu"), "int8")


class Oracle(Guesses):
    """Knows an answer, and is wrong about every fifth token."""

    def __init__(self, tokens):
        super().__init__()
        self._tokens = tokens

    def next(self, tokens):
        ahead = range(len(tokens), min(len(tokens) + MOST, len(self._tokens)))
        return [5 if i % 5 == 0 else self._tokens[i] for i in ahead]


def answer(loaded, requests, known=()):
    """Rows once they are done, and the tokens of each step's pass; the others join after four steps of the first."""
    passes, call = [], LlamaSteps.__call__

    def spy(steps, ids, *more):
        passes.append(ids.numel())
        return call(steps, ids, *more)

    rows = [Row.new(i, r, loaded.device) for i, r in enumerate(requests)]
    for row, tokens in zip(rows, known, strict=False):
        row.guesses = Oracle([*row.request.prompt, *tokens])
    batch = Batch(loaded)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LlamaSteps, "__call__", spy)
        batch.join(rows[:1])
        steps = 0
        while batch.rows:
            steps += 1
            batch.step()
            if steps == 4:
                batch.join(rows[1:])
    return rows, passes


RNG = random.Random(1)
PROMPT = [RNG.randrange(5, 261) for _ in range(30)]


@pytest.mark.parametrize("more", [{}, {"temperature": 0.3, "seed": 4}, {"temperature": 1.0, "top_p": 0.5}])
@torch.inference_mode()
def test_answers_are_the_same_in_fewer_steps(in_8_bits, more):
    request = Request(PROMPT, 100, **more)
    (plain,), singly = answer(in_8_bits, [request])
    (guessed,), passes = answer(in_8_bits, [request], [plain.tokens])
    assert guessed.tokens == plain.tokens
    assert max(passes) == 1 + MOST
    assert len(passes) < 0.6 * len(singly)


@torch.inference_mode()
def test_several_tokens_give_the_very_numbers_that_they_give_one_by_one(in_8_bits):
    logits = []
    for known in ((), [answer(in_8_bits, [Request(PROMPT, 60)])[0][0].tokens]):
        row, noted = Row.new(0, Request(PROMPT, 60), in_8_bits.device), []
        row.adjust = lambda given, noted=noted: noted.append(given.clone()) or given
        if known:
            row.guesses = Oracle([*PROMPT, *known[0]])
        batch = Batch(in_8_bits)
        batch.join([row])
        while batch.rows:
            batch.step()
        logits.append(torch.stack(noted))
    assert torch.equal(*logits)


@torch.inference_mode()
def test_whoever_joins_between_finds_no_guesses_in_the_cache(in_8_bits):
    requests = [Request(PROMPT, 60), Request(PROMPT[5:], 20), Request(PROMPT[9:], 30)]
    plain, _ = answer(in_8_bits, requests)
    guessed, passes = answer(in_8_bits, requests, [r.tokens for r in plain])
    # At the fourth step guesses are in the cache; from then on three rows run, until one is left again.
    assert [r.tokens for r in guessed] == [r.tokens for r in plain]
    assert max(passes) == 1 + MOST


@torch.inference_mode()
def test_no_more_is_made_than_was_asked_for(in_8_bits):
    (plain,), _ = answer(in_8_bits, [Request(PROMPT, 30)])
    for most in range(1, 14):
        (row,), _ = answer(in_8_bits, [Request(PROMPT, most)], [plain.tokens])
        assert row.tokens == plain.tokens[:most]
        assert row.finish == "length"


def test_a_base_in_other_numbers_does_not_guess(loaded):
    (plain,), _ = answer(loaded, [Request(PROMPT, 12)])
    _, passes = answer(loaded, [Request(PROMPT, 12)], [plain.tokens])
    assert set(passes) == {1}


def test_what_stood_there_before_is_guessed():
    guesses = Guesses()
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert guesses.next(tokens) == [4, 5, 6]
    assert guesses.next([*tokens, 9]) == []
    assert guesses.next([*tokens, 9, 1, 2, 3]) == [9, 1, 2]
    assert Guesses().next([1, 2]) == []


def test_guesses_that_are_wrong_end_and_are_tried_again():
    guesses, tokens, tried = Guesses(), [1, 2, 3], 0
    for _ in range(2000):
        tokens += [random.Random(len(tokens)).randrange(9, 99), 1, 2, 3]
        if guesses.next(tokens):
            tried += 1
            guesses.came(0, len(tokens))
    assert 10 < tried < 60
