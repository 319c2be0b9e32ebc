"""Rank truncation by singular value decomposition of B @ A, without ever forming that product.

With B = Qb Rb and A^T = Qa Ra (QR), the singular values of B A are those of the small matrix Rb Ra^T (Eckart-Young
then gives the best rank-k factors). The factors come out balanced: both carry the square root of the singular values.

"Best" is a matter of the metric. Plain SVD keeps most of the matrix B A itself. With a calibration
(`cascade.compression.calibrate`) it keeps most of what the layer adds to its output on real inputs ("activations"),
or of what that does to the loss ("gradients"): with Sa the second moment of z = A x and Sb that of dL/dz, both of
shape (rank, rank), Sa = La La^T, Sb = Lb Lb^T and Lb^T La = U S V^T, the best factors of rank k in the norm
E|g^T (D - D') x|^2 (with input and gradient taken as independent, as in K-FAC, arXiv:1503.05671) are
B Lb^-T U_k S_k^1/2 and S_k^1/2 V_k^T La^-1 A. Plain SVD is the case Sa = A A^T, Sb = B^T B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cascade.compression.adapter import AdapterWeights, LoraPair
from cascade.errors import DataError

Allocation = Literal["uniform", "energy", "global"]
Metric = Literal["weights", "activations", "gradients"]
Matrix = NDArray[np.float64]
Svd = tuple[Matrix, Matrix, Matrix]
"""Left factor (out, k), singular values (k,) falling, right factor (k, in): their product is a layer's B @ A."""
_DAMPING = 0.02
"""Share of the plain metric in a measured one: what calibration never excited is cheap, not free."""


@dataclass(frozen=True, slots=True)
class Grams:
    """What calibration measured of one layer.

    Attributes:
        inputs: mean of z z^T over tokens, z = A x; float32, shape (rank, rank).
        outputs: mean of g g^T over tokens, g the gradient of the loss by z; the same shape.
        features: mean square of each number of x, shape (in,); None where nothing is pruned by it.
        effects: mean square of the loss's gradient by each number of the layer's output, shape (out,).
    """

    inputs: NDArray[np.float32]
    outputs: NDArray[np.float32]
    features: NDArray[np.float32] | None = None
    effects: NDArray[np.float32] | None = None


Calibration = Mapping[str, Grams]
"""By layer."""


