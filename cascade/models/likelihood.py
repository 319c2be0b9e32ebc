"""How likely a model takes each choice to be: what tasks share, and what a task's choices share, is computed once.

A task is one row: its context, then all its choices side by side, each of which sees the context and itself alone (a
tree of tokens in one sequence). Contexts that begin alike, as with worked examples, share that beginning's keys and
values. lm-evaluation-harness computes a row for every pair of context and choice; the figures are the same.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cascade.models.attention import can_share
from cascade.models.base import LoadedBase
from cascade.models.beginnings import shared_beginnings
from cascade.models.caches import Prefix, Shared
from cascade.models.prompts import compute_prefix, last
from cascade.models.room import tokens_in_a_pass

_log = logging.getLogger(__name__)

_SCORED = 1024
"""Positions whose distributions over the vocabulary are computed in float32 at once."""


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of the choices that may follow it."""

    context: Sequence[int]
    choices: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens that the model reads for the longest choice, whose last one is only predicted."""
        return len(self.context) + max(map(len, self.choices)) - 1


def choice_logprobs(
    loaded: LoadedBase, questions: Sequence[Question], *, tokens: int | None = None
) -> list[list[float]]:
    """Log-likelihood of each choice after its context, per question in order. See `stream_logprobs`."""
    results = {i: scores for i, scores, _ in stream_logprobs(loaded, questions, tokens=tokens)}
    return [results[i] for i in range(len(questions))]


def stream_logprobs(
    loaded: LoadedBase, questions: Sequence[Question], *, tokens: int | None = None
) -> Iterator[tuple[int, list[float], float]]:
    """Log-likelihoods of the choices of every question, as they are computed.

    Args:
        tokens: how many to compute in one forward pass, padding included; one row always is. None: as suits the
            device.

    Yields:
        (index of the question, per choice the sum over its tokens of log p(token | everything before) in nats, the
        question's share of the wall time in seconds).

    Raises:
        ValueError: a context or a choice is empty: the one leaves its choices' first token without a prediction,
            the other would be certain, and chosen whatever the model thinks.
    """
    if not all(q.context and q.choices and all(q.choices) for q in questions):
        raise ValueError("contexts and choices must have at least one token")
    if not questions:
        return
    budget = tokens or tokens_in_a_pass(loaded.device)
    if not can_share(loaded.model):
        yield from _one_by_one(loaded, questions, budget)
        return
    for group in shared_beginnings([q.context for q in questions]):
        shared = questions[group.members[0]].context[: group.length]
        prefix = compute_prefix(loaded, shared) if group.length else None
        rows = [_Row.of(i, questions[i], group.length) for i in group.members]
        for batch in _batches(rows, budget):
            began = time.perf_counter()
            scores = _score_in_parts(loaded, batch, prefix)
            share = (time.perf_counter() - began) / len(batch)
            yield from ((row.index, found, share) for row, found in zip(batch, scores, strict=True))


@dataclass(frozen=True)
class _Row:
    """One question as a sequence: the rest of its context, then each choice without its last token.

    Attributes:
        positions: of each token, counted from the question's beginning.
        starts: where each choice begins in `ids`, and at the end their length.
        context: how many tokens of the context are in `ids`.
    """

    index: int
    ids: list[int]
    positions: list[int]
    context: int
    starts: list[int]
    choices: Sequence[Sequence[int]]

    @classmethod
    def of(cls, index: int, question: Question, shared: int) -> _Row:
        ids = list(question.context[shared:])
        context, whole = len(ids), len(question.context)
        positions = list(range(shared, whole))
        starts = [context]
        for choice in question.choices:
            ids += choice[:-1]
            positions += range(whole, whole + len(choice) - 1)
            starts.append(len(ids))
        return cls(index, ids, positions, context, starts, question.choices)

    @property
    def tail(self) -> int:
        """Tokens from the one that predicts the first token of every choice."""
        return len(self.ids) - self.context + 1

    def predictors(self) -> list[int]:
        """Where, in the tail, each token of each choice is predicted; the choices one after the other."""
        found = []
        for start, end in itertools.pairwise(self.starts):
            found += [0, *range(start - self.context + 1, end - self.context + 1)]
        return found

    def visible(self) -> torch.Tensor:
        """Which token sees which, shape (tokens, tokens)."""
        length = len(self.ids)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        for start, end in itertools.pairwise(self.starts):
            seen[end:, start:end] = False
        return seen


def _batches(rows: Sequence[_Row], budget: int) -> Iterator[list[_Row]]:
    """Rows of similar length, as many as the budget takes."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda r: (-len(r.ids), -r.tail, r.index)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_in_parts(loaded: LoadedBase, rows: list[_Row], prefix: Prefix | None) -> list[list[float]]:
    """As `_score`; in two halves where the memory does not do for all at once."""
    try:
        return _score(loaded, rows, prefix)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    _log.warning("out of memory with %d questions at once; now half of them", len(rows))
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(rows) // 2
    return _score_in_parts(loaded, rows[:half], prefix) + _score_in_parts(loaded, rows[half:], prefix)


@torch.inference_mode()
def _score(loaded: LoadedBase, rows: list[_Row], prefix: Prefix | None) -> list[list[float]]:
    """Log-likelihoods of each row's choices."""
    device, pad = loaded.device, loaded.tokenizer.pad_token_id
    longest, tail = max(len(r.ids) for r in rows), max(r.tail for r in rows)
    ids = torch.full((len(rows), longest), pad)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), 1, longest, longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        pads = longest - len(row.ids)
        ids[i, pads:], positions[i, pads:] = torch.tensor(row.ids), torch.tensor(row.positions)
        mask[i, 0, pads:, pads:] = row.visible()
    mask |= torch.eye(longest, dtype=torch.bool)  # a pad sees itself, so that its attention is defined
    shared = Shared.of([prefix] * len(rows), device)
    logits = loaded.model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=last(tail, longest, device),
        **({} if shared is None else {"shared": shared}),
    ).logits
    where = [i * tail + tail - row.tail + p for i, row in enumerate(rows) for p in row.predictors()]
    targets = [token for row in rows for choice in row.choices for token in choice]
    scored = _logprobs(logits.flatten(0, 1), where, targets)
    return [[sum(next(scored) for _ in choice) for choice in row.choices] for row in rows]


