"""Groups of sequences that begin alike, against trying every way to group them."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.models import beginnings
from cascade.models.beginnings import Group, shared_beginnings

COST, SHORTEST = beginnings.COST, beginnings._SHORTEST


def saved(groups):
    return sum((len(g.members) - 1) * g.length - COST for g in groups if g.length)


def best(sequences):
    """The most that can be saved, by going through the whole tree of common beginnings."""

    @cache
    def of(members, depth):
        if len(members) < 2:
            return 0
        length = depth
        while len({s[: length + 1] for s in members}) == 1 and len(members[0]) > length:
            length += 1
        usable = length - (length == min(map(len, members)))
        whole = (len(members) - 1) * usable - COST if usable >= SHORTEST else 0
        parts = {}
        for s in members:
            parts.setdefault(s[: length + 1] if len(s) > length else None, []).append(s)
        parts.pop(None, None)  # these end here: nothing longer is theirs
        return max(whole, 0, sum(of(tuple(p), length) for p in parts.values()))

    return of(tuple(sorted(tuple(s) for s in sequences)), 0)


# Sequences over few blocks, so that long common beginnings, whole repeats and beginnings of others all come up.
BLOCKS = {"a": [1] * 20, "b": [2] * 50, "c": [3] * 90, "d": [4], "e": [5] * 3}
SEQUENCES = st.lists(st.text("abcde", min_size=1, max_size=5), max_size=14).map(
    lambda names: [[t for letter in name for t in BLOCKS[letter]] for name in names]
)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES)
def test_the_most_is_saved(sequences):
    groups = shared_beginnings(sequences)
    assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
    for group in groups:
        chosen = [sequences[i] for i in group.members]
        assert len({tuple(s[: group.length]) for s in chosen}) == 1
        assert all(len(s) > group.length for s in chosen)
        assert group.length == 0 or group.length >= SHORTEST
    assert saved(groups) == best(sequences)


def test_what_little_is_shared_is_not_worth_a_group():
    assert shared_beginnings([[1, 2, 3], [1, 2, 4]]) == [Group(0, (0, 1))]
    assert shared_beginnings([]) == []


def test_longer_beginnings_of_parts_are_preferred_where_they_save_more():
    system = [1] * 30
    families = [[*system, *[k] * 200, 9 + i] for k in (2, 3) for i in range(4)]
    assert sorted(g.length for g in shared_beginnings(families)) == [230, 230]
    assert [g.length for g in shared_beginnings([[*system, k, *[k] * 5] for k in range(2, 12)])] == [30]


def test_chains_of_any_depth_are_grouped():
    groups = shared_beginnings([[7] * n for n in range(20, 3000)])
    assert sorted(i for g in groups for i in g.members) == list(range(2980))
    assert saved(groups) > 0


def test_where_groups_are_dear_only_large_ones_are_made():
    sequences = [(family, *range(40), own) for family in range(3) for own in range(2 + 8 * (family == 1))]
    assert [g.length for g in shared_beginnings(sequences, 0)] == [41, 41, 41]
    assert [(g.length, len(g.members)) for g in shared_beginnings(sequences, 300)] == [(41, 10), (0, 4)]
