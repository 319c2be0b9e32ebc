"""Recipes, the compressed adapter, sizes and the search space."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade.compression.account import layer_shares
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, fp16_bytes
from cascade.compression.decoding import expanded_sha256
from cascade.compression.format import save_modifier
from cascade.compression.prune import GROUPS
from cascade.compression.recipe import (
    Prune,
    Recipe,
    Room,
    Truncate,
    compress,
    density_for,
    disk_bytes,
    expand,
    limits,
    matters,
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


def test_truncated_layers_are_packed_one_by_one(big):
    truncated = 4 * big.parameters  # in float32
    tracemalloc.start()
    try:
        compress(big, Recipe(truncate=Truncate(keep=1.0), values="int8"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < truncated


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
    compressed = compress(adapter, recipe_from({"method": "sparse", "values": "int4"}))
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
    for share in layer_shares(adapter, compressed):
        assert (share.density_a, share.density_b) == pytest.approx((0.1, 0.3), abs=0.01)


def test_sizes(adapter, tmp_path: Path):
    pruned = compress(adapter, recipe_from({"method": "sparse"}))
    assert disk_bytes(pruned) == save_modifier(tmp_path / "m", pruned) == (tmp_path / "m").stat().st_size
    assert resident_bytes(pruned) == 2 * adapter.parameters
    half = compress(adapter, Recipe(truncate=Truncate(keep=0.5)))
    assert resident_bytes(half) == adapter.parameters
    assert resident_bytes(half, bytes_per_number=4) == 2 * adapter.parameters
    assert resident_bytes(half) == 2 * expand(half).parameters
    few_bits = compress(adapter, Recipe(truncate=Truncate(keep=0.5), values="int4", group=16))
    pairs = expand(few_bits).layers.values()
    groups = sum(2 * math.ceil((math.ceil(p.a.size / 16) + math.ceil(p.b.size / 16)) / 2) for p in pairs)
    assert resident_bytes(few_bits) == math.ceil(2 * groups / 64) * 64 + 8 * groups  # half a byte, and an fp16 scale
    assert resident_bytes(few_bits, bytes_per_number=4) == resident_bytes(few_bits)


@pytest.mark.parametrize("bytes_per_number", [2, 4])
@given(data=st.data(), resident=st.floats(0.1, 1.0))
@settings(max_examples=25, deadline=None)
def test_what_saves_memory_keeps_the_limit_of_memory(bytes_per_number, data, resident):
    params = draw(data) | {"method": data.draw(st.sampled_from(["low-rank", "rotated"]))}
    wide = _tiny(rank=40)
    recipe = recipe_from(params, Room(1.0, resident, bytes_per_number, wide.rank))
    compressed = compress(wide, recipe, plain_moments(wide))
    held = resident_bytes(compressed, bytes_per_number=bytes_per_number)
    assert held <= resident * fp16_bytes(wide) + 3 * 3 * (128 + 2) + 64  # groups of each factor may be filled up


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
    one = np.ones
    return {
        n: Grams(*[np.eye(p.rank, dtype=np.float32)] * 2, one(p.a.shape[1], np.float32), one(p.b.shape[0], np.float32))
        for n, p in adapter.layers.items()
    }


def test_unknown_parameters_are_refused():
    with pytest.raises(ConfigError, match="sparsity"):
        recipe_from({"sparsity": 0.5})


@pytest.mark.parametrize("ratio", [48 / 260, 0.05])
def test_seed_points_lie_in_the_space_and_within_its_limits(big, ratio):
    compression = Compression(max_ratio=ratio)
    space, bounds = search_space(compression), limits(big, compression)
    points = seed_points(compression)
    assert len(points) >= 5
    for point in points:
        assert point.keys() == space.keys()
        for name, kind in space.items():
            assert point[name] in kind[1] if kind[0] == "choice" else kind[1] <= point[name] <= kind[2]
        compressed = compress(big, recipe_from(point, Room.of(big, bounds)), plain_moments(big))
        assert disk_bytes(compressed) <= max(bounds.disk, fp16_bytes(big) / 14)  # one rank of sixteen at least
        assert resident_bytes(compressed) <= max(bounds.resident, fp16_bytes(big) / 16)


@pytest.mark.parametrize("resident", [0.05, 48 / 260, 0.5, 0.7, 1.0])
def test_seed_points_and_corners_are_recipes_whatever_the_limits(resident):
    for ratio, rank, int8 in product((0.001, 48 / 260, 0.55, 0.7, 0.85, 1.0), (1, 8, 64, 96), (False, True)):
        compression = Compression(max_ratio=ratio, max_resident_ratio=resident)
        room = Room(0.96 * ratio, resident, 2, rank, int8)
        for point in (*seed_points(compression), *corners(search_space(compression))):
            recipe_from(point, room)  # which refuses what it may not be


def corners(space):
    """Of what decides how many bits there are and what they buy; the other numbers go along with `balance`."""
    for method, values, group in product(*(space[name][1] for name in ("method", "values", "group"))):
        for size, end in product((0.0, 1.0), (1, 2)):
            numbers = {name: kind[end] for name, kind in space.items() if kind[0] == "uniform"}
            yield numbers | {"method": method, "values": values, "group": group, "size": size}


@pytest.mark.parametrize("rank", [64, 128])
def test_beside_a_base_in_8_bits_seed_points_leave_room_for_what_fills_up(rank):
    rng, layers = np.random.default_rng(2), {}
    for i in range(12):
        fall = np.exp(-np.arange(rank) * rng.uniform(1, 3) / rank).astype(np.float32)
        a, b = (rng.normal(size=(rank, 256)).astype(np.float32) for _ in "ab")
        layers[f"model.layers.{i}.mlp.up_proj"] = LoraPair(fall[:, None] * a, b.T.copy())
    adapter = AdapterWeights(layers, 2.0, rank, BaseRef(), ("up_proj",))
    bounds = limits(adapter, Compression())
    for point in seed_points():
        recipe = recipe_from(point | {"metric": "weights"}, Room.of(adapter, bounds, int8=True))
        assert resident_bytes(compress(adapter, recipe), int8=True) <= bounds.resident


@given(st.data())
def test_no_two_sizes_are_the_same_recipe(data):
    """Each size gives more than a smaller one, whatever method and format: none is cut off at what they reach."""
    params = draw(data)
    resident, bytes_per_number = data.draw(st.sampled_from([48 / 260, 0.5, 1.0])), data.draw(st.sampled_from([2, 4]))
    room = Room(0.96 * data.draw(st.sampled_from([48 / 260, 1 / 16])), resident, bytes_per_number, rank=96)
    spent = [_spent(recipe_from(params | {"size": n / 8}, room)) for n in range(9)]
    assert all(more > 1.01 * less for less, more in pairwise(spent))


@settings(deadline=None)
@given(st.data())
def test_what_matters_makes_another_recipe_and_what_does_not_makes_none(data):
    params = draw(data)
    space, other = search_space(Compression(max_resident_ratio=1.0)), draw(data)
    recipe, names = recipe_from(params), matters(params)
    idle = {n: other[n] for n in space.keys() - names}
    assert recipe_from(params | idle) == recipe
    # At its ends `size` leaves nothing to balance; the weights of groups are three more ways to say the same.
    for name in names - {"method", "balance", "mlp", "early", "late"}:
        low, high = space[name][1:] if space[name][0] == "uniform" else (None, None)
        middle = (low + high) / 2 if high is not None else None
        values = [v for v in space[name][1] if v != params[name]] if high is None else [low, high, middle]
        assert any(recipe_from(params | {name: value}) != recipe for value in values), name


def _spent(recipe: Recipe) -> float:
    """What of the adapter's numbers is left."""
    left = recipe.truncate.keep or 0.0 if recipe.truncate else 1.0
    return left if recipe.prune is None else left * (recipe.prune.density_a + recipe.prune.density_b)


