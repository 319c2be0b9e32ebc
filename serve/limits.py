"""What one engine takes on, as settings: known without what computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one engine.

    Attributes:
        rows: sequences computed together.
        tokens: most tokens (prompt and answer, padding included) that all sequences may hold in memory; room that is
            taken for them to grow into is not counted.
        waiting: jobs that may wait beyond those that join at the next step; more are refused with 429.
        patience_s: how long a group keeps the slot while another waits.
        answer_tokens: answer length where the request names none.
        step_s: a thread that has not finished one step in so long counts as hung.
        kept_bytes: of what prompts and answers left, kept for those that begin alike.
        max_loaded_modifiers: versions of modifiers that are kept in memory, those that were used last.
    """

    rows: int = 32
    tokens: int = 32_768
    waiting: int = 64
    patience_s: float = 0.5
    answer_tokens: int = 512
    step_s: float = 120.0
    kept_bytes: int = 2**27
    max_loaded_modifiers: int = 1
