"""Tokens to text while they are being made."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"
"""What a decoder puts for the first bytes of a character whose last bytes are in the next token."""


class TextStream:
    """Decodes one answer token by token.

    Text is held back while it could still turn out to be part of a character or of a stop string, so that what was
    sent never has to be taken back. Decoding looks at the last few tokens alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._start = 0  # first token of the window that is decoded
        self._read = 0  # tokens whose text has been taken over
        self._held = ""
        self._stopped = False
        self.sent = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be sent now, often none."""
        self._tokens.append(token)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        if self._stopped or len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._held += now[len(before) :]
        self._start, self._read = self._read, len(self._tokens)
        return self._release()

    def finish(self, text: str) -> str:
        """What is left to send, given the whole answer."""
        rest = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += rest
        return rest

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))

    def _release(self) -> str:
        found = [p for s in self._stop if (p := self._held.find(s)) >= 0]
        if found:
            self._stopped = True
            ready = self._held[: min(found)]
        else:
            ready = self._held[: len(self._held) - self._possible_stop()]
        self._held = self._held[len(ready) :]
        self.sent += ready
        return ready

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0
