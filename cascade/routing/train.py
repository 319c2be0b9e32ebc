"""Training the router from verdicts, and saying how good it is.

The queries are split once: the network learns from one part, calibrators and every reported figure come from the
other. Figures use cross-fitted probabilities, so that no task is judged by a calibrator that saw it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade.config import Router
from cascade.errors import DataError
from cascade.routing.calibration import Bin, Calibration, calibrate, expected_calibration_error, reliability
from cascade.routing.features import featurize
from cascade.routing.model import BASE, KNOWN, RouterModel
from cascade.routing.network import target_matrix, train_network
from cascade.scoring.statistics import paired_bootstrap, wilson

MIN_QUERIES = 10
_THRESHOLDS = np.linspace(0, 1, 21)
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Figure:
    """A measured share with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def share(cls, passed: Sequence[bool] | Bools) -> Figure:
        n, count = len(passed), int(np.sum(passed))
        interval = wilson(count, n)
        return cls(count / n if n else 0.0, n, interval.low, interval.high)

    @classmethod
    def difference(cls, first: Sequence[float], second: Sequence[float], seed: int) -> Figure:
        """Mean of `second` - `first` over the same queries, by paired bootstrap."""
        interval = paired_bootstrap(first, second, seed=seed)
        return cls(float(np.mean(second) - np.mean(first)), len(first), interval.low, interval.high)


@dataclass(frozen=True)
class OutputReport:
    """Calibration of one output on queries that the network was not trained on.

    Attributes:
        method: that was chosen by held-out log loss, whose values per method are in `loss`.
        ece_before, ece_after: expected calibration error of the plain sigmoid, and of the held-out probabilities.
        bins: reliability diagram after calibration.
    """

    method: str
    n: int
    ece_before: float
    ece_after: float
    loss: dict[str, float]
    bins: list[Bin]


@dataclass(frozen=True)
class CurvePoint:
    """What a threshold would give on the held-out queries.

    Attributes:
        coverage: share of measured kinds' queries that the router decides itself.
        modifier_share: share of them that a modifier answers, which is what routing costs: swaps and smaller batches.
        quality: share of right answers.
        other_to_base: share of queries of no measured kind that go to the base.
    """

    threshold: float
    coverage: float
    modifier_share: float
    quality: Figure
    other_to_base: float


@dataclass(frozen=True)
class RouterReport:
    """How good a router is. Every figure is of held-out queries.

    Attributes:
        trained_on, held_out: queries with verdicts on either side of the split.
        other_trained_on, other_held_out: queries of no measured kind on either side; where they come from is in
            `other_source`.
        outputs: calibration per candidate and for "known".
        ece_before, ece_after: over all candidates' probabilities together.
        accuracy: share of queries routed to a candidate that answers as well as any does.
        coverage: share of queries that the router decided itself rather than falling back to the base.
        quality: share of right answers when routed, and under "base", "best_single" (the one candidate that is best on
            these very queries), "random" (one seeded draw per query) and "oracle" (right if any candidate is).
        best_single: name of that candidate.
        gain: routed minus "base", "best_single" and "random", paired.
        other_to_base: share of queries of no measured kind that went to the base.
        curve: the same under other thresholds.
    """

    seed: int
    threshold: float
    trained_on: int
    held_out: int
    other_trained_on: int
    other_held_out: int
    other_source: str
    outputs: dict[str, OutputReport]
    ece_before: float
    ece_after: float
    accuracy: Figure
    coverage: Figure
    quality: dict[str, Figure]
    best_single: str
    gain: dict[str, Figure]
    other_to_base: Figure
    curve: list[CurvePoint]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


