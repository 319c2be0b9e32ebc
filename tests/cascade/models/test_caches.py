"""Room for keys and values: what is taken, and what is given back."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from cascade.models.caches import RowCache


def filled(rows: int, columns: int) -> RowCache:
    cache, states = RowCache(1), torch.rand(rows, 1, columns, 1)
    cache.add(DynamicCache([(states, states)]))
    return cache


def taken(cache: RowCache) -> int:
    """Tokens that there is memory for."""
    return cache.row_layers[0].keys.numel()


def test_the_last_of_many_rows_does_not_grow_with_the_room_of_all() -> None:
    cache = filled(rows=8, columns=200)
    first = cache.row_layers[0].keys[2, 0, :200].clone()
    cache.keep([2])
    for _ in range(2000):
        one = torch.rand(1, 1, 1, 1)
        cache.row_layers[0].update(one, one)
        assert taken(cache) <= max(8 * 300, 2 * cache.used)
    assert torch.equal(cache.row_layers[0].keys[0, 0, :200], first)


def test_rows_that_left_have_room_to_come_back_to() -> None:
    cache = filled(rows=8, columns=200)
    cache.keep([0, 1, 2, 3, 4])
    cache.reserve(5, 1000)
    before = cache.version
    cache.add(DynamicCache([(torch.rand(3, 1, 5, 1), torch.rand(3, 1, 5, 1))]))
    assert cache.version == before


def test_no_two_caches_have_a_version_in_common() -> None:
    seen: set[int] = set()
    for _ in range(2):
        cache = filled(rows=2, columns=10)
        for columns in (100, 1000):
            cache.reserve(2, columns)
            assert cache.version not in seen
            seen.add(cache.version)