@pytest.mark.parametrize(("method", "values"), [("low-rank", "int8"), ("rotated", "int4"), ("low-rank", "fp16")])
def test_the_largest_size_is_as_large_as_a_limit_allows(big, method, values):
    """Where neither limit is met, all is kept."""
    for ratio in (48 / 260, 0.03):
        bounds = limits(big, Compression(max_ratio=ratio))
        point = {"method": method, "values": values, "size": 1.0}
        recipe = recipe_from(point, Room.of(big, bounds))
        compressed = compress(big, recipe)
        on_disk, held = disk_bytes(compressed) / bounds.disk, resident_bytes(compressed) / bounds.resident
        whole = recipe.prune is not None and recipe.prune.density_a > 0.89
        rank_left = 1 / (recipe.truncate.keep * big.rank)  # of a layer; a rank too much is cut off
        assert max(on_disk, held) >= 0.9 - rank_left or whole, (on_disk, held)


def test_limits(big):
    full = fp16_bytes(big)
    assert limits(big, Compression(max_ratio=0.1)).disk == math.floor(0.1 * full)
    assert limits(big, Compression(max_ratio=0.1, target_bytes=1000)).disk == 1000
    assert limits(big, Compression(max_ratio=0.1, target_bytes=full)).disk == math.floor(0.1 * full)
    assert limits(big, Compression()).resident == math.floor(48 / 260 * full)
    assert limits(big, Compression(max_resident_ratio=0.5, target_bytes=1000)).resident == math.floor(0.5 * full)
    room = Room.of(big, limits(big, Compression(target_bytes=full // 20)))
    assert (room.disk, room.resident, room.rank) == (
        pytest.approx(0.96 / 20, rel=1e-3),
        pytest.approx(48 / 260, rel=1e-3),
        16,
    )


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


def test_weights_of_groups_go_with_one_threshold_for_all():
    for scope in ("layer", "group"):
        recipe = recipe_from({"method": "rotated", "mlp": 2.0, "scope": scope})
        assert recipe.prune is not None
        assert (recipe.prune.scope, recipe.prune.weights) == (scope, {})


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_rescaling_follows_what_a_layer_has_kept(adapter, power):
    """At power 1 so much of the original is left in its own direction, layer by layer."""
    how = {"density_a": 0.1, "density_b": 0.2}
    plain = expand(compress(adapter, Recipe(prune=Prune(**how))))
    back = expand(compress(adapter, Recipe(prune=Prune(**how, power_a=power, power_b=power))))
    kept_shares = set()
    for name, pair in back.layers.items():
        start, whole = adapter.start(name), adapter.layers[name]
        for before, now, unscaled in (
            (whole.a - start, pair.a - start, plain.layers[name].a - start),
            (whole.b, pair.b, plain.layers[name].b),
        ):
            energy = float((unscaled.ravel() ** 2).sum() / (before.ravel() ** 2).sum())
            kept_shares.add(round(energy, 3))
            assert np.allclose(now, unscaled * energy**-power, rtol=2e-2, atol=1e-5)
            if power == 1:
                assert float(now.ravel() @ before.ravel()) == pytest.approx(float((before**2).sum()), rel=0.02)
    assert len(kept_shares) > 4, "layers differ"


def test_measured_pruning_keeps_what_matters_to_outputs_and_loss(adapter):
    """Of numbers that are alike in size, those whose input is silent, or that nobody hears, go."""
    silent = plain_moments(adapter)
    name, pair = next(iter(adapter.layers.items()))
    features, effects = np.ones(pair.a.shape[1], np.float32), np.ones(pair.b.shape[0], np.float32)
    features[::2] = 1e-6
    effects[::2] = 1e-6
    silent[name] = replace(silent[name], features=features, effects=effects)
    for metric, hears in (("activations", False), ("gradients", True)):
        how = {"density_a": 0.3, "density_b": 0.3, "scope": "layer", "metric": metric}
        layer = expand(compress(adapter, Recipe(prune=Prune.model_validate(how)), silent)).layers[name]
        change = layer.a - adapter.start(name)
        assert not (np.abs(change[:, ::2]) > 1e-5).any()
        assert (layer.b[::2] == 0).all() == hears


@pytest.mark.parametrize("metric", ["activations", "gradients"])
def test_measured_pruning_asks_for_a_whole_calibration(adapter, metric):
    recipe = Recipe(prune=Prune(density_a=0.3, density_b=0.3, metric=metric))
    with pytest.raises(DataError, match="needs a calibration"):
        compress(adapter, recipe)
    without = {n: replace(g, features=None) for n, g in plain_moments(adapter).items()}
    with pytest.raises(DataError, match="calibrate anew"):
        compress(adapter, recipe, without)
