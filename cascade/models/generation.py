"""Batched decoding: left-padded, sorted by length, finished rows leave the batch.

transformers' `generate` computes every row of a batch until the last one has ended; here a row that is done is
dropped from the KV cache, stop strings are checked row by row, and a server can let rows join while others run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from cascade.models.base import LoadedBase, end_token_ids
from cascade.tasks import FinishReason

OnToken = Callable[[int, int], bool]
"""Called with (index of the prompt, token id) as each token is made; returning False ends that answer."""

_SHARED_FROM = 48
"""Tokens that prompts must begin with alike for the shared part to be worth a forward pass of its own."""
_SHARED_BY = 4
"""Prompts that must begin alike to get batches of their own."""


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
class Row:
    """A sequence that is being continued. `finish` is None until it is done; then `text` is the whole answer."""

    index: int
    request: Request
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None

    @classmethod
    def new(cls, index: int, request: Request, device: torch.device) -> Row:
        """A row at its start; `index` is what `OnToken` is told."""
        sampled = request.temperature > 0
        return cls(index, request, torch.Generator(device=device).manual_seed(request.seed) if sampled else None)


class Batch:
    """Rows that are computed together; rows join, and leave when they are done, between any two steps."""

    def __init__(self, loaded: LoadedBase) -> None:
        self.rows: list[Row] = []
        self._loaded = loaded
        self._ends = end_token_ids(loaded)
        self._cache = DynamicCache(config=loaded.model.config)
        self._mask = torch.empty(0)  # (rows, cached tokens), 0 where padded
        self._logits = torch.empty(0)  # (rows, vocabulary) of the token to choose next

    @property
    def open(self) -> bool:
        """Whether rows can join now: always, unless running rows are in a cache that cannot be padded."""
        return not self.rows or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    @property
    def padded_tokens(self) -> int:
        """Cached tokens of all rows, padding included."""
        return self._mask.numel() if self.rows else 0

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Compute the prompts of new rows and put them beside those that run.

        Raises:
            ValueError: the batch is not `open`.
        """
        if not self.open:
            raise ValueError("rows run in a cache that others cannot join; wait until they are done")
        if not rows:
            return
        cache = DynamicCache(config=self._loaded.model.config)
        mask, logits = _prefill(self._loaded, [list(r.request.prompt) for r in rows], cache)
        if self.rows:
            self._merge(cache, mask, logits)
        else:
            self._cache, self._mask, self._logits = cache, mask, logits
        self.rows = [*self.rows, *rows]

    @torch.inference_mode()
    def step(self, on_token: OnToken | None = None) -> list[Row]:
        """Add a token to every row; returns the rows that this finished, which have left the batch."""
        chosen = _choose(self._logits, self.rows)
        for row, token in zip(self.rows, chosen.tolist(), strict=True):
            _append(row, token, self._ends, self._loaded, on_token)
        done = [row for row in self.rows if row.finish is not None]
        if done:
            alive = [i for i, row in enumerate(self.rows) if row.finish is None]
            chosen = chosen[alive]
            self._keep(alive)
        if self.rows:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
            self._logits = _forward(self._loaded.model, chosen[:, None], self._mask, self._cache)
        return done

    @torch.inference_mode()
    def leave(self, indices: Container[int]) -> None:
        """Take rows out, by their `index`, whether they are done or not."""
        alive = [i for i, row in enumerate(self.rows) if row.index not in indices]
        if len(alive) < len(self.rows):
            self._logits = self._logits[alive]
            self._keep(alive)

    def _keep(self, alive: list[int]) -> None:
        """Drop the other rows, and the columns that only they had use for."""
        self.rows = [self.rows[i] for i in alive]
        if not alive:
            self._cache = DynamicCache(config=self._loaded.model.config)
            return
        kept = torch.tensor(alive, device=self._mask.device, dtype=torch.long)
        self._mask = self._mask[kept]
        self._cache.batch_select_indices(kept)
        unused = int(self._mask.any(dim=0).int().argmax())
        if unused and self.open:
            self._mask = self._mask[:, unused:]
            for layer in self._cache.layers:
                _set_states(layer, *(x[:, :, unused:] for x in _states(layer)))

    def _merge(self, cache: DynamicCache, mask: torch.Tensor, logits: torch.Tensor) -> None:
        """Put the rows of another cache below ours, both padded on the left to the longer."""
        length = max(self._mask.shape[1], mask.shape[1])
        for ours, new in zip(self._cache.layers, cache.layers, strict=True):
            pairs = zip(_states(ours), _states(new), strict=True)
            _set_states(ours, *(torch.cat([_pad_left(x, length) for x in pair]) for pair in pairs))
        columns = [torch.nn.functional.pad(m, (length - m.shape[1], 0)) for m in (self._mask, mask)]
        self._mask = torch.cat(columns)
        self._logits = torch.cat([self._logits, logits])


