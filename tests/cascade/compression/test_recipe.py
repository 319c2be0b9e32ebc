"""Recipes, the compressed adapter, sizes and the search space."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, fp16_bytes
from cascade.compression.format import save_modifier
from cascade.compression.packed import expanded_sha256
from cascade.compression.prune import GROUPS
from cascade.compression.recipe import (
    Prune,
    Recipe,
    Truncate,
    compress,
    density_for,
    disk_bytes,
    expand,
    limits,
    projection,
    recipe_from,
    resident_bytes,
    search_space,
    seed_points,
)
from cascade.compression.truncate import Grams
from cascade.config import Compression
from cascade.errors import ConfigError, DataError, FormatError
from cascade.training.seeded_init import initial_lora_a


def draw(data) -> dict:
    space = search_space(Compression(max_resident_ratio=1.0))
    return {
        name: data.draw(st.sampled_from(kind[1]) if kind[0] == "choice" else st.floats(kind[1], kind[2]), label=name)
        for name, kind in space.items()
    }


@pytest.fixture
def big():
    """Large enough for the header to be small: 24 layers of 1024 x 1024, rank 16."""
    rng = np.random.default_rng(1)
    layers = {}
    for i in range(24):
        name = f"model.layers.{i}.self_attn.q_proj"
        a = initial_lora_a(5, name, 16, 1024) + rng.normal(scale=0.004, size=(16, 1024)).astype(np.float32)
        layers[name] = LoraPair(a, rng.normal(scale=0.01, size=(1024, 16)).astype(np.float32))
    return AdapterWeights(layers, 2.0, 16, BaseRef("big", "d" * 64), ("q_proj",), 5)


def test_the_empty_recipe_loses_only_fp16_rounding(adapter):
    back = expand(compress(adapter, Recipe()))
    for name, pair in adapter.layers.items():
        start = adapter.start(name)
        change = pair.a - start
        assert np.abs(back.layers[name].a - pair.a).max() <= np.abs(change).max() * 2**-10
        assert np.abs(back.layers[name].b - pair.b).max() <= np.abs(pair.b).max() * 2**-11
    assert (back.scaling, back.rank, back.base, back.init_seed) == (2.0, 8, adapter.base, 5)


def test_pruning_works_on_the_change_of_a(adapter, foreign):
    recipe = Recipe(prune=Prune(density_a=0.1, density_b=0.2, scope="layer", rescale_a=2.0, rescale_b=3.0))
    back = expand(compress(adapter, recipe))
    for name, pair in back.layers.items():
        change = pair.a - adapter.start(name)
        kept = np.abs(change) > 1e-5
        assert kept.mean() == pytest.approx(0.1, abs=0.01)
        whole = adapter.layers[name].a - adapter.start(name)
        assert np.allclose(change[kept], 2 * whole[kept], rtol=2e-3, atol=1e-6)
        assert np.count_nonzero(pair.b) / pair.b.size == pytest.approx(0.2, abs=0.01)
        nonzero = pair.b != 0
        assert np.allclose(pair.b[nonzero], 3 * adapter.layers[name].b[nonzero], rtol=1e-3)
    without_start = expand(compress(foreign, recipe))
    assert all(np.count_nonzero(p.a) / p.a.size == pytest.approx(0.1, abs=0.01) for p in without_start.layers.values())


def test_expansion_is_the_same_every_time_and_its_hash_is_checked(adapter):
    compressed = compress(adapter, recipe_from({"method": "sparse", "values": "int4", "size": 0.2}))
    one, two = expand(compressed), expand(compressed)
    assert all(
        np.array_equal(p.a, two.layers[n].a) and np.array_equal(p.b, two.layers[n].b) for n, p in one.layers.items()
    )
    assert expanded_sha256(compressed) == compressed.expanded_sha256
    for changed in (
        replace(compressed, init_seed=6),
        replace(compressed, b=replace(compressed.b, values=compressed.b.values ^ np.uint8(1))),
    ):
        with pytest.raises(FormatError, match="other numbers"):
            expand(changed)


def test_densities_of_layers(adapter):
    compressed = compress(adapter, Recipe(prune=Prune(density_a=0.1, density_b=0.3, scope="layer")))
    assert compressed.density("model.layers.1.mlp.up_proj") == pytest.approx((0.1, 0.3), abs=0.01)


def test_sizes(adapter, tmp_path: Path):
    pruned = compress(adapter, recipe_from({"method": "sparse"}))
    assert disk_bytes(pruned) == save_modifier(tmp_path / "m", pruned) == (tmp_path / "m").stat().st_size
    assert resident_bytes(pruned) == 2 * adapter.parameters
    half = compress(adapter, Recipe(truncate=Truncate(keep=0.5)))
    assert resident_bytes(half) == adapter.parameters
    assert resident_bytes(half, bytes_per_number=4) == 2 * adapter.parameters
    assert resident_bytes(half) == 2 * expand(half).parameters
    few_bits = compress(adapter, Recipe(truncate=Truncate(keep=0.5), values="int4", group=16))
    factors = [array.size for pair in expand(few_bits).layers.values() for array in (pair.a, pair.b)]
    assert resident_bytes(few_bits) == sum(math.ceil(n / 16) * (16 + 2) for n in factors)


@pytest.mark.parametrize("bytes_per_number", [2, 4])
@given(data=st.data(), resident=st.floats(0.1, 1.0))
@settings(max_examples=25, deadline=None)
def test_what_saves_memory_keeps_the_limit_of_memory(bytes_per_number, data, resident):
    params = draw(data) | {"method": data.draw(st.sampled_from(["low-rank", "rotated"]))}
    wide = _tiny(rank=40)
    recipe = recipe_from(params, resident=resident, bytes_per_number=bytes_per_number)
    compressed = compress(wide, recipe, plain_moments(wide))
    held = resident_bytes(compressed, bytes_per_number=bytes_per_number)
    assert held <= resident * fp16_bytes(wide) + 3 * 2 * (64 + 4)  # a group of each factor may be filled up


def test_pruning_alone_is_searched_only_where_memory_is_free():
    def methods(**settings) -> list[str]:
        return search_space(Compression(**settings))["method"][1]

    assert methods() == ["low-rank", "rotated"]
    assert methods(max_resident_ratio=1.0) == ["low-rank", "rotated", "sparse"]


def test_numbers_that_are_not_finite_are_refused(adapter):
    layers = dict(adapter.layers)
    name = next(iter(layers))
    layers[name] = LoraPair(layers[name].a, np.full_like(layers[name].b, np.nan))
    with pytest.raises(DataError, match="not finite"):
        compress(replace(adapter, layers=layers), Recipe())


@pytest.mark.parametrize("scale", [1e-9, 1e7])
def test_very_small_and_very_large_adapters_keep_their_numbers(adapter, scale):
    layers = {n: LoraPair(p.a, p.b * np.float32(scale)) for n, p in adapter.layers.items()}
    for values in ("fp16", "int8"):
        back = expand(compress(replace(adapter, layers=layers), Recipe(values=values)))
        for name, pair in layers.items():
            assert np.abs(back.layers[name].b - pair.b).max() <= np.abs(pair.b).max() / 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"truncate": {}},
        {"truncate": {"keep": 0.5, "energy": 0.5}},
        {"truncate": {"energy": 0.5, "allocation": "global"}},
        {"truncate": {"keep": 0.0}},
        {"prune": {"density_a": 0.1}},
        {"prune": {"density_a": 1.5, "density_b": 0.1}},
        {"prune": {"density_a": 0.1, "density_b": 0.1, "rescale_b": -1}},
        {"prune": {"density_a": 0.1, "density_b": 0.1, "scope": "layer", "weights": {"mlp-late": 2}}},
        {"prune": {"density_a": 0.1, "density_b": 0.1, "weights": {"mlp-end": 2}}},
        {"values": "int3"},
        {"group": 0},
        {"quantize": "int4"},
    ],
)
def test_recipes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        Recipe.model_validate(wrong)


@given(st.data())
def test_every_point_of_the_space_is_a_recipe_that_survives_json(data):
    recipe = recipe_from(draw(data))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_point_round_trips_through_compression(data):
    adapter = _tiny()
    compressed = compress(adapter, recipe_from(draw(data)), plain_moments(adapter))
    back = expand(compressed)
    assert back.layers.keys() == adapter.layers.keys()
    for name, pair in back.layers.items():
        assert (pair.a.shape[1], pair.b.shape[0]) == (adapter.layers[name].a.shape[1], adapter.layers[name].b.shape[0])
        assert np.isfinite(pair.a).all()
        assert np.isfinite(pair.b).all()


def _tiny(rank: int = 5) -> AdapterWeights:
    rng = np.random.default_rng(2)
    layers = {
        f"model.layers.{i}.mlp.up_proj": LoraPair(
            rng.normal(size=(rank, 48)).astype(np.float32), rng.normal(size=(80, rank)).astype(np.float32)
        )
        for i in range(3)
    }
    return AdapterWeights(layers, 1.0, rank, BaseRef(), ("up_proj",), 5)


def plain_moments(adapter: AdapterWeights) -> dict[str, Grams]:
    """A calibration that found all components alike."""
    return {n: Grams(*[np.eye(p.rank, dtype=np.float32)] * 2) for n, p in adapter.layers.items()}


def test_unknown_parameters_are_refused():
    with pytest.raises(ConfigError, match="sparsity"):
        recipe_from({"sparsity": 0.5})


@pytest.mark.parametrize("ratio", [48 / 260, 0.05])
def test_seed_points_lie_in_the_space_and_meet_its_size(big, ratio):
    compression = Compression(max_ratio=ratio)
    space = search_space(compression)
    points = seed_points(compression)
    assert len(points) >= 5
    for point in points:
        assert point.keys() == space.keys()
        for name, kind in space.items():
            assert point[name] in kind[1] if kind[0] == "choice" else kind[1] <= point[name] <= kind[2]
        compressed = compress(big, recipe_from(point, resident=48 / 260), plain_moments(big))
        size, aim = disk_bytes(compressed), point["size"] * fp16_bytes(big)
        if point["method"] == "low-rank":  # in steps of a sixteenth here, and never below one
            assert size < max(1.1 * aim, fp16_bytes(big) / 14)
        else:
            assert 0.9 * aim < size < 1.1 * aim + 3000  # the header
        if ratio > 0.1:
            assert size <= limits(big, compression).disk
            assert resident_bytes(compressed) <= limits(big, compression).resident


def test_limits(big):
    full = fp16_bytes(big)
    assert limits(big, Compression(max_ratio=0.1)).disk == math.floor(0.1 * full)
    assert limits(big, Compression(max_ratio=0.1, target_bytes=1000)).disk == 1000
    assert limits(big, Compression(max_ratio=0.1, target_bytes=full)).disk == math.floor(0.1 * full)
    assert limits(big, Compression()).resident == math.floor(48 / 260 * full)
    assert limits(big, Compression(max_resident_ratio=0.5, target_bytes=1000)).resident == math.floor(0.5 * full)
    bounded = search_space(Compression(target_bytes=full // 20), adapter=big)["size"]
    assert bounded[2] == pytest.approx(0.96 / 20, rel=1e-3)


@given(st.floats(0.1, 8), st.sampled_from(["fp16", "int8", "int4", "ternary"]))
def test_more_bits_buy_a_higher_density(bits, values):
    assert 0.005 <= density_for(bits, values) <= density_for(bits * 1.5, values) <= 0.9


def test_group_weights_reach_the_recipe():
    recipe = recipe_from({"method": "rotated", "mlp": 2.0, "late": 0.5})
    assert recipe.prune is not None
    assert recipe.prune.weights == {
        g: w
        for g in GROUPS
        if (w := (2.0 if g.startswith("mlp") else 1.0) * (0.5 if g.endswith("late") else 1.0)) != 1.0
    }


@pytest.mark.parametrize("density", [0.03, 0.12, 0.4, 0.9])
def test_projection_keeps_what_the_original_has_in_its_own_direction(density):
    x = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    kept = np.where(np.abs(x) >= np.quantile(np.abs(x), 1 - density), x, 0)
    assert projection(density) * float(kept @ x) == pytest.approx(float(x @ x), rel=0.01)


def test_rescaling_follows_the_density():
    def factors(**params: float) -> tuple[float, float]:
        prune = recipe_from({"method": "rotated", "values": "int4", **params}).prune
        assert prune is not None
        return prune.rescale_a, prune.rescale_b

    assert factors(size=0.1, rescale_a=0.0, rescale_b=0.0) == (1.0, 1.0)
    thin, thick = factors(size=0.05), factors(size=0.15)
    assert thin[0] > thick[0] > 1
    assert factors(size=0.05, rescale_a=2.0)[0] == pytest.approx(thin[0] ** 2)
