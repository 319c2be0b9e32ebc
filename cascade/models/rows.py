"""Sequences that are being continued: what was asked, what has been made of it, and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from cascade.models.base import LoadedBase
from cascade.models.caches import Prefix
from cascade.models.guesses import Guesses
from cascade.tasks import FinishReason

OnToken = Callable[[int, int], bool]
"""Called with (index of the prompt, token id) as each token is made; returning False ends that answer."""
Adjust = Callable[[torch.Tensor], torch.Tensor]
"""Given the logits after a row's last token, shape (vocabulary,): those that the next one is chosen from."""

_CONTEXT = 16
"""Tokens before the last ones that are decoded with them, so that what they say does not depend on where one cuts."""


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
    """What was added to one prompt: token ids without the end token, their text with the stop string cut off.

    Attributes:
        seconds: its share of the wall time of the steps it took part in.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seconds: float = field(default=0.0, compare=False)


@dataclass
class Row:
    """A sequence that is being continued. `finish` is None until it is done; then `text` is the whole answer."""

    index: int
    request: Request
    generator: torch.Generator | None
    prefix: Prefix | None = None
    adjust: Adjust | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    seconds: float = 0.0
    guesses: Guesses = field(default_factory=Guesses)

    @classmethod
    def new(cls, index: int, request: Request, device: torch.device, adjust: Adjust | None = None) -> Row:
        """A row at its start; `index` is what `OnToken` is told."""
        sampled = request.temperature > 0
        generator = torch.Generator(device=device).manual_seed(request.seed) if sampled else None
        return cls(index, request, generator, adjust=adjust)

    @property
    def own(self) -> list[int]:
        """Tokens so far without what the prefix holds."""
        return [*self.request.prompt, *self.tokens][len(self.prefix or ()) :]

    @property
    def length(self) -> int:
        """Tokens so far, prefix included."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def need(self) -> int:
        """Tokens of its own that it may come to."""
        return len(self.request.prompt) - len(self.prefix or ()) + self.request.max_tokens


def choose(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """The next token of every row: the likeliest, or sampled with the row's own generator."""
    chosen = logits.argmax(-1)
    for i, row in enumerate(rows):
        if row.adjust is not None:
            logits[i] = row.adjust(logits[i])
            chosen[i] = logits[i].argmax(-1)
        if row.generator is None:
            continue
        probabilities = (logits[i] / row.request.temperature).softmax(-1)
        if row.request.top_p < 1:
            sorted_p, sorted_i = probabilities.sort(descending=True)
            outside = sorted_p.cumsum(-1) - sorted_p >= row.request.top_p
            probabilities[sorted_i[outside]] = 0
        chosen[i] = torch.multinomial(probabilities, 1, generator=row.generator)[0]
    return chosen


def append(row: Row, token: int, ends: frozenset[int], loaded: LoadedBase, on_token: OnToken | None) -> None:
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
    longest = max(len(s.encode()) for s in row.request.stop)
    tail = decode(loaded, row.tokens[-longest - _CONTEXT :])  # every token is a byte at least
    if not any(s in tail for s in row.request.stop):
        return False
    text = decode(loaded, row.tokens)
    found = [position for s in row.request.stop if (position := text.find(s)) >= 0]
    if found:
        row.text = text[: min(found)]
    return bool(found)