def _states(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache layer, each of shape (rows, heads, tokens, width)."""
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _set_states(layer: object, keys: torch.Tensor, values: torch.Tensor) -> None:
    assert isinstance(layer, DynamicLayer)
    layer.keys, layer.values = keys, values


def _pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values of shape (rows, heads, tokens, width) with zeros before the first token."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))


def generate(
    loaded: LoadedBase, requests: Sequence[Request], *, batch_size: int = 32, on_token: OnToken | None = None
) -> list[Generated]:
    """Continue every prompt; results in the order of the requests.

    Requests that begin alike (the same worked examples) share a batch and the computation of what they share;
    the others are batched by length, so that little is spent on padding.

    Raises:
        ValueError: a prompt is empty.
    """
    if any(len(r.prompt) == 0 for r in requests):
        raise ValueError("a prompt must have at least one token")
    results: list[Generated | None] = [None] * len(requests)
    for indices in _batches(requests, batch_size):
        rows = [Row.new(i, requests[i], loaded.device) for i in indices]
        batch = Batch(loaded)
        batch.join([r for r in rows if r.request.max_tokens > 0])
        while batch.rows:
            batch.step(on_token)
        for row in rows:
            results[row.index] = Generated(tuple(row.tokens), row.text, row.finish or "length")
    return [r for r in results if r is not None]


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Indices of the requests of each batch."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        alike[tuple(request.prompt[:_SHARED_FROM])].append(i)
    groups = [group for group in alike.values() if len(group) >= _SHARED_BY]
    groups.append([i for group in alike.values() if len(group) < _SHARED_BY for i in group])
    for group in groups:
        group.sort(key=lambda i: (-len(requests[i].prompt), i))
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _prefill(
    loaded: LoadedBase, prompts: Sequence[list[int]], cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute prompts into an empty cache; what they all begin with is computed once.

    Returns:
        Mask of shape (rows, cached tokens), 0 where padded; logits after each prompt, shape (rows, vocabulary).
    """
    shared = _shared_length(prompts) if len(prompts) > 1 else 0
    if shared < _SHARED_FROM or not all(type(layer) is DynamicLayer for layer in cache.layers):
        shared = 0
    device, pad = loaded.device, loaded.tokenizer.pad_token_id
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=device)
        _forward(loaded.model, prefix, torch.ones_like(prefix), cache)
        cache.batch_repeat_interleave(len(prompts))
    rests = [prompt[shared:] for prompt in prompts]
    longest = max(map(len, rests))
    ids = torch.tensor([[pad] * (longest - len(rest)) + rest for rest in rests], device=device)
    mask = torch.tensor([[1] * shared + [0] * (longest - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    return mask, _forward(loaded.model, ids, mask, cache)


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


def _choose(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
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


def _append(row: Row, token: int, ends: frozenset[int], loaded: LoadedBase, on_token: OnToken | None) -> None:
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


def _cut_at_stop(row: Row, loaded: LoadedBase) -> bool:
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

    Raises:
        ValueError: a context or a choice is empty: the one leaves its choices' first token without a prediction,
            the other would be certain, and chosen whatever the model thinks.
    """
    if not all(len(ids) for ids in [*contexts, *(choice for options in choices for choice in options)]):
        raise ValueError("contexts and choices must have at least one token")
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
