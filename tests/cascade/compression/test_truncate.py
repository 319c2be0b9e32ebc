"""Truncation is the best approximation of its rank (checked against the SVD of the full product)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cascade.compression import truncate as module
from cascade.compression.adapter import AdapterWeights
from cascade.compression.truncate import Grams, iter_truncated, product_svd, spectrum
from cascade.errors import DataError


def truncate(adapter, *, keep, energy, **how) -> AdapterWeights:
    """The whole adapter, its layers truncated."""
    return replace(adapter, layers=dict(iter_truncated(adapter, keep, energy, **how)), init_seed=None)


def product(pair) -> np.ndarray:
    return pair.b.astype(np.float64) @ pair.a.astype(np.float64)


def test_svd_of_the_product_without_forming_it(adapter):
    for pair in list(adapter.layers.values())[:5]:
        u, s, vt = product_svd(pair)
        exact = np.linalg.svd(product(pair), compute_uv=False)[: s.size]
        assert np.allclose(s, exact, rtol=1e-10)
        assert np.allclose(spectrum(pair), s, rtol=1e-10)
        assert np.allclose((u * s) @ vt, product(pair), atol=1e-12)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.13, 0.01])
def test_error_is_the_least_possible(adapter, keep):
    small = truncate(adapter, keep=keep, energy=None)
    rank = max(1, int(keep * 8))
    for name, pair in small.layers.items():
        assert pair.rank == rank
        exact = np.linalg.svd(product(adapter.layers[name]), compute_uv=False)
        least = np.sqrt((exact[rank:] ** 2).sum())
        error = np.linalg.norm(product(pair) - product(adapter.layers[name]))
        assert error == pytest.approx(least, rel=1e-4, abs=1e-5)
        assert np.linalg.norm(pair.a) == pytest.approx(np.linalg.norm(pair.b), rel=1e-4)  # balanced


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_energy_is_reached_with_the_smallest_rank(adapter, energy):
    for name, pair in truncate(adapter, keep=None, energy=energy).layers.items():
        s = np.linalg.svd(product(adapter.layers[name]), compute_uv=False)[:8] ** 2
        shares = np.cumsum(s) / s.sum()
        assert shares[pair.rank - 1] >= energy - 1e-9
        assert pair.rank == 1 or shares[pair.rank - 2] < energy


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_global_allocation_spends_the_same_and_loses_less(adapter, keep):
    uneven = dict(adapter.layers)
    loud = next(iter(uneven))
    uneven[loud] = type(uneven[loud])(uneven[loud].a, uneven[loud].b * 20)
    adapter = replace(adapter, layers=uneven)
    even = truncate(adapter, keep=keep, energy=None)
    best = truncate(adapter, keep=keep, energy=None, allocation="global")
    budget = keep * adapter.parameters
    assert best.parameters <= budget
    assert best.layers[loud].rank == 8
    assert all(pair.rank >= 1 for pair in best.layers.values())

    def loss(small) -> float:
        return sum(np.linalg.norm(product(p) - product(adapter.layers[n])) ** 2 for n, p in small.layers.items())

    assert loss(best) < loss(even) or even.parameters > budget


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_energy_allocation_spends_the_same_and_leaves_layers_alike(adapter, keep):
    """Layers of one loudness or another keep the same share of their energy, so far as ranks allow."""
    steep = {
        n: type(p)(p.a * (0.5 + i % 3 / 4) ** np.arange(8, dtype=np.float32)[:, None], p.b * 10**i)
        for i, (n, p) in enumerate(adapter.layers.items())
    }
    adapter = replace(adapter, layers=steep)
    small = truncate(adapter, keep=keep, energy=None, allocation="energy")
    assert small.parameters <= max(keep, 1 / 8) * adapter.parameters * (1 + 1e-6)
    assert len({p.rank for p in small.layers.values()}) > 1
    before, after = [], []
    for name, pair in small.layers.items():
        shares = np.cumsum(spectrum(adapter.layers[name]) ** 2)
        before.append(([0.0, *shares])[pair.rank - 1] / shares[-1])
        after.append(shares[pair.rank - 1] / shares[-1])
    # The first that was left out, of any layer, has no less before it than the last that was taken, of any other one.
    assert max(b for b, p in zip(before, small.layers.values(), strict=True) if p.rank > 1) <= min(
        (s for s, p in zip(after, small.layers.values(), strict=True) if p.rank < 8), default=1.0
    )


def test_an_untrained_layer_keeps_rank_one(adapter):
    zero = {n: type(p)(p.a, np.zeros_like(p.b)) for n, p in adapter.layers.items()}
    small = truncate(replace(adapter, layers=zero), keep=None, energy=0.9)
    assert {p.rank for p in small.layers.values()} == {1}
    assert all(np.isfinite(p.a).all() and not product(p).any() for p in small.layers.values())


def root(moment: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


@pytest.mark.parametrize("metric", ["activations", "gradients"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_error_is_the_least_possible_in_the_measured_metric(adapter, metric, rank, monkeypatch):
    """Against the SVD of the whole product between the square roots of the full second moments."""
    monkeypatch.setattr(module, "_DAMPING", 0.0)
    rng = np.random.default_rng(4)
    calibration, weights = {}, {}
    for name, pair in adapter.layers.items():
        uneven = np.exp(rng.normal(size=(pair.a.shape[1], 1)))
        x, g = uneven * rng.normal(size=(pair.a.shape[1], 300)), rng.normal(size=(pair.b.shape[0], 300))
        z, gz = pair.a @ x, pair.b.T @ g
        calibration[name] = Grams((z @ z.T / 300).astype(np.float32), (gz @ gz.T / 300).astype(np.float32))
        left = root(g @ g.T / 300) if metric == "gradients" else np.eye(len(g))
        weights[name] = (left, root(x @ x.T / 300))
    small = truncate(adapter, keep=rank / 8, energy=None, metric=metric, calibration=calibration)
    plain = truncate(adapter, keep=rank / 8, energy=None)
    for name, pair in small.layers.items():
        left, right = weights[name]
        whole = product(adapter.layers[name])
        exact = np.linalg.svd(left @ whole @ right, compute_uv=False)
        least = np.sqrt((exact[rank:] ** 2).sum())
        assert np.linalg.norm(left @ (product(pair) - whole) @ right) == pytest.approx(least, rel=1e-3)
        assert np.linalg.norm(left @ (product(plain.layers[name]) - whole) @ right) > least
        assert spectrum(adapter.layers[name], metric, calibration[name]) == pytest.approx(exact[:8], rel=1e-3)


@pytest.mark.parametrize("metric", ["activations", "gradients"])
def test_what_was_never_excited_is_dropped_first_and_costs_nothing_else(adapter, metric):
    silent = np.diag([1.0] * 4 + [0.0] * 4).astype(np.float32)
    calibration = {n: Grams(silent, np.eye(8, dtype=np.float32)) for n in adapter.layers}
    small = truncate(adapter, keep=0.5, energy=None, metric=metric, calibration=calibration)
    for name, pair in small.layers.items():
        whole = adapter.layers[name]
        loud = whole.b[:, :4].astype(np.float64) @ whole.a[:4]
        heard = product(pair) @ np.linalg.pinv(whole.a)[:, :4]  # the product on inputs that excite one loud component
        assert np.linalg.norm(heard - loud @ np.linalg.pinv(whole.a)[:, :4]) < 0.2 * np.linalg.norm(whole.b[:, :4])


def test_a_metric_without_a_calibration_of_this_adapter_is_refused(adapter):
    wrong = {n: Grams(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)) for n in adapter.layers}
    for calibration, said in ((None, "needs a calibration"), ({}, "needs a calibration"), (wrong, "another adapter")):
        with pytest.raises(DataError, match=said):
            truncate(adapter, keep=0.5, energy=None, metric="gradients", calibration=calibration)


def test_moments_of_zero_fall_back_to_the_matrix(adapter):
    silent = {n: Grams(np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)) for n in adapter.layers}
    small = truncate(adapter, keep=1.0, energy=None, metric="gradients", calibration=silent)
    assert all(np.isfinite(p.a).all() and np.isfinite(p.b).all() for p in small.layers.values())
