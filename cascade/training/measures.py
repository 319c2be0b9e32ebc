"""What is measured in training and on held-out rows; plain numbers, also for who computes none of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step measured.

    Attributes:
        loss: mean over the step's target tokens (nats), over all workers.
        tokens: packed tokens of the step, over all workers; targets: learned ones among them.
        memory_bytes: that the first worker took, see `cascade.training.memory`; 0 where nobody looked.
        sample_ids: the examples that were learned from, over all workers: the ledger of what was seen.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    targets: int
    seconds: float
    sample_ids: tuple[str, ...] = ()
    workers: int = 1
    memory_bytes: int = 0

    @property
    def skipped(self) -> bool:
        """Whether nothing was learned, since loss or gradient was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))


def mean(losses: NDArray[np.float32]) -> float:
    """Over targets; NaN for none."""
    return float(losses.mean(dtype=np.float64)) if len(losses) else math.nan
