"""Training the router from verdicts, and saying how good it is.

The queries are split into folds, equal ones together, and a network is trained without each fold. What it says of that
fold is what calibrators learn from, and what every reported figure comes from; calibrators are cross-fitted too, so
that no query is judged by a network or a calibrator that saw it. The networks side by side are the router.

How many of the requests to come are of no measured kind nobody knows, and how many built-in lines of general chat there
are says nothing of it. So "known" is calibrated as if every second request were.
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

from cascade.config import ROUTER_NETWORKS, Router
from cascade.errors import DataError
from cascade.routing.calibration import Bin, Calibration, calibrate, expected_calibration_error, reliability
from cascade.routing.features import featurize
from cascade.routing.model import BASE, FOLLOW_UP, KNOWN, RESERVED, TOOLS_OFFERED, RouterModel
from cascade.routing.network import joined, target_matrix, train_network
from cascade.scoring.statistics import paired_bootstrap, wilson

MIN_QUERIES = 10
_FOLDS = ROUTER_NETWORKS
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
    """How good a router is. Every figure is of queries held out from what judged them (see the module).

    Attributes:
        queries: with verdicts.
        others: queries of no measured kind; where they come from is in `other_source`.
        outputs: calibration per candidate and for "known".
        ece_before, ece_after: over all candidates' probabilities together.
        accuracy: share of queries routed to a candidate that answers as well as any does.
        coverage: share of queries that the router decided itself rather than falling back to the base.
        quality: share of right answers when routed, and under "base", "best_single" (the one candidate that is best on
            these very queries), "random" (one seeded draw per query) and "oracle" (right if any candidate is).
        best_single: name of that candidate.
        gain: routed minus "base", "best_single" and "random", paired.
        other_to_base: share of queries of no measured kind that went to the base.
        follow_ups: share of follow-ups that were taken for such.
        no_follow_ups: share of all other queries that were not.
        curve: the same under other thresholds.
    """

    seed: int
    threshold: float
    queries: int
    others: int
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
    follow_ups: Figure
    no_follow_ups: Figure
    curve: list[CurvePoint]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


@cache
def general_chat() -> tuple[str, ...]:
    """The built-in queries of general chat, which no modifier is expected to answer better than the base."""
    return _lines("general_chat.txt")


@cache
def follow_ups() -> tuple[str, ...]:
    """The built-in messages that mean nothing without those before them."""
    return _lines("follow_ups.txt")


def _lines(name: str) -> tuple[str, ...]:
    text = resources.files("cascade.routing").joinpath(name).read_text(encoding="utf-8")
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
        settings: widths, epochs and threshold.
        seed: of folds, starts and orders.
        other: queries of no measured kind; null: the built-in ones of general chat.

    Raises:
        DataError: too few queries, no outcomes of the base, or outcomes that do not fit the queries.
        ConfigError: the network would be too large.
    """
    candidates = _checked_candidates(queries, outcomes)
    unknown = list(dict.fromkeys(general_chat() if other is None else other))
    later = [line for line in follow_ups() if line not in {*queries, *unknown}]
    later += [f"{line}\n{TOOLS_OFFERED}" for line in later]
    texts, unjudged = [*queries, *unknown, *later], [None] * (len(unknown) + len(later))
    columns = [[*outcomes[c], *unjudged] for c in candidates]
    known: list[bool | None] = [*[True] * len(queries), *[False] * len(unknown), *[None] * len(later)]
    columns += [known, [is_known is None for is_known in known]]
    vectors, targets = featurize(texts, settings.features), target_matrix(columns)
    fold = np.concatenate([_folds(part, seed) for part in (queries, unknown, later)])
    networks, logits = [], np.empty(targets.shape)
    for k in range(_FOLDS):
        rest = fold != k
        network = train_network(
            vectors[rest], targets[rest], hidden=settings.hidden, epochs=settings.epochs, seed=seed * _FOLDS + k
        )
        logits[~rest] = network.logits(vectors[~rest])
        networks.append(network)
    names = (*candidates, *RESERVED)
    calibrations = {n: _calibrate(logits[:, i], targets[:, i], seed, even=n == KNOWN) for i, n in enumerate(names)}
    model = RouterModel(
        network=joined(networks),
        candidates=candidates,
        features=settings.features,
        hidden=settings.hidden * _FOLDS,
        threshold=settings.threshold,
        calibrators={n: c.calibrator for n, c in calibrations.items()},
    )
    source = "built-in general chat" if other is None else "given by the caller"
    report = _Measurement(model, calibrations, logits, targets, seed).report(source)
    return model, report


