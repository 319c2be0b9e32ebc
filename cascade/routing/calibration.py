"""From logits to probabilities that mean what they say: temperature, Platt and isotonic calibration.

Sources: Guo et al. 2017 (arXiv 1706.04599) for temperature scaling and the expected calibration error; Platt 1999
for the sigmoid with smoothed targets; Zadrozny and Elkan 2002 for isotonic regression. Which one is used is decided
on data that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, xlogy
from sklearn.isotonic import IsotonicRegression

from cascade.scoring.statistics import wilson

Method = Literal["identity", "temperature", "platt", "isotonic"]
Floats = NDArray[np.float64]

_FOLDS = 5
_LOG_TEMPERATURE = (-3.0, 3.0)
_NEVER_CERTAIN = 1e-3
"""A few hundred tasks cannot show that an answer is certain; probabilities stay this far from 0 and 1."""


@dataclass(frozen=True)
class Calibrator:
    """A fitted, monotone map from logits to probabilities.

    Attributes:
        parameters: identity: none; temperature: (T,); platt: (slope, offset); isotonic: knots in logit, then as many
            probabilities.
    """

    method: Method = "identity"
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: there is no such method, or it has not so many parameters.
        """
        count = len(self.parameters)
        fitting = {"identity": count == 0, "temperature": count == 1, "platt": count == 2}
        fitting["isotonic"] = count > 0 and count % 2 == 0
        if not fitting.get(self.method, False):
            raise ValueError(f"there is no calibration by {self.method!r} with {count} parameters")

    def __call__(self, logits: ArrayLike) -> Floats:
        """Probabilities of the same shape."""
        z = np.asarray(logits, dtype=np.float64)
        if self.method == "temperature":
            p = expit(z / self.parameters[0])
        elif self.method == "platt":
            p = expit(self.parameters[0] * z + self.parameters[1])
        elif self.method == "isotonic":
            knots = len(self.parameters) // 2
            p = np.interp(z, self.parameters[:knots], self.parameters[knots:])
        else:
            p = expit(z)
        return np.clip(p, _NEVER_CERTAIN, 1 - _NEVER_CERTAIN)


def fit(
    method: Method, logits: ArrayLike, outcomes: Sequence[bool] | NDArray[np.bool_], *, even: bool = False
) -> Calibrator:
    """Fit one method to logits and what became of them. Without data, the identity.

    Args:
        even: right and wrong count alike, however many there are of each.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    if method == "identity" or len(z) == 0:
        return Calibrator()
    smooth, weights = _smoothed(y), _weights(y, even)
    if method == "temperature":
        best = minimize_scalar(lambda t: _log_loss(expit(z / np.exp(t)), smooth, weights), bounds=_LOG_TEMPERATURE)
        return Calibrator("temperature", (float(np.exp(best.x)),))
    if method == "platt":
        best = minimize(
            lambda w: _log_loss(expit(w[0] * z + w[1]), smooth, weights), x0=[1.0, 0.0], bounds=[(0, 20), (-20, 20)]
        )
        return Calibrator("platt", (float(best.x[0]), float(best.x[1])))
    regression = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(z, smooth, weights)
    x, p = regression.X_thresholds_, regression.y_thresholds_
    return Calibrator("isotonic", (*map(float, x), *map(float, p)))


@dataclass(frozen=True)
class Calibration:
    """The chosen calibrator and what is known of it.

    Attributes:
        calibrator: fitted on all data given.
        held_out: probability of each row from a calibrator of the same method that was fitted without it; figures
            are computed from these.
        loss: held-out log loss (nats) per method.
    """

    calibrator: Calibrator
    held_out: Floats
    loss: dict[str, float]


def calibrate(
    logits: ArrayLike, outcomes: Sequence[bool] | NDArray[np.bool_], seed: int, *, even: bool = False
) -> Calibration:
    """Choose the method with the smallest cross-validated log loss and fit it to everything.

    Args:
        logits: of tasks that the network was not trained on, shape (tasks,).
        outcomes: whether the answer was right.
        seed: of the folds.
        even: see `fit`; the log loss is weighed likewise.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    if len(z) < 2:
        return Calibration(Calibrator(), Calibrator()(z), {})
    fold = np.random.default_rng(seed).permutation(len(z)) % min(_FOLDS, len(z))
    held_out: dict[Method, Floats] = {}
    for method in get_args(Method):
        p = np.empty_like(z)
        for k in np.unique(fold):
            p[fold == k] = fit(method, z[fold != k], y[fold != k], even=even)(z[fold == k])
        held_out[method] = p
    weights = _weights(y, even)
    loss = {m: _log_loss(p, y.astype(np.float64), weights) for m, p in held_out.items()}
    best = min(held_out, key=loss.__getitem__)
    return Calibration(fit(best, z, y, even=even), held_out[best], {str(m): v for m, v in loss.items()})


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram.

    Attributes:
        lower, upper: range of probability that the bar stands for.
        n: answers in it.
        confidence: their mean probability.
        accuracy: share of them that was right, with its 95 % interval `low` to `high`.
    """

    lower: float
    upper: float
    n: int
    confidence: float
    accuracy: float
    low: float
    high: float


def reliability(probabilities: ArrayLike, outcomes: Sequence[bool] | NDArray[np.bool_], bins: int = 10) -> list[Bin]:
    """A reliability diagram over bins of equal width; empty bins are left out."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    index = np.minimum((p * bins).astype(int), bins - 1)
    found = []
    for b in np.unique(index):
        inside = index == b
        n, passed = int(inside.sum()), int(y[inside].sum())
        interval = wilson(passed, n)
        mean = float(p[inside].mean())
        found.append(Bin(b / bins, (b + 1) / bins, n, mean, passed / n, interval.low, interval.high))
    return found


def expected_calibration_error(
    probabilities: ArrayLike, outcomes: Sequence[bool] | NDArray[np.bool_], bins: int = 10
) -> float:
    """Mean distance of confidence and accuracy over the bins, weighted by their size. 0 without data."""
    diagram = reliability(probabilities, outcomes, bins)
    total = sum(b.n for b in diagram)
    return sum(b.n * abs(b.confidence - b.accuracy) for b in diagram) / total if total else 0.0


def _smoothed(outcomes: NDArray[np.bool_]) -> Floats:
    """Platt's targets: a little short of 0 and 1, the less data the more."""
    right = int(outcomes.sum())
    wrong = len(outcomes) - right
    return np.where(outcomes, (right + 1) / (right + 2), 1 / (wrong + 2))


def _weights(outcomes: NDArray[np.bool_], even: bool) -> Floats:
    """Of the rows, 1 on average."""
    share = outcomes.mean()
    if not even or share in (0, 1):
        return np.ones(len(outcomes))
    return np.where(outcomes, 0.5 / share, 0.5 / (1 - share))


def _log_loss(probabilities: Floats, targets: Floats, weights: Floats) -> float:
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-np.average(xlogy(targets, p) + xlogy(1 - targets, 1 - p), weights=weights))