def _logprobs(logits: torch.Tensor, where: list[int], targets: list[int]) -> Iterator[float]:
    """Log-probability of each target by the distribution in a row of `logits` (positions, vocabulary), in float32."""
    for start in range(0, len(where), _SCORED):
        chunk = logits[torch.tensor(where[start : start + _SCORED], device=logits.device)].float()
        wanted = torch.tensor(targets[start : start + _SCORED], device=logits.device)
        yield from (chunk.gather(1, wanted[:, None])[:, 0] - chunk.logsumexp(-1)).tolist()


@torch.inference_mode()
def _one_by_one(
    loaded: LoadedBase, questions: Sequence[Question], budget: int
) -> Iterator[tuple[int, list[float], float]]:
    """The same for models whose attention cannot take part in this: a plain row for every choice."""
    pairs = [Question(q.context, [choice]) for q in questions for choice in q.choices]
    rows = [_Row.of(i, pair, 0) for i, pair in enumerate(pairs)]
    began, pad, found = time.perf_counter(), loaded.tokenizer.pad_token_id, [0.0] * len(pairs)
    for batch in _batches(rows, budget):
        longest = len(batch[0].ids)
        ids = torch.tensor([row.ids + [pad] * (longest - len(row.ids)) for row in batch], device=loaded.device)
        mask = torch.tensor([[1] * len(r.ids) + [0] * (longest - len(r.ids)) for r in batch], device=loaded.device)
        logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, own in zip(batch, logits, strict=True):
            where = [row.context - 1 + p for p in row.predictors()]
            found[row.index] = sum(_logprobs(own, where, list(row.choices[0])))
    scores, share = iter(found), (time.perf_counter() - began) / len(questions)
    yield from ((i, [next(scores) for _ in q.choices], share) for i, q in enumerate(questions))
