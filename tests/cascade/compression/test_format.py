"""The modifier file: exact, complete, and shut to everything that is not one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from forged import FILE, PLAIN, SCORES, TEACHERS, first_version, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cascade.compression.adapter import BaseRef, LoraPair
from cascade.compression.decoding import expanded_sha256
from cascade.compression.format import (
    decode_modifier,
    disk_bytes,
    encode_modifier,
    load_modifier,
    publishing_bytes,
    read_modifier,
    save_modifier,
)
from cascade.compression.methods import Prune, Recipe, Truncate
from cascade.compression.packed import compress, expand
from cascade.errors import DataError, FormatError
from cascade.scoring.statistics import Score

RECIPES = {
    "dense fp16": Recipe(),
    "pruned fp16": Recipe(prune=Prune(density_a=0.12, density_b=0.12, rescale_b=3.0)),
    "pruned int8": Recipe(prune=Prune(density_a=0.2, density_b=0.1, scope="group"), values="int8"),
    "pruned int4": Recipe(
        prune=Prune(density_a=0.3, density_b=0.3, weights={"mlp-late": 2.0}), values="int4", group=16
    ),
    "pruned signs": Recipe(prune=Prune(density_a=0.1, density_b=0.1), values="ternary"),
    "low rank": Recipe(truncate=Truncate(keep=0.5, allocation="global"), values="int8"),
    "dense ternary": Recipe(truncate=Truncate(energy=0.9), values="ternary"),
    "rotated": Recipe(truncate=Truncate(keep=1.0), prune=Prune(density_a=0.3, density_b=0.3), values="int4"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_round_trip_is_bit_exact(adapter, tmp_path: Path, recipe):
    compressed = compress(adapter, recipe)
    path = tmp_path / "modifier.safetensors"
    size = save_modifier(path, compressed, scores=SCORES, teachers=TEACHERS)
    assert size == path.stat().st_size == disk_bytes(compressed, scores=SCORES, teachers=TEACHERS)
    header, read = read_modifier(path, base_sha256=adapter.base.sha256)
    assert (header.scores, tuple(header.teachers)) == (SCORES, TEACHERS)
    assert (read.recipe, read.layers, read.base, read.init_seed) == (
        recipe,
        compressed.layers,
        adapter.base,
        compressed.init_seed,
    )
    for one, other in ((read.a, compressed.a), (read.b, compressed.b)):
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.scales, other.scales)
        assert (one.mask is None and other.mask is None) or np.array_equal(one.mask, other.mask)
    back, expected = expand(read), expand(compressed)
    assert all(
        np.array_equal(p.a, back.layers[n].a) and np.array_equal(p.b, back.layers[n].b)
        for n, p in expected.layers.items()
    )


def test_the_same_content_gives_the_same_bytes_and_any_safetensors_reader_opens_it(tmp_path: Path):
    again = encode_modifier(compress(tiny(), RECIPES["pruned int4"]), scores=SCORES, teachers=TEACHERS)
    assert again == FILE
    (tmp_path / "m").write_bytes(FILE)
    with safe_open(tmp_path / "m", framework="np") as file:
        assert set(file.keys()) == {"header", *(f"{f}.{s}" for f in "ab" for s in ("mask", "scales", "values"))}
        assert json.loads(file.metadata()["cascade-modifier"])["version"] == 2
        header = json.loads(zstandard.decompress(file.get_tensor("header").tobytes()))
    assert header["base"] == {"name": "tiny", "sha256": "b" * 64}
    assert header["teachers"] == ["answer-key-large"]
    assert header["scores"]["compressed"]["n"] == 300


def test_sparse_masks_are_entropy_coded():
    rng = np.random.default_rng(0)
    wide = {
        "layers.0.q_proj": LoraPair(rng.normal(size=(8, 9000)).astype("f4"), rng.normal(size=(9000, 8)).astype("f4"))
    }
    adapter = replace(tiny(), layers=wide, rank=8)
    prune = Prune(density_a=0.05, density_b=0.05)
    assert disk_bytes(compress(adapter, Recipe(prune=prune, values="ternary"))) < 2 * 9000 * 0.52
    # So sparse that the mask would shrink beyond what a reader accepts: stored as it is, and still read.
    hollow = compress(adapter, Recipe(prune=Prune(density_a=0.0001, density_b=0.0001)))
    assert decode_modifier(encode_modifier(hollow))[1].layers == hollow.layers


def test_every_flipped_bit_of_every_byte_is_refused():
    for position in range(len(FILE)):
        harmed = bytearray(FILE)
        harmed[position] ^= 1 << (position % 8)
        with pytest.raises(FormatError):
            decode_modifier(bytes(harmed), verify=False)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_other_damage_is_refused(data):
    harmed = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(harmed)))
        end = data.draw(st.integers(start, min(len(harmed), start + 64)))
        harmed[start:end] = data.draw(st.binary(max_size=64))
    if bytes(harmed) != FILE:
        with pytest.raises(FormatError):
            decode_modifier(bytes(harmed))


def test_every_truncation_is_refused(tmp_path: Path):
    path = tmp_path / "m"
    for length in (0, 1, 7, 8, 9, 100, 1000, len(FILE) // 2, len(FILE) - 1):
        path.write_bytes(FILE[:length])
        with pytest.raises(FormatError):
            load_modifier(path)
    path.write_bytes(FILE + b"\0")
    with pytest.raises(FormatError):
        load_modifier(path)


def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FormatError):
            load_modifier(path)


def test_wrong_base_is_refused_by_name():
    with pytest.raises(FormatError, match="made for the base tiny"):
        decode_modifier(FILE, base_sha256="c" * 64)
    unknown = encode_modifier(replace(PLAIN, base=BaseRef()))
    assert decode_modifier(unknown)[1].base == BaseRef()
    with pytest.raises(FormatError, match="no hash"):
        decode_modifier(unknown, base_sha256="b" * 64)


def test_files_of_version_1_still_open():
    header, read = decode_modifier(first_version(), base_sha256="b" * 64)
    assert (header.version, header.scores, tuple(header.teachers)) == (1, SCORES, TEACHERS)
    assert expanded_sha256(read) == PLAIN.expanded_sha256
    with pytest.raises(FormatError, match="damaged"):
        decode_modifier(first_version()[:-1] + b"\7")


def test_a_header_is_compressed_and_bounded(adapter):
    data = encode_modifier(compress(adapter, Recipe()))
    assert len(data) < len(first_version(data)) - 1000
    many = replace(PLAIN, layers=tuple(replace(PLAIN.layers[0], name=f"l.{i}") for i in range(2**14 + 1)))
    with pytest.raises(DataError, match="at most 16384"):
        encode_modifier(many)


def test_what_publishing_adds_is_known_before():
    teachers = ("a-teacher", "another-teacher", "Ünïcode/teacher")
    scores = {
        name: Score(n=300, passed=n, unparsed=3, accuracy=n / 300, low=n / 310, high=n / 290)
        for n, name in enumerate(("base", "modifier", "compressed"), 123)
    }
    bare = disk_bytes(PLAIN)
    assert bare < disk_bytes(PLAIN, scores=scores, teachers=teachers) <= bare + publishing_bytes(teachers)
    assert publishing_bytes(teachers) < 1000
