"""What looks at, and may change, the logits that an answer's tokens are chosen from: grammars and log-probabilities."""

from __future__ import annotations

import re

import llguidance
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cascade.errors import DataError
from serve.events import TokenLogprob

_NO_CHARACTER = "�"
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""What stands for a byte in the tokens of a byte-level vocabulary."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte's token in vocabularies that otherwise hold characters."""


class Steering:
    """Follows one answer: allows only what the grammar allows, and notes how likely each token was.

    Args:
        logprobs: how many of the likeliest tokens are noted beside the chosen one; None notes nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, matcher: llguidance.LLMatcher | None, logprobs: int | None
    ) -> None:
        self._tokenizer, self._matcher, self._logprobs = tokenizer, matcher, logprobs
        self._log: torch.Tensor | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._matcher is None and self._logprobs is None

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of shape (vocabulary,) to choose from, given the model's.

        Raises:
            DataError: the grammar has come to its limits.
        """
        if self._logprobs is not None:
            self._log = logits.log_softmax(-1)
        if self._matcher is None:
            return logits
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise DataError(f"the grammar is too complex: {self._matcher.get_error()[:200]}")
        return logits.masked_fill(allowed[: len(logits)].to(logits.device) == 0, float("-inf"))

    def took(self, token: int) -> TokenLogprob | None:
        """Take over the chosen token; returns how likely it and its rivals were, if that is noted."""
        if self._matcher is not None:
            self._matcher.consume_token(token)
        if self._logprobs is None or self._log is None:
            return None
        best = self._log.topk(self._logprobs) if self._logprobs else None
        rivals = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(self._text(token), float(self._log[token]), tuple((self._text(t), p) for t, p in rivals))

    def _text(self, token: int) -> str:
        text = str(self._tokenizer.decode([token]))
        if _NO_CHARACTER not in text:
            return text
        return _with_bytes(str(self._tokenizer.convert_ids_to_tokens(token))) or text


def _with_bytes(token: str) -> str | None:
    """The text of a token that is not all whole characters (see `TokenLogprob`), given its name in the vocabulary."""
    if single := _BYTE.fullmatch(token):
        return bytes([int(single[1], 16)]).decode("utf-8", "surrogateescape")
    if not all(letter in _BYTES for letter in token):
        return None
    return bytes(_BYTES[letter] for letter in token).decode("utf-8", "surrogateescape")
