"""Looks at held-out tasks during a training: when, what they found, which was best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cascade.config import Training


@dataclass(frozen=True)
class Look:
    """What one look at the validation tasks found.

    Attributes:
        step: optimiser steps done by then.
        loss: mean −log p of the reference answers' tokens (nats); NaN if none were measured.
        answered, passed: validation tasks that the student answered, and answered rightly.
        best: whether it was the best so far.
    """

    step: int
    loss: float
    answered: int = 0
    passed: int = 0
    best: bool = False


def look_steps(total: int, training: Training) -> frozenset[int]:
    """After how many steps to look; the last one is among them. Empty if nothing is looked at."""
    settings = training.validation
    if not (settings.tasks or settings.answered) or not total:
        return frozenset()
    between = total * settings.every_epochs / training.lora.epochs
    count = math.floor(total / between + 1e-9)
    return frozenset({max(1, round(k * between)) for k in range(1, count + 1)} | {total})


def is_better(look: Look, than: Look | None, training: Training) -> bool:
    """Whether a look found more than the best so far: by accuracy where that decides, else by loss.

    A loss that is no number is worse than any.
    """
    if than is None:
        return True
    settings = training.validation
    by_accuracy = settings.keep == "best_accuracy" or (settings.keep == "last" and settings.answered > 0)
    if by_accuracy and look.passed != than.passed:
        return look.passed > than.passed
    return look.loss < than.loss or (math.isnan(than.loss) and not math.isnan(look.loss))


def needs_loss(training: Training) -> bool:
    """Whether what is kept, or when training ends, is decided by the loss on validation tasks."""
    settings = training.validation
    return settings.keep == "best_loss" or (settings.patience is not None and not settings.answered)


def best_of(looks: Sequence[Look]) -> Look | None:
    """The last look that was the best when it was made."""
    return next((look for look in reversed(looks) if look.best), None)


def is_enough(looks: Sequence[Look], training: Training) -> bool:
    """Whether so many looks in a row found nothing better that training ends."""
    patience = training.validation.patience
    since = next((n for n, look in enumerate(reversed(looks)) if look.best), len(looks))
    return patience is not None and since >= patience
