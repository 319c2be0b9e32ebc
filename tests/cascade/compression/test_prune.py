"""Thresholds keep what they are told to, over the reach that they are told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.prune import group_layers, importance, keep_mask, thresholds
from cascade.compression.truncate import Grams, iter_truncated

RNG = np.random.default_rng(0)
NAMES = [f"model.layers.{i}.{m}" for i in range(9) for m in ("self_attn.q_proj", "mlp.up_proj")]
CHANGE = {n: RNG.normal(scale=1 + i, size=(4, 50)).astype(np.float32) for i, n in enumerate(NAMES)}


def shares(cuts: dict[str, float]) -> dict[str, float]:
    return {n: float(keep_mask(CHANGE[n], cuts[n]).mean()) for n in NAMES}


def test_groups():
    groups = group_layers([*NAMES, "lm_head", "transformer.h.0.attn.c_attn"])
    assert groups["model.layers.0.self_attn.q_proj"] == "attention-early"
    assert groups["model.layers.2.mlp.up_proj"] == "mlp-early"
    assert groups["model.layers.3.mlp.up_proj"] == "mlp-middle"
    assert groups["model.layers.8.self_attn.q_proj"] == "attention-late"
    assert groups["lm_head"] == "mlp-late"
    assert groups["transformer.h.0.attn.c_attn"] == "attention-early"


def test_each_layer_keeps_its_share():
    kept = shares(thresholds(NAMES, CHANGE.__getitem__, 0.12, "layer"))
    assert set(kept.values()) == {0.12}


def test_each_group_keeps_its_share():
    kept = shares(thresholds(NAMES, CHANGE.__getitem__, 0.2, "group"))
    groups = group_layers(NAMES)
    for group in set(groups.values()):
        assert np.mean([kept[n] for n in NAMES if groups[n] == group]) == pytest.approx(0.2, abs=1e-9)
    assert max(kept.values()) > 0.22


def test_one_threshold_for_all_keeps_the_largest():
    cuts = thresholds(NAMES, CHANGE.__getitem__, 0.1, "global")
    assert len(set(cuts.values())) == 1
    everything = np.sort(np.abs(np.concatenate([c.ravel() for c in CHANGE.values()])))[::-1]
    kept = np.concatenate([np.abs(CHANGE[n][keep_mask(CHANGE[n], cuts[n])]) for n in NAMES])
    assert np.array_equal(np.sort(kept)[::-1], everything[: everything.size // 10])


def test_weights_move_numbers_between_groups_at_the_same_total():
    plain = shares(thresholds(NAMES, CHANGE.__getitem__, 0.1, "global"))
    moved = shares(thresholds(NAMES, CHANGE.__getitem__, 0.1, "global", {"mlp-early": 3.0}))
    assert np.mean(list(moved.values())) == pytest.approx(np.mean(list(plain.values())))
    assert moved["model.layers.0.mlp.up_proj"] > plain["model.layers.0.mlp.up_proj"]
    assert moved["model.layers.8.mlp.up_proj"] < plain["model.layers.8.mlp.up_proj"]


def test_zeros_are_never_kept():
    zeros = np.zeros((3, 3), np.float32)
    cuts = thresholds(["a"], lambda _: zeros, 0.5, "layer")
    assert not keep_mask(zeros, cuts["a"]).any()


@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32), unique=True),
    st.floats(0.01, 1),
)
def test_threshold_is_the_magnitude_of_the_last_number_kept(values, density):
    cut = thresholds(["x"], lambda _: values, density, "global")["x"]
    wanted = min(values.size, max(1, round(density * values.size)))
    assert float(np.sort(np.abs(values))[::-1][wanted - 1]) == cut
    mask = keep_mask(values, cut)
    assert not (np.abs(values[~mask]) > cut).any()


@pytest.mark.parametrize("metric", ["activations", "gradients"])
def test_importance_follows_the_components_through_truncation(metric):
    """Measured before, and turned with the factors: as if measured of the truncated factors themselves."""
    a, b = RNG.normal(size=(6, 30)), RNG.normal(size=(40, 6))
    x = RNG.normal(size=(500, 30)) * np.linspace(0.1, 3, 30)
    dy = RNG.normal(size=(500, 40)) * np.linspace(2, 0.2, 40)
    z, g = x @ a.T, dy @ b
    moments = (z.T @ z / 500, g.T @ g / 500, (x**2).mean(0), (dy**2).mean(0))
    grams = Grams(*(m.astype(np.float32) for m in moments))
    pair = LoraPair(a.astype(np.float32), b.astype(np.float32))
    base = AdapterWeights({"q_proj": pair}, 1.0, 6, BaseRef(), ("q_proj",))
    for after in (
        pair,
        dict(iter_truncated(base, 0.5, None, metric=metric, calibration={"q_proj": grams}))["q_proj"],
    ):
        of_a, of_b = importance(pair, after, grams, metric)
        seen = np.sqrt(((x @ after.a.T) ** 2).mean(0))
        heard = np.linalg.norm(after.b, axis=0) if metric == "activations" else np.sqrt(((dy @ after.b) ** 2).mean(0))
        effect = np.ones(40) if metric == "activations" else np.sqrt((dy**2).mean(0))
        assert np.allclose(of_a, np.outer(heard, np.sqrt((x**2).mean(0))), rtol=1e-3)
        assert np.allclose(of_b, np.outer(seen, effect), rtol=1e-3)
