"""Packing loses only what rounding must, and packs to the bytes it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cascade.compression.quantise import CODECS, decode, encode, packed_bytes, scale_count, unit_exponent
from cascade.errors import FormatError

VALUES = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-1, 1, width=32))


@settings(deadline=None)
@given(VALUES, st.sampled_from(CODECS), st.sampled_from([8, 64, 100]))
def test_decoding_then_encoding_again_is_stable_and_lengths_are_exact(values, codec, group):
    packed, scales = encode(values, codec, group)
    assert packed.dtype == np.uint8
    assert packed.size == packed_bytes(codec, values.size)
    assert scales.size == scale_count(codec, values.size, group)
    out = decode(packed, scales, codec, group, values.size)
    assert out.dtype == np.float32
    assert out.shape == values.shape
    assert np.isfinite(out).all()


@settings(deadline=None)
@given(VALUES, st.sampled_from([("int8", 127), ("int4", 7)]))
def test_rounding_error_is_half_a_step(values, codec_and_top):
    codec, top = codec_and_top
    packed, scales = encode(values, codec, 64)
    out = decode(packed, scales, codec, 64, values.size)
    step = np.repeat(scales.astype(np.float32), 64)[: values.size]
    # Half a step, and what the scale lost in fp16 at the far end. Of 4 bits numbers beyond the last step are cut.
    inside = np.abs(values) <= step * top if codec == "int4" else np.ones(values.size, bool)
    assert (np.abs(out - values)[inside] <= (step * 0.5 + step * top * 2**-10 + top * 2**-24)[inside]).all()


def test_four_bits_cut_what_is_worth_cutting():
    values = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    values /= np.abs(values).max()
    out = decode(*encode(values, "int4", 64), "int4", 64, values.size)
    assert ((out - values) ** 2).sum() < 0.0103 * (values**2).sum()  # 0.0116 without
    alone = np.zeros(64, np.float32)
    alone[3] = 1
    assert np.allclose(decode(*encode(alone, "int4", 64), "int4", 64, 64), alone, atol=1e-3)


@settings(deadline=None)
@given(VALUES)
def test_fp16_is_numpys_rounding(values):
    assert np.array_equal(decode(*encode(values, "fp16", 64), "fp16", 64, values.size), values.astype(np.float16))


@settings(deadline=None)
@given(hnp.arrays(np.int8, st.integers(0, 300), elements=st.integers(-7, 7)))
def test_int4_levels_survive_exactly(levels):
    values = np.concatenate([np.full(1, 7, np.float32), levels.astype(np.float32)]) / 8
    out = decode(*encode(values, "int4", 512), "int4", 512, values.size)
    assert np.array_equal(np.round(out * 8), np.round(values * 8))


@settings(deadline=None)
@given(hnp.arrays(np.bool_, st.integers(1, 300)))
def test_signs_survive_exactly(negative):
    values = np.where(negative, np.float32(-0.25), np.float32(0.25))
    assert np.array_equal(decode(*encode(values, "sign", 64), "sign", 64, values.size), values)


def test_ternary_zeroes_small_numbers_and_keeps_signs():
    values = np.array([0.5, -0.5, 0.01, 0.0, -0.02, 0.5, -0.5, 0.5], np.float32)
    out = decode(*encode(values, "ternary", 8), "ternary", 8, 8)
    assert np.array_equal(np.sign(out), [1, -1, 0, 0, 0, 1, -1, 1])
    assert np.allclose(np.abs(out[out != 0]), 0.5)


def test_a_group_of_zeros():
    zeros = np.zeros(70, np.float32)
    for codec in CODECS:
        assert not decode(*encode(zeros, codec, 64), codec, 64, 70).any()


@pytest.mark.parametrize(("top", "exponent"), [(0.0, 0), (1.0, 1), (0.4, -1), (3e-9, -28), (70000.0, 17)])
def test_unit_exponent_brings_the_largest_below_one(top, exponent):
    values = np.array([0, -top], np.float32)
    assert unit_exponent(values) == exponent
    assert np.abs(np.ldexp(values, -exponent)).max() <= 1


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_lengths_are_refused(codec):
    packed, scales = encode(np.ones(100, np.float32), codec, 64)
    for p, s, n in [(packed[:-1], scales, 100), (packed, scales, 120), (packed, np.ones(9, np.float16), 100)]:
        with pytest.raises(FormatError):
            decode(p, s, codec, 64, n)


def test_impossible_contents_are_refused():
    one = np.ones(1, np.float16)
    with pytest.raises(FormatError, match="range"):
        decode(np.full(1, 243, np.uint8), one, "ternary", 8, 5)
    with pytest.raises(FormatError, match="finite"):
        decode(np.zeros(8, np.uint8), np.full(1, np.nan, np.float16), "int8", 8, 8)
    with pytest.raises(FormatError, match="finite"):
        decode(np.full(2, 0x7C, np.uint8), np.empty(0, np.float16), "fp16", 8, 1)
