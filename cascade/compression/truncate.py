"""Rank truncation: the best approximation of B @ A of a smaller rank, exactly and without forming the product.

With B = Qb Rb and A^T = Qa Ra (QR), the singular values of B A are those of the small matrix Rb Ra^T (Eckart-Young
then gives the best rank-k factors). The factors come out balanced: both carry the square root of the singular values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cascade.compression.adapter import AdapterWeights, LoraPair

Allocation = Literal["uniform", "global"]
Svd = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""U (out, k), singular values (k,) falling, V^T (k, in) of a layer's B @ A."""


def product_svd(pair: LoraPair) -> Svd:
    """Thin SVD of b @ a in float64; cost is that of two QR decompositions of (features, rank)."""
    qb, rb = np.linalg.qr(pair.b.astype(np.float64))
    qa, ra = np.linalg.qr(pair.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, vt @ qa.T


# One thread: hundreds of small decompositions gain nothing from more, and with as many trials as cores BLAS threads
# that wait for each other made this a hundred times slower.
@threadpool_limits.wrap(limits=1, user_api="blas")
def truncate(
    adapter: AdapterWeights, *, keep: float | None, energy: float | None, allocation: Allocation = "uniform"
) -> AdapterWeights:
    """Reduce each layer's rank.

    Args:
        keep: share of the rank to keep, in (0, 1]; rounded down, at least 1.
        energy: instead: share of each layer's squared singular values to keep.
        allocation: with `keep`: "uniform" gives every layer that share, "global" gives the same number of
            parameters in all to the layers whose singular values are largest for what they cost.

    Returns:
        Float32 factors. A is no longer near its random start, so the seed is dropped.
    """
    ranks = _global_ranks(adapter, keep or 1.0) if energy is None and allocation == "global" else {}
    layers = {}
    for name, pair in adapter.layers.items():
        svd = product_svd(pair)
        s = svd[1]
        if energy is not None:
            rank = _rank_of_energy(s, energy)
        else:
            rank = ranks.get(name) or max(1, int((keep or 1.0) * s.size + 1e-9))
        layers[name] = _cut(svd, rank)
    return replace(adapter, layers=layers, init_seed=None)


def product_spectrum(pair: LoraPair) -> NDArray[np.float64]:
    """Singular values (rank,) of b @ a, falling."""
    rb = np.linalg.qr(pair.b.astype(np.float64)).R
    ra = np.linalg.qr(pair.a.T.astype(np.float64)).R
    return np.linalg.svdvals(rb @ ra.T)


def _cut(svd: Svd, rank: int) -> LoraPair:
    u, s, vt = svd
    root = np.sqrt(s[:rank])
    return LoraPair((root[:, None] * vt[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32))


def _rank_of_energy(s: NDArray[np.float64], energy: float) -> int:
    shares = np.cumsum(s**2)
    return min(s.size, 1 + int(np.searchsorted(shares, energy * shares[-1] * (1 - 1e-12)))) if shares[-1] else 1


def _global_ranks(adapter: AdapterWeights, keep: float) -> dict[str, int]:
    """Ranks that spend `keep` of all parameters on the largest squared singular values per parameter."""
    spectra = {name: product_spectrum(pair) for name, pair in adapter.layers.items()}
    costs = {name: pair.a.shape[1] + pair.b.shape[0] for name, pair in adapter.layers.items()}
    names = [name for name, s in spectra.items() for _ in s]
    order = np.concatenate([np.arange(s.size) for s in spectra.values()])
    cost = np.array([costs[name] for name in names])
    worth = np.concatenate([s**2 / costs[name] for name, s in spectra.items()])
    # Every layer keeps its first component: a layer of rank 0 is none to PEFT.
    ranking = np.lexsort((-worth, order > 0))
    spent = np.cumsum(cost[ranking])
    chosen = ranking[(spent <= keep * cost.sum() * (1 + 1e-12)) | (order[ranking] == 0)]
    return Counter(names[i] for i in chosen)