def _checked_candidates(queries: Sequence[str], outcomes: Mapping[str, Sequence[bool | None]]) -> tuple[str, ...]:
    """The candidates, base first."""
    if BASE not in outcomes:
        raise DataError(f"a router needs the outcomes of {BASE!r}; there are those of {sorted(outcomes)}")
    for name in RESERVED:
        if name in outcomes:
            raise DataError(f"{name!r} cannot be a modifier's name: the router uses it itself")
    for name, column in outcomes.items():
        if len(column) != len(queries):
            raise DataError(f"{name!r} has {len(column)} outcomes for {len(queries)} queries")
    if len(set(queries)) < MIN_QUERIES:
        raise DataError(
            f"a router needs verdicts on at least {MIN_QUERIES} different queries, there are {len(set(queries))}: "
            "raise tasks.validation.count"
        )
    return (BASE, *sorted(set(outcomes) - {BASE}))


def _folds(queries: Sequence[str], seed: int) -> NDArray[np.int64]:
    """The fold of each query; equal texts share one."""
    texts = list(dict.fromkeys(queries))
    order = np.random.default_rng(seed).permutation(len(texts))
    fold = {texts[i]: place % _FOLDS for place, i in enumerate(order)}
    return np.array([fold[q] for q in queries], dtype=np.int64)


def _calibrate(logits: NDArray[np.float64], targets: NDArray[np.float32], seed: int, *, even: bool) -> Calibration:
    """Calibrate on the measured rows; the others get their probability from the finished calibrator."""
    measured = ~np.isnan(targets)
    result = calibrate(logits[measured], targets[measured] > 0.5, seed, even=even)
    held_out = result.calibrator(logits)
    held_out[measured] = result.held_out
    return dataclasses.replace(result, held_out=held_out)


@dataclass(frozen=True)
class _Measurement:
    """What the report is computed from: held-out rows with verdicts, of no measured kind, and follow-ups."""

    model: RouterModel
    calibrations: dict[str, Calibration]
    logits: NDArray[np.float64]
    targets: NDArray[np.float32]
    seed: int

    def report(self, other_source: str) -> RouterReport:
        known, later = self.targets[:, -2], self.targets[:, -1] == 1
        inside, other = known == 1, known == 0
        taken = self.calibrations[FOLLOW_UP].held_out >= 0.5
        right = self.targets[inside, : len(self.model.candidates)] == 1
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
            queries=int(inside.sum()),
            others=int(other.sum()),
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
            other_to_base=Figure.share(chosen[other] == 0),
            follow_ups=Figure.share(taken[later]),
            no_follow_ups=Figure.share(~taken[~later]),
            curve=[self._point(float(t), inside, other, right) for t in _THRESHOLDS],
        )

    def _point(self, threshold: float, inside: Bools, other: Bools, right: Bools) -> CurvePoint:
        chosen, decided = self._routes(threshold)
        return CurvePoint(
            threshold=round(threshold, 2),
            coverage=float(decided[inside].mean()),
            modifier_share=float((chosen[inside] > 0).mean()),
            quality=Figure.share(right[np.arange(len(right)), chosen[inside]]),
            other_to_base=float((chosen[other] == 0).mean()) if other.any() else 1.0,
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
