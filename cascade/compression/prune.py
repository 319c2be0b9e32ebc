"""Pruning: which numbers of A - A0 and of B are worth keeping.

Training moves A by about a tenth of its norm, so pruning A itself would prune mostly its random start; what is
compared here is the change. Thresholds are per layer, per group of layers, or one for all, and groups can be given
weights. Rescaling what is left decides more about the result than which numbers are left.

A number counts by its magnitude, or by what dropping it does (`importance`): to the layer's output ("activations", as
Wanda does it, arXiv:2306.11695) or to the loss ("gradients", a diagonal Fisher with input and gradient taken as
independent). Both are magnitude times something for its row times something for its column, from calibration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cascade.compression.adapter import LoraPair
from cascade.compression.truncate import Grams, Metric
from cascade.errors import DataError

Scope = Literal["layer", "group", "global"]
Group = Literal["attention-early", "attention-middle", "attention-late", "mlp-early", "mlp-middle", "mlp-late"]
GROUPS: tuple[Group, ...] = get_args(Group)
Changes = Callable[[str], NDArray[np.float32]]
"""Gives one factor's change of a layer, by the layer's name."""
Importance = tuple[NDArray[np.float32], NDArray[np.float32]]
"""What the numbers of A, shape (rank, in), and of B transposed, (rank, out), are multiplied with to be compared."""

_ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|qkv|out)_proj$", re.IGNORECASE)
_DEPTH = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def group_layers(names: Iterable[str]) -> dict[str, Group]:
    """The group of each layer: attention or mlp, in the early, middle or late third of the model.

    A layer without a number in its name counts as late (that is where output heads are).
    """
    depth = {name: int(found[1]) if (found := _DEPTH.search(name)) else None for name in names}
    layers = max((d for d in depth.values() if d is not None), default=0) + 1
    thirds = ("early", "middle", "late")

    def group(name: str, d: int | None) -> Group:
        kind = "attention" if _ATTENTION.search(name) else "mlp"
        third = thirds[min(2, 3 * d // layers)] if d is not None else "late"
        found: Group = f"{kind}-{third}"  # type: ignore[assignment]
        return found

    return {name: group(name, d) for name, d in depth.items()}


def thresholds(
    names: Iterable[str], change: Changes, density: float, scope: Scope, weights: Mapping[Group, float] | None = None
) -> dict[str, float]:
    """The magnitude from which on a number is kept, per layer.

    Args:
        names: the layers.
        change: gives the change of one factor, or what it counts, any shape; called once per layer.
        density: share of the numbers to keep, in (0, 1]: of each layer, of each group, or of all.
        scope: how far one threshold reaches.
        weights: for scope "global": how many times larger a number of a group counts. Missing ones are 1.

    Returns:
        Threshold by name, in the units of the change. Peak memory is one float32 copy of what a threshold covers.
    """
    groups = group_layers(names)
    weight = {name: float((weights or {}).get(group, 1.0)) for name, group in groups.items()}
    keys: dict[str, Any] = {"layer": {n: n for n in groups}, "group": groups, "global": dict.fromkeys(groups, "")}
    key = keys[scope]
    found: dict[str, float] = {}
    for _, members in groupby(sorted(groups, key=key.__getitem__), key=key.__getitem__):
        together = list(members)
        cut = _cut([_scores(change(n), weight[n]) for n in together], density)
        found |= {name: cut / weight[name] for name in together}
    return {name: found[name] for name in groups}


def importance(before: LoraPair, after: LoraPair, grams: Grams, metric: Metric) -> Importance:
    """How much a number of each factor counts beyond its magnitude, in a measured metric.

    Args:
        before: the layer as calibrated; after: as truncation left it, which may be the same.

    Raises:
        DataError: the calibration lacks what pruning asks for.
    """
    if grams.features is None or grams.effects is None:
        raise DataError(f"pruning by {metric} needs a calibration of the layers' inputs and outputs: calibrate anew")
    seen, said = _moments(before, after, grams)
    feature = np.sqrt(grams.features)
    if metric == "activations":
        heard, effect = np.linalg.norm(after.b, axis=0), np.ones(after.b.shape[0])
    else:
        heard, effect = np.sqrt(said), np.sqrt(grams.effects)
    return np.outer(heard, feature).astype(np.float32), np.outer(np.sqrt(seen), effect).astype(np.float32)


def _moments(before: LoraPair, after: LoraPair, grams: Grams) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean squares of z and of dL/dz, by component, of factors that span the same or less: A' = R A and B' = B L."""
    if after is before:
        return np.diag(grams.inputs).astype(np.float64), np.diag(grams.outputs).astype(np.float64)
    a, b = before.a.astype(np.float64), before.b.astype(np.float64)
    right = np.linalg.lstsq(a @ a.T, a @ after.a.T.astype(np.float64), rcond=None)[0].T
    left = np.linalg.lstsq(b.T @ b, b.T @ after.b.astype(np.float64), rcond=None)[0]
    seen, said = (
        np.einsum("ki,ij,kj->k", right, grams.inputs, right),
        np.einsum("ik,ij,jk->k", left, grams.outputs, left),
    )
    return np.maximum(seen, 0), np.maximum(said, 0)


def kept_energy(scores: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """The share of a layer's sum of squares that is kept, by what numbers count; 1 where there is nothing to keep."""
    whole, kept = (float(np.square(x, dtype=np.float64).sum()) for x in (scores, scores[mask]))
    return kept / whole if whole and kept else 1.0


def keep_mask(change: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Which numbers reach the threshold; zeros never do. Same shape as `change`."""
    return (np.abs(change) >= np.float32(threshold)) & (change != 0)


def _scores(change: NDArray[np.float32], weight: float) -> NDArray[np.float32]:
    return np.abs(change.ravel()) * np.float32(weight)


def _cut(parts: list[NDArray[np.float32]], density: float) -> float:
    """The magnitude of the last number kept."""
    scores = np.concatenate(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    keep = min(scores.size, max(1, round(density * scores.size)))
    scores.partition(scores.size - keep)
    return float(scores[scores.size - keep])
