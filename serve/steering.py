"""What looks at, and may change, the logits that an answer's tokens are chosen from: grammars and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llguidance
import llguidance.hf
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cascade.errors import DataError
from serve.events import TokenLogprob


class Grammars:
    """Makes matchers of JSON schemas for one tokenizer (llguidance). Safe for threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Iterable[int]) -> None:
        """
        Args:
            vocabulary: width of the model's logits.
            ends: token ids that end an answer.
        """
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._made: llguidance.LLTokenizer | None = None  # takes a second, and most requests need none

    def matcher(self, schema: str) -> llguidance.LLMatcher:
        """A matcher at its start.

        Raises:
            DataError: the schema is none, uses what is not supported, or exceeds the library's limits.
        """
        if self._made is None:
            if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                raise DataError("the base's tokenizer is of a kind that JSON schemas cannot be kept to with")
            self._made = llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, self._ends)
        try:
            # Without white space, which a small model may go on with for ever.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise DataError(f"the JSON schema cannot be used: {error}") from None
        matcher = llguidance.LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise DataError(f"the JSON schema cannot be used: {matcher.get_error()[:500]}")
        return matcher


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
            raise DataError(f"the JSON schema is too complex: {self._matcher.get_error()[:200]}")
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
        text: Any = self._tokenizer.decode([token])
        return str(text)
