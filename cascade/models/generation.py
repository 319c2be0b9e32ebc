"""Batched decoding: left-padded, sorted by length, finished rows leave the batch.

transformers' `generate` computes every row of a batch until the last one has ended; here a row that is done is
dropped from the KV cache, and stop strings are checked row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from cascade.models.base import LoadedBase, end_token_ids
from cascade.tasks import FinishReason

OnToken = Callable[[int, int], bool]
"""Called with (index of the prompt, token id) as each token is made; returning False ends that answer."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids.
        max_tokens: the most tokens to add.
        stop: strings that end the answer; they are cut off.
        temperature: 0 takes the likeliest token.
        top_p: smallest set of tokens with at least this probability is sampled from.
        seed: of this request's own generator; the same request gives the same answer in any batch.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """What was added to one prompt: token ids without the end token, their text with the stop string cut off."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass
class _Row:
    """A sequence in the running batch."""

    index: int
    request: Request
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None


def generate(
    loaded: LoadedBase, requests: Sequence[Request], *, batch_size: int = 32, on_token: OnToken | None = None
) -> list[Generated]:
    """Continue every prompt; results in the order of the requests.

    Requests of like length share a batch, so that little is spent on padding.

    Raises:
        ValueError: a prompt is empty.
    """
    if any(len(r.prompt) == 0 for r in requests):
        raise ValueError("a prompt must have at least one token")
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt), i))
    results: list[Generated | None] = [None] * len(requests)
    for start in range(0, len(order), batch_size):
        rows = [_new_row(i, requests[i], loaded) for i in order[start : start + batch_size]]
        _decode(loaded, [r for r in rows if r.request.max_tokens > 0], on_token)
        for row in rows:
            results[row.index] = Generated(tuple(row.tokens), row.text, row.finish or "length")
    return [r for r in results if r is not None]


def _new_row(index: int, request: Request, loaded: LoadedBase) -> _Row:
    generator = None
    if request.temperature > 0:
        generator = torch.Generator(device=loaded.device).manual_seed(request.seed)
    return _Row(index, request, generator)


@torch.inference_mode()
def _decode(loaded: LoadedBase, rows: list[_Row], on_token: OnToken | None) -> None:
    """Run one batch to its end, filling `tokens`, `text` and `finish` of its rows."""
    if not rows:
        return
    ends, pad = end_token_ids(loaded), loaded.tokenizer.pad_token_id
    longest = max(len(r.request.prompt) for r in rows)
    ids = torch.tensor([[pad] * (longest - len(r.request.prompt)) + list(r.request.prompt) for r in rows])
    mask = torch.tensor([[0] * (longest - len(r.request.prompt)) + [1] * len(r.request.prompt) for r in rows])
    ids, mask = ids.to(loaded.device), mask.to(loaded.device)
    cache = DynamicCache(config=loaded.model.config)
    while rows:
        logits = _forward(loaded.model, ids, mask, cache)
        chosen = _choose(logits, rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            _append(row, token, ends, loaded, on_token)
        alive = [i for i, row in enumerate(rows) if row.finish is None]
        if len(alive) < len(rows):
            rows = [rows[i] for i in alive]
            kept = torch.tensor(alive, device=loaded.device, dtype=torch.long)
            chosen, mask = chosen[kept], mask[kept]
            if rows:
                cache.batch_select_indices(kept)
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def _forward(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits after the last position, float32, shape (rows, vocabulary). Extends the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _choose(logits: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
    """The next token of every row: the likeliest, or sampled with the row's own generator."""
    chosen = logits.argmax(-1)
    for i, row in enumerate(rows):
        if row.generator is None:
            continue
        probabilities = (logits[i] / row.request.temperature).softmax(-1)
        if row.request.top_p < 1:
            sorted_p, sorted_i = probabilities.sort(descending=True)
            outside = sorted_p.cumsum(-1) - sorted_p >= row.request.top_p
            probabilities[sorted_i[outside]] = 0
        chosen[i] = torch.multinomial(probabilities, 1, generator=row.generator)[0]
    return chosen


def _append(row: _Row, token: int, ends: frozenset[int], loaded: LoadedBase, on_token: OnToken | None) -> None:
    """Add a token to a row and decide whether the row is done."""
    if token in ends:
        row.finish = "stop"
    else:
        row.tokens.append(token)
        if on_token is not None and not on_token(row.index, token):
            row.finish = "stop"
        elif row.request.stop and _cut_at_stop(row, loaded):
            row.finish = "stop"
            return
        elif len(row.tokens) >= row.request.max_tokens:
            row.finish = "length"
    if row.finish is not None:
        row.text = decode(loaded, row.tokens)


def decode(loaded: LoadedBase, token_ids: Sequence[int]) -> str:
    """Text of one sequence, special tokens left out."""
    text = loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _cut_at_stop(row: _Row, loaded: LoadedBase) -> bool:
    """Whether a stop string has appeared; if so the text before it is the answer."""
    text = decode(loaded, row.tokens)
    found = [position for s in row.request.stop if (position := text.find(s)) >= 0]
    if found:
        row.text = text[: min(found)]
    return bool(found)


@torch.inference_mode()
def choice_logprobs(
    loaded: LoadedBase,
    contexts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
) -> list[list[float]]:
    """Log-likelihood of each choice after its context.

    Args:
        contexts: token ids, one context per task.
        choices: token ids of each task's choices.

    Returns:
        Per task, per choice: sum over the choice's tokens of log p(token | everything before), in nats.
    """
    flat = [(t, c) for t, options in enumerate(choices) for c in range(len(options))]
    flat.sort(key=lambda tc: -(len(contexts[tc[0]]) + len(choices[tc[0]][tc[1]])))
    results = [[0.0] * len(options) for options in choices]
    pad = loaded.tokenizer.pad_token_id
    for start in range(0, len(flat), batch_size):
        batch = flat[start : start + batch_size]
        sequences = [[*contexts[t], *choices[t][c]] for t, c in batch]
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences], device=loaded.device)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=loaded.device)
        tail = longest - min(len(contexts[t]) for t, _ in batch) + 1
        logits = loaded.model(input_ids=ids, attention_mask=mask, logits_to_keep=tail).logits
        for row, (t, c) in enumerate(batch):
            first, count = len(contexts[t]) - 1 - (longest - tail), len(choices[t][c])
            rows = logits[row, first : first + count].float().log_softmax(-1)
            target = torch.tensor(choices[t][c], device=loaded.device)
            results[t][c] = rows.gather(1, target[:, None]).sum().item()
    return results
