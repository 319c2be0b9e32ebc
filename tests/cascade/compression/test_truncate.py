"""Truncation is the best approximation of its rank (checked against the SVD of the full product)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cascade.compression.truncate import product_spectrum, product_svd, truncate


def product(pair) -> np.ndarray:
    return pair.b.astype(np.float64) @ pair.a.astype(np.float64)


def test_svd_of_the_product_without_forming_it(adapter):
    for pair in list(adapter.layers.values())[:5]:
        u, s, vt = product_svd(pair)
        exact = np.linalg.svd(product(pair), compute_uv=False)[: s.size]
        assert np.allclose(s, exact, rtol=1e-10)
        assert np.allclose(product_spectrum(pair), s, rtol=1e-10)
        assert np.allclose((u * s) @ vt, product(pair), atol=1e-12)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.13, 0.01])
def test_error_is_the_least_possible(adapter, keep):
    small = truncate(adapter, keep=keep, energy=None)
    rank = max(1, int(keep * 8))
    assert small.init_seed is None
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


def test_an_untrained_layer_keeps_rank_one(adapter):
    zero = {n: type(p)(p.a, np.zeros_like(p.b)) for n, p in adapter.layers.items()}
    small = truncate(replace(adapter, layers=zero), keep=None, energy=0.9)
    assert {p.rank for p in small.layers.values()} == {1}
    assert all(np.isfinite(p.a).all() and not product(p).any() for p in small.layers.values())
