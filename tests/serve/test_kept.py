"""What is kept of prompts: found by those that begin alike, under the same version alone, and never without bound."""

from __future__ import annotations

import torch

from cascade.models.caches import Prefix
from serve.kept import Kept

A, B = ("letters", "v1"), ("sums", "v1")


def prefix(tokens, mark=0.0):
    """Four bytes a token and factor."""
    states = torch.full((1, 1, len(tokens), 1), mark)
    return Prefix(tuple(tokens), ((states, states.clone()),))


def test_the_longest_beginning_is_found_without_the_last_token():
    kept = Kept(10_000)
    kept.keep(A, prefix(range(20)))
    kept.keep(A, prefix([*range(30), 99]))
    assert kept.find(A, [*range(25), 7, 7]).tokens == tuple(range(25))
    assert kept.find(A, range(30)).tokens == tuple(range(29))
    assert kept.find(A, range(5, 40)) is None
    assert kept.find(A, range(7)) is None


def test_it_never_crosses_versions():
    kept = Kept(10_000)
    kept.keep(A, prefix(range(20), mark=1.0))
    assert kept.find(B, range(20)) is None
    assert kept.find(("letters", "v2"), range(20)) is None
    kept.keep(B, prefix(range(20), mark=2.0))
    assert kept.find(A, range(20)).states[0][0].unique().tolist() == [1.0]
    assert kept.find(B, range(20)).states[0][0].unique().tolist() == [2.0]
    kept.retain({B})
    assert kept.find(A, range(20)) is None
    assert kept.nbytes == prefix(range(20)).nbytes


def test_bytes_are_bounded_and_the_least_used_goes_first():
    kept = Kept(3 * prefix(range(20)).nbytes)
    for start in (0, 100, 200):
        kept.keep(A, prefix(range(start, start + 20)))
    kept.find(A, range(20))
    kept.keep(A, prefix(range(300, 320)))
    assert kept.find(A, range(100, 120)) is None
    assert kept.find(A, range(20)) is not None
    kept.keep(A, prefix(range(1000)))
    assert kept.nbytes == 3 * prefix(range(20)).nbytes


def test_a_longer_sequence_takes_the_place_of_what_it_goes_on_from():
    kept = Kept(10_000)
    kept.keep(A, prefix(range(20)))
    kept.keep(A, prefix(range(30)))
    kept.keep(A, prefix(range(10)))
    assert kept.nbytes == prefix(range(30)).nbytes
