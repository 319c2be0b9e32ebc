"""From a piece of work to the tokens that a model continues, within its context."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cascade.models.chat import prompt_text
from serve.events import Failed, Work
from serve.live import Live

_MOST_CHARACTERS = 64
"""Of a token, on average over a whole prompt."""


@dataclass(frozen=True)
class Encoded:
    """A prompt, and how many tokens its answer may have."""

    tokens: list[int]
    answer_tokens: int


class Encoder:
    """Makes prompts for one model. Safe for threads.

    Attributes:
        tokenizer: a copy of its own, since one is not safe to share with a thread that decodes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, context: int, answer_tokens: int
    ) -> None:
        """
        Args:
            vocabulary: token ids from here on are refused.
            context: most tokens of a prompt and its answer.
            answer_tokens: of an answer whose length the request does not name.
        """
        self.tokenizer = copy.deepcopy(tokenizer)
        self._vocabulary, self._context, self._answer_tokens = vocabulary, context, answer_tokens
        self._encoding = threading.Lock()

    def encode(self, work: Work, live: Live | None) -> Encoded | Failed:
        """The prompt of a piece of work, introduced as the version that answers has learned it."""
        tokens = self._tokens(work, live)
        if isinstance(tokens, Failed):
            return tokens
        if not tokens:
            return Failed(400, "the prompt is empty", "invalid_value", "prompt")
        room = self._context - len(tokens)
        wanted = work.max_tokens or min(self._answer_tokens, max(room, 1))
        if wanted > room:
            param = _param(work)
            message = (
                f"This model's maximum context length is {self._context} tokens: {len(tokens)} of the {param} and "
                f"{wanted} for the answer are too many."
            )
            return Failed(400, message, "context_length_exceeded", param)
        return Encoded(tokens, wanted)

    def _tokens(self, work: Work, live: Live | None) -> list[int] | Failed:
        if isinstance(work.prompt, tuple):
            if max(work.prompt, default=0) >= self._vocabulary:
                return Failed(400, f"token ids of this model end at {self._vocabulary - 1}", "invalid_value", "prompt")
            return list(work.prompt)
        param = _param(work)
        messages = work.messages if live is None else live.introduce(work.messages)
        characters = sum(len(m.content) for m in messages) if work.prompt is None else len(work.prompt)
        if characters > self._context * _MOST_CHARACTERS:  # which would take seconds to find out by its tokens
            message = (
                f"This model's maximum context length is {self._context} tokens, which {characters} characters exceed."
            )
            return Failed(400, message, "context_length_exceeded", param)
        try:
            with self._encoding:
                text = prompt_text(self.tokenizer, messages) if work.prompt is None else work.prompt
                # A chat template writes the special tokens itself.
                return list(self.tokenizer(text, add_special_tokens=work.prompt is not None).input_ids)
        except Exception as error:  # a template may refuse anything, in any way
            said = error.__cause__ or error
            return Failed(400, f"the model's chat template refuses these messages: {said}", "invalid_value", param)


def _param(work: Work) -> str:
    """The parameter that holds what is to be continued."""
    return "messages" if work.prompt is None else "prompt"