@cache
def general_chat() -> tuple[str, ...]:
    """The built-in queries of general chat, which no modifier is expected to answer better than the base."""
    text = resources.files("cascade.routing").joinpath("general_chat.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def train_router(
    queries: Sequence[str],
    outcomes: Mapping[str, Sequence[bool | None]],
    settings: Router,
    seed: int,
    *,
    other: Sequence[str] | None = None,
) -> tuple[RouterModel, RouterReport]:
    """Train, calibrate and measure a router.

    Args:
        queries: prompts of validation tasks.
        outcomes: per candidate ("base" and each modifier's domain) whether it answered each query rightly; None where
            it was not asked (counts as wrong in the figures, and not at all in the training).
        settings: widths, epochs, threshold and the share kept for calibration.
        seed: of split, start and order.
        other: queries of no measured kind; null: the built-in ones of general chat.

    Raises:
        DataError: too few queries, no outcomes of the base, or outcomes that do not fit the queries.
        ConfigError: the network would be too large.
    """
    candidates = _checked_candidates(queries, outcomes)
    unknown = list(dict.fromkeys(general_chat() if other is None else other))
    rng = np.random.default_rng(seed)
    held = _held_out(queries, settings.calibration_share, rng)
    other_held = _held_out(unknown, settings.calibration_share, rng)
    texts = [*queries, *unknown]
    columns = [[*outcomes[c], *[None] * len(unknown)] for c in candidates]
    columns.append([*[True] * len(queries), *[False] * len(unknown)])
    vectors, targets = featurize(texts, settings.features), target_matrix(columns)
    all_held = np.concatenate([held, other_held])
    network = train_network(
        vectors[~all_held], targets[~all_held], hidden=settings.hidden, epochs=settings.epochs, seed=seed
    )
    held_logits, held_targets = network.logits(vectors[all_held]), targets[all_held]
    names = (*candidates, KNOWN)
    calibrations = {n: _calibrate(held_logits[:, i], held_targets[:, i], seed) for i, n in enumerate(names)}
    model = RouterModel(
        network=network,
        candidates=candidates,
        features=settings.features,
        hidden=settings.hidden,
        threshold=settings.threshold,
        calibrators={n: c.calibrator for n, c in calibrations.items()},
    )
    source = "built-in general chat" if other is None else "given by the caller"
    report = _Measurement(model, calibrations, held_logits, held_targets, seed).report(
        trained_on=int((~held).sum()), other_trained_on=int((~other_held).sum()), other_source=source
    )
    return model, report


def _checked_candidates(queries: Sequence[str], outcomes: Mapping[str, Sequence[bool | None]]) -> tuple[str, ...]:
    """The candidates, base first."""
    if BASE not in outcomes:
        raise DataError(f"a router needs the outcomes of {BASE!r}; there are those of {sorted(outcomes)}")
    if KNOWN in outcomes:
        raise DataError(f"{KNOWN!r} cannot be a modifier's name: the router uses it itself")
    for name, column in outcomes.items():
        if len(column) != len(queries):
            raise DataError(f"{name!r} has {len(column)} outcomes for {len(queries)} queries")
    if len(set(queries)) < MIN_QUERIES:
        raise DataError(
            f"a router needs verdicts on at least {MIN_QUERIES} different queries, there are {len(set(queries))}: "
            "raise tasks.validation.count"
        )
    return (BASE, *sorted(set(outcomes) - {BASE}))


def _held_out(queries: Sequence[str], share: float, rng: np.random.Generator) -> Bools:
    """Which queries are kept from the network; equal texts stay on one side."""
    texts = list(dict.fromkeys(queries))
    count = min(max(round(share * len(texts)), 2), max(len(texts) - 2, 0))
    kept = {texts[i] for i in rng.permutation(len(texts))[:count]}
    return np.array([q in kept for q in queries], dtype=bool)


def _calibrate(logits: NDArray[np.float64], targets: NDArray[np.float32], seed: int) -> Calibration:
    """Calibrate on the measured rows; the others get their probability from the finished calibrator."""
    measured = ~np.isnan(targets)
    result = calibrate(logits[measured], targets[measured] > 0.5, seed)
    held_out = result.calibrator(logits)
    held_out[measured] = result.held_out
    return dataclasses.replace(result, held_out=held_out)


