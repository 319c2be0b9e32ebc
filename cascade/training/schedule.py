"""The learning rate over a training: up in a straight line, then down along the curve that the config names."""

from __future__ import annotations

import math
from collections.abc import Callable

from cascade.config import Lora

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""By name, from the share of the steps behind warm-up that are done to what is left of the way to the floor."""


def learning_rate_at(step: int, total: int, settings: Lora) -> float:
    """The rate of a step, counted from 0: linear warm-up, then `schedule` from the peak towards `final_rate` of it."""
    warmup = max(1, round(total * settings.warmup_share))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    left = _SHAPES[settings.schedule](progress)
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * left)
