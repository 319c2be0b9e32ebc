"""Likelihoods of choices against a direct computation, whatever is shared and however it is batched."""

from __future__ import annotations

import random

import pytest
import torch

from cascade.models import likelihood
from cascade.models.likelihood import Question, choice_logprobs


def random_tokens(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(5, 261) for _ in range(length)]


def direct(loaded, question):
    """A forward pass of its own for every choice."""
    found = []
    for choice in question.choices:
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([[*question.context, *choice]])).logits[0].double().log_softmax(-1)
        start = len(question.context) - 1
        found.append(sum(log_p[start + i, token].item() for i, token in enumerate(choice)))
    return found


LENGTHS = [(3, 1, 40), (2, 2), (5, 9, 1, 1), (1,), (1, 1, 1, 1)]
SHARED = random_tokens(70, 7)
PLAIN = [
    Question(random_tokens(n, n), [random_tokens(m, 1000 + 10 * i + m) for m in LENGTHS[i]])
    for i, n in enumerate((1, 30, 8, 12, 50))
]
ALIKE = [
    Question(SHARED + random_tokens(n, 50 + n), [random_tokens(m, 2000 + 10 * n + m) for m in LENGTHS[n % 5]])
    for n in range(1, 8)
]
WHOLLY_ALIKE = [Question(SHARED, [random_tokens(3, 3000 + i)]) for i in range(4)]


@pytest.fixture
def passes(monkeypatch):
    """Rows of each pass, and the lengths of the beginnings that are computed apart."""
    rows, beginnings = [], []
    score, prefix = likelihood._score, likelihood.compute_prefix

    def spy_score(loaded, batch, shared):
        rows.append(len(batch))
        return score(loaded, batch, shared)

    def spy_prefix(loaded, tokens):
        beginnings.append(len(tokens))
        return prefix(loaded, tokens)

    monkeypatch.setattr(likelihood, "_score", spy_score)
    monkeypatch.setattr(likelihood, "compute_prefix", spy_prefix)
    return rows, beginnings


@pytest.mark.parametrize("tokens", [1, 100, None])
@pytest.mark.parametrize("questions", [PLAIN, ALIKE, [*PLAIN, *ALIKE, *WHOLLY_ALIKE]])
def test_likelihoods_equal_a_direct_computation(loaded, passes, questions, tokens):
    results = choice_logprobs(loaded, questions, tokens=tokens)
    for question, row in zip(questions, results, strict=True):
        assert row == pytest.approx(direct(loaded, question), abs=1e-3, rel=1e-5)
    rows, beginnings = passes
    assert sum(rows) == len(questions), "a question is one row, whatever its choices"
    assert beginnings == ([] if questions is PLAIN else [70] if questions is ALIKE else [69])
    assert (max(rows) > 1) == (tokens != 1)


def test_models_that_cannot_share_get_the_same_figures(loaded, monkeypatch):
    questions = [*PLAIN, *ALIKE]
    expected = choice_logprobs(loaded, questions)
    monkeypatch.setattr(likelihood, "can_share", lambda model: False)
    for tokens in (90, None):
        for row, other in zip(choice_logprobs(loaded, questions, tokens=tokens), expected, strict=True):
            assert row == pytest.approx(other, abs=1e-3)


def test_what_has_no_probability_is_refused(loaded):
    for question in (Question([], [[7]]), Question([5], [[6], []]), Question([5], [])):
        with pytest.raises(ValueError, match="at least one token"):
            choice_logprobs(loaded, [Question([5], [[6]]), question])


def test_no_questions_no_answers(loaded):
    assert choice_logprobs(loaded, []) == []


def test_where_memory_runs_out_passes_become_smaller(loaded, monkeypatch):
    score, refused = likelihood._score, []

    def bounded(loaded, batch, prefix):
        if len(batch) > 2:
            refused.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(loaded, batch, prefix)

    expected = choice_logprobs(loaded, [*PLAIN, *ALIKE])
    monkeypatch.setattr(likelihood, "_score", bounded)
    found = choice_logprobs(loaded, [*PLAIN, *ALIKE])
    assert refused
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_memory_that_does_not_do_for_one_question_is_an_error(loaded, monkeypatch):
    def full(loaded, batch, prefix):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(likelihood, "_score", full)
    with pytest.raises(torch.OutOfMemoryError):
        choice_logprobs(loaded, PLAIN)