@dataclass(frozen=True)
class _Measurement:
    """What the report is computed from: held-out rows, those with verdicts and the others."""

    model: RouterModel
    calibrations: dict[str, Calibration]
    logits: NDArray[np.float64]
    targets: NDArray[np.float32]
    seed: int

    def report(self, *, trained_on: int, other_trained_on: int, other_source: str) -> RouterReport:
        inside = self.targets[:, -1] > 0.5
        right = self.targets[inside, :-1] == 1
        chosen, decided = self._routes(self.model.threshold)
        routed = right[np.arange(len(right)), chosen[inside]]
        best = int(right.mean(axis=0).argmax())
        draw = np.random.default_rng(self.seed).integers(0, right.shape[1], len(right))
        answers = {
            "routed": routed,
            "base": right[:, 0],
            "best_single": right[:, best],
            "random": right[np.arange(len(right)), draw],
            "oracle": right.any(axis=1),
        }
        before, after = self._pooled_error()
        return RouterReport(
            seed=self.seed,
            threshold=self.model.threshold,
            trained_on=trained_on,
            held_out=int(inside.sum()),
            other_trained_on=other_trained_on,
            other_held_out=int((~inside).sum()),
            other_source=other_source,
            outputs={name: self._output(i, name) for i, name in enumerate(self.calibrations)},
            ece_before=before,
            ece_after=after,
            accuracy=Figure.share(routed == answers["oracle"]),
            coverage=Figure.share(decided[inside]),
            quality={name: Figure.share(passed) for name, passed in answers.items()},
            best_single=self.model.candidates[best],
            gain={
                name: Figure.difference(answers[name].astype(float).tolist(), routed.astype(float).tolist(), self.seed)
                for name in ("base", "best_single", "random")
            },
            other_to_base=Figure.share(chosen[~inside] == 0),
            curve=[self._point(float(t), inside, right) for t in _THRESHOLDS],
        )

    def _point(self, threshold: float, inside: Bools, right: Bools) -> CurvePoint:
        chosen, decided = self._routes(threshold)
        return CurvePoint(
            threshold=round(threshold, 2),
            coverage=float(decided[inside].mean()),
            modifier_share=float((chosen[inside] > 0).mean()),
            quality=Figure.share(right[np.arange(len(right)), chosen[inside]]),
            other_to_base=float((chosen[~inside] == 0).mean()) if (~inside).any() else 1.0,
        )

    def _routes(self, threshold: float) -> tuple[NDArray[np.int64], Bools]:
        """Index of the candidate chosen for every held-out row, and whether the router decided itself."""
        right = np.stack([self.calibrations[c].held_out for c in self.model.candidates], axis=1)
        known = self.calibrations[KNOWN].held_out
        routes = [self.model.decide(float(k), r, threshold) for k, r in zip(known, right, strict=True)]
        chosen = np.array([self.model.candidates.index(r.choice) for r in routes], dtype=np.int64)
        return chosen, np.array([r.reason == "router" for r in routes], dtype=bool)

    def _measured(self, output: int, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64], Bools]:
        """Plain sigmoid, held-out probability and outcome of the measured rows of one output."""
        rows = ~np.isnan(self.targets[:, output])
        plain = 1 / (1 + np.exp(-self.logits[rows, output]))
        return plain, self.calibrations[name].held_out[rows], self.targets[rows, output] > 0.5

    def _output(self, output: int, name: str) -> OutputReport:
        plain, held_out, outcome = self._measured(output, name)
        return OutputReport(
            method=self.calibrations[name].calibrator.method,
            n=len(outcome),
            ece_before=expected_calibration_error(plain, outcome),
            ece_after=expected_calibration_error(held_out, outcome),
            loss=self.calibrations[name].loss,
            bins=reliability(held_out, outcome),
        )

    def _pooled_error(self) -> tuple[float, float]:
        """Calibration error over all candidates, before and after."""
        parts = [self._measured(i, name) for i, name in enumerate(self.model.candidates)]
        plain, held_out, outcome = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return expected_calibration_error(plain, outcome), expected_calibration_error(held_out, outcome)
