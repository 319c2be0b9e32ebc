"""Which tasks to send past a tier: a predictor trained on what the tier has failed so far.

A share of the tasks is asked as in the plain cascade. A logistic regression over the base's embeddings of them and
their difficulty learns which the tier settles. Each of the others is sent past the tier if asking it would cost more
than it is expected to save above. A share of those that would be sent past is asked all the same: these controls say
what the shortcut has really saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cascade.config import Predictor, Teacher
from cascade.reports.data import Shortcut
from cascade.scoring.statistics import wilson
from cascade.tasks import Task
from cascade.teachers.budget import price_usd
from cascade.teachers.client import Answer
from cascade.teachers.plan import EXPECTED_SHARES

FOLDS = 5
_LEAST = 8
"""Settled and failed tasks that there must be of each to learn from."""
_BETTER_BY = 0.05
"""Share of the constant's log loss by which the predictor must be better on tasks it did not see."""
_COMPONENTS = 24


@dataclass(frozen=True, slots=True)
class Sent:
    """A task that the predictor would send past a tier.

    Attributes:
        probability: that the tier would settle it.
        control: it is asked nevertheless, to measure what sending it past would have saved.
    """

    task_id: str
    probability: float
    control: bool


@dataclass(frozen=True, slots=True)
class Costs:
    """What a task costs on average, in US dollars.

    Attributes:
        settled: at the tier, where it settles it.
        failed: at the tier, where it fails it: all samples and repairs.
        above: at the tiers above.
    """

    settled: float
    failed: float
    above: float

    def saved_by_asking(self, probability: float) -> float:
        """What asking the tier saves against sending the task past it; negative where that is cheaper."""
        asking = probability * self.settled + (1 - probability) * self.failed
        return probability * self.above - asking


def first_wave(ids: Sequence[str], settings: Predictor, seed: int) -> list[str]:
    """The tasks that are asked before anything is predicted, drawn by chance that the seed decides."""
    return [i for i in ids if _draw(i, seed, "learn") < settings.learn_share]


def send_past(
    known: Mapping[str, bool],
    others: Sequence[str],
    features: Mapping[str, NDArray[np.float32]],
    costs: Costs,
    settings: Predictor,
    seed: int,
) -> list[Sent]:
    """The tasks that are expected to be cheaper without this tier, the controls among them.

    Args:
        known: task id -> whether the tier settled it.
        others: task ids that were not asked yet.
        features: of all these tasks, see `task_features`.

    Returns:
        Nothing if there is too little to learn from, or the predictor is no better than the mean on unseen tasks.
    """
    ids = [i for i in known if i in features]
    unseen = [i for i in others if i in features]
    labels = np.array([known[i] for i in ids], dtype=int)
    if not unseen or min(labels.sum(), len(labels) - labels.sum()) < _LEAST:
        return []
    x = np.stack([features[i] for i in ids])
    model = make_pipeline(
        StandardScaler(),
        PCA(min(_COMPONENTS, len(x) - len(x) // FOLDS - 2, x.shape[1]), random_state=seed),  # a fold is left out
        StandardScaler(),
        LogisticRegression(C=1.0, max_iter=2000),
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    held_out = cross_val_predict(model, x, labels, cv=folds, method="predict_proba")[:, 1]
    constant = np.full(len(labels), labels.mean())
    if log_loss(labels, held_out) > (1 - _BETTER_BY) * log_loss(labels, constant):
        return []
    chances = model.fit(x, labels).predict_proba(np.stack([features[i] for i in unseen]))[:, 1]
    return [
        Sent(task_id, float(p), _draw(task_id, seed, "control") < settings.control_share)
        for task_id, p in zip(unseen, chances, strict=True)
        if costs.saved_by_asking(float(p)) < 0
    ]


def task_features(tasks: Sequence[Task], vectors: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Task id -> the base's embedding of it and its difficulty."""
    return {t.id: np.append(v, np.float32(t.difficulty)) for t, v in zip(tasks, vectors, strict=True)}


def tier_costs(answers: Sequence[Answer], known: Mapping[str, bool], tiers: Sequence[Teacher], tier: int) -> Costs:
    """Costs from what the tier was paid so far; above, the same tokens at the prices there, one request at each.

    How many tasks climb from one tier above to the next is taken from the expected shares.
    """
    paid: dict[str, float] = dict.fromkeys(known, 0.0)
    for answer in answers:
        if answer.task_id in paid:
            paid[answer.task_id] += answer.cost_usd
    first = [a for a in answers if a.round == 0 and a.ok] or list(answers)
    tokens = [round(float(np.mean([getattr(a, n) for a in first]))) for n in ("prompt_tokens", "completion_tokens")]
    shares = [EXPECTED_SHARES[n] if t.expected_share is None else t.expected_share for n, t in enumerate(tiers)]
    above, reaching = 0.0, 1.0
    for number in range(tier, len(tiers)):
        above += reaching * price_usd(tiers[number], *tokens)
        rest = sum(shares[number:])
        reaching *= 1 - shares[number] / rest if rest else 0.0
    by_outcome = {ok: [paid[i] for i, passed in known.items() if passed is ok] for ok in (True, False)}
    settled, failed = (float(np.mean(by_outcome[ok])) if by_outcome[ok] else 0.0 for ok in (True, False))
    return Costs(settled, failed, above)


def measure(tier: int, sent: Sequence[Sent], known: Mapping[str, bool], costs: Costs) -> Shortcut:
    """The shortcut's saving from the controls' outcomes."""
    past = sum(not s.control for s in sent)
    outcomes = [known[s.task_id] for s in sent if s.control and s.task_id in known]
    if not outcomes:
        return Shortcut(tier, past, 0, 0, 0.0, 0.0, 0.0)

    def saved(share: float) -> float:
        return -past * costs.saved_by_asking(share)

    settled = wilson(sum(outcomes), len(outcomes))
    value = saved(sum(outcomes) / len(outcomes))
    low, high = sorted((saved(settled.low), saved(settled.high)))
    return Shortcut(tier, past, len(outcomes), sum(outcomes), value, low, high)


def _draw(task_id: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) of a task's own."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{task_id}".encode()).digest()[:7], "big") / 2**56