def product_svd(pair: LoraPair) -> Svd:
    """Thin SVD of b @ a in float64; cost is that of two QR decompositions of (features, rank)."""
    qb, rb = np.linalg.qr(pair.b.astype(np.float64))
    qa, ra = np.linalg.qr(pair.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, vt @ qa.T


def measured_svd(pair: LoraPair, grams: Grams, metric: Metric) -> Svd:
    """As `product_svd`, in a measured metric; `s[i] ** 2` is what dropping component i costs in it."""
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    la, la_inverse = _root(_damped(grams.inputs, a @ a.T))
    lb, lb_inverse = _root(_damped(grams.outputs, b.T @ b) if metric == "gradients" else b.T @ b)
    u, s, vt = np.linalg.svd(lb.T @ la, full_matrices=False)
    return b @ (lb_inverse.T @ u), s, (vt @ la_inverse) @ a


def iter_truncated(
    adapter: AdapterWeights,
    keep: float | None,
    energy: float | None,
    allocation: Allocation = "uniform",
    metric: Metric = "weights",
    calibration: Calibration | None = None,
) -> Iterator[tuple[str, LoraPair]]:
    """Reduce each layer's rank, holding one layer at a time.

    Args:
        keep: share of the rank to keep, in (0, 1]; rounded down, at least 1.
        energy: instead: share of each layer's squared singular values to keep.
        allocation: with `keep`: "uniform" gives every layer that share. The others give as many parameters in all
            otherwise: "global" to the layers whose singular values are largest for what they cost, "energy" so that
            every layer keeps the same share of its own squared singular values.
        metric: what singular values measure; all but "weights" need a calibration.

    Returns:
        Name and float32 factors of each layer. A is no longer near its random start: whatever seed it had is void.

    Raises:
        DataError: the metric needs a calibration of this adapter and there is none.
    """
    grams = grams_for(adapter, metric, calibration)
    shared = energy is None and allocation != "uniform"
    # One thread: hundreds of small decompositions gain nothing from more, and with as many trials as cores BLAS threads
    # that wait for each other made this a hundred times slower.
    with threadpool_limits(limits=1, user_api="blas"):
        ranks = _shared_ranks(adapter, keep or 1.0, allocation, metric, grams) if shared else {}
        for name, pair in adapter.layers.items():
            svd = _svd(pair, metric, grams.get(name))
            s = svd[1]
            if energy is not None:
                rank = _rank_of_energy(s, energy)
            else:
                rank = ranks.get(name) or max(1, int((keep or 1.0) * pair.rank + 1e-9))
            yield name, _cut(svd, min(rank, s.size))


def spectrum(pair: LoraPair, metric: Metric = "weights", grams: Grams | None = None) -> Matrix:
    """Singular values, falling, without the vectors: at most `rank` of them."""
    if metric != "weights":
        assert grams is not None
        return measured_svd(pair, grams, metric)[1]
    rb = np.linalg.qr(pair.b.astype(np.float64)).R
    ra = np.linalg.qr(pair.a.T.astype(np.float64)).R
    return np.linalg.svdvals(rb @ ra.T)


def _svd(pair: LoraPair, metric: Metric, grams: Grams | None) -> Svd:
    return product_svd(pair) if grams is None else measured_svd(pair, grams, metric)


def grams_for(adapter: AdapterWeights, metric: Metric, calibration: Calibration | None) -> Calibration:
    """The calibration, once it is sure to be one of this adapter; empty where the metric needs none.

    Raises:
        DataError: it is missing, or another adapter's.
    """
    if metric == "weights":
        return {}
    for name, pair in adapter.layers.items():
        if calibration is None or name not in calibration:
            raise DataError(f"compression by {metric} needs a calibration, and layer {name} has none")
        if calibration[name].inputs.shape != (pair.rank, pair.rank):
            raise DataError(f"layer {name} has rank {pair.rank}: the calibration is of another adapter")
    assert calibration is not None
    return calibration


def _damped(measured: NDArray[np.float32], plain: Matrix) -> Matrix:
    """A measured second moment with a little of the plain metric, at the same trace."""
    size, plain_size = float(np.trace(measured)), float(np.trace(plain))
    if not plain_size or not np.isfinite(size):
        return plain
    return (1 - _DAMPING) * measured.astype(np.float64) + (_DAMPING * size / plain_size) * plain


def _root(moment: Matrix) -> tuple[Matrix, Matrix]:
    """L of shape (rank, k) with L L^T = moment, and its pseudo-inverse (k, rank); k is the numerical rank."""
    values, vectors = np.linalg.eigh(moment)
    kept = values > max(float(values[-1]), 0.0) * 1e-13
    if not kept.any():
        kept[-1] = True
    root = np.sqrt(np.maximum(values[kept], np.finfo(np.float64).tiny))
    return vectors[:, kept] * root, (vectors[:, kept] / root).T


def _cut(svd: Svd, rank: int) -> LoraPair:
    u, s, vt = svd
    root = np.sqrt(s[:rank])
    return LoraPair((root[:, None] * vt[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32))


def _rank_of_energy(s: Matrix, energy: float) -> int:
    shares = np.cumsum(s**2)
    return min(s.size, 1 + int(np.searchsorted(shares, energy * shares[-1] * (1 - 1e-12)))) if shares[-1] else 1


def _missing_energy(s: Matrix) -> Matrix:
    """The share of the layer's squared singular values that is missing before each of them is kept."""
    energy = s**2
    return np.flip(np.cumsum(np.flip(energy))) / max(float(energy.sum()), np.finfo(np.float64).tiny)


def _shared_ranks(
    adapter: AdapterWeights, keep: float, allocation: Allocation, metric: Metric, grams: Calibration
) -> dict[str, int]:
    """Ranks that spend `keep` of all parameters where they are worth most, in the order of the allocation."""
    spectra = {name: spectrum(pair, metric, grams.get(name)) for name, pair in adapter.layers.items()}
    costs = {name: pair.a.shape[1] + pair.b.shape[0] for name, pair in adapter.layers.items()}
    names = [name for name, s in spectra.items() for _ in s]
    order = np.concatenate([np.arange(s.size) for s in spectra.values()])
    cost = np.array([costs[name] for name in names])
    value = _missing_energy if allocation == "energy" else np.square
    worth = np.concatenate([value(s) / (costs[name] if allocation == "global" else 1) for name, s in spectra.items()])
    # Every layer keeps its first component: a layer of rank 0 is none to PEFT.
    ranking = np.lexsort((-worth, order > 0))
    spent = np.cumsum(cost[ranking])
    whole = sum(costs[name] * pair.rank for name, pair in adapter.layers.items())
    chosen = ranking[(spent <= keep * whole * (1 + 1e-12)) | (order[ranking] == 0)]
    return Counter(names[i] for i in chosen)
