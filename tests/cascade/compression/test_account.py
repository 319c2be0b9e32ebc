"""What compression did: per layer and per stage."""

from __future__ import annotations

import pytest

from cascade.compression.account import layer_shares, stages_of
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.packed import compress
from cascade.compression.recipe import Prune, Recipe, Truncate, disk_bytes


def test_every_layer_has_its_rank_and_densities(adapter):
    recipe = Recipe(truncate=Truncate(keep=0.5), prune=Prune(density_a=0.25, density_b=0.5, scope="layer"))
    shares = layer_shares(adapter, compress(adapter, recipe))
    assert len(shares) == len(adapter.layers)
    assert {(s.block, s.module) for s in shares} >= {(0, "q_proj"), (2, "down_proj")}
    for share in shares:
        assert (share.full_rank, share.rank) == (8, 4)
        assert share.density_a == pytest.approx(0.25, abs=0.01)
        assert share.density_b == pytest.approx(0.5, abs=0.01)


def test_a_layer_outside_of_the_blocks_has_none(adapter):
    pair = next(iter(adapter.layers.values()))
    layers = {name: LoraPair(pair.a, pair.b) for name in ("lm_head", "h.3.mlp.c_fc", "model.layers.11.q_proj")}
    lone = AdapterWeights(layers, 1.0, 8, BaseRef(), tuple(layers))
    shares = layer_shares(lone, compress(lone, Recipe()))
    assert [(s.block, s.module) for s in shares] == [(-1, "lm_head"), (3, "c_fc"), (11, "q_proj")]


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        (Recipe(), ["fp16"]),
        (Recipe(values="int4"), ["quantised"]),
        (Recipe(truncate=Truncate(keep=0.5)), ["truncated"]),
        (Recipe(truncate=Truncate(energy=0.9), values="int8"), ["truncated", "quantised"]),
        (Recipe(truncate=Truncate(keep=1.0), prune=Prune(density_a=0.2, density_b=0.2)), ["pruned"]),
        (
            Recipe(truncate=Truncate(keep=0.5), prune=Prune(density_a=0.2, density_b=0.2), values="int4"),
            ["truncated", "pruned", "quantised"],
        ),
    ],
)
def test_stages_end_with_the_whole_recipe(adapter, recipe, stages):
    found = stages_of(recipe)
    assert [name for name, _ in found] == stages
    assert found[-1][1] == recipe
    sizes = [disk_bytes(compress(adapter, cut)) for _, cut in found]
    assert sizes == sorted(sizes, reverse=True)
