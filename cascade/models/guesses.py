"""What comes next, guessed from where a sequence's last tokens stood before ("prompt lookup").

A step that computes four tokens takes little longer than one that computes one, where a kernel reads the weights once
for all: so a guess costs little, and each token of it that the model would have chosen too saves a step. What is
chosen does not change. Code, quotations and JSON repeat themselves; where nothing does, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 3
"""Tokens guessed at a time."""
_CONTEXT = 3
"""Tokens that must have stood there before."""
_WORTH = 0.4
"""Right tokens per guess, on average, that it must come to: twice what it costs."""
_NEWEST = 0.2
"""Weight of the newest guess in that average."""
_PAUSES = 32, 1024
"""Tokens without a guess when guesses are not worth it: the first time, and at most."""


class Guesses:
    """Guesses for one sequence."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # by the last tokens: where they were last followed by another
        self._read = _CONTEXT
        self._average = 1.0
        self._pause, self._until = _PAUSES[0], 0

    def next(self, tokens: Sequence[int]) -> list[int]:
        """What might follow a sequence that only ever grows, at most `MOST` tokens and often none."""
        for end in range(self._read, len(tokens)):
            self._after[tuple(tokens[end - _CONTEXT : end])] = end
        self._read = max(len(tokens), _CONTEXT)
        if len(tokens) < self._until:
            return []
        start = self._after.get(tuple(tokens[-_CONTEXT:]))
        return [] if start is None else list(tokens[start : start + MOST])

    def came(self, right: int, length: int) -> None:
        """Learn how many tokens of a guess were right; the sequence is so long now."""
        self._average += _NEWEST * (right - self._average)
        if right == MOST:
            self._pause = _PAUSES[0]
        if self._average < _WORTH:
            self._until, self._average = length + self._pause, 1.5 * _WORTH
            self._pause = min(2 * self._pause, _PAUSES[1])
