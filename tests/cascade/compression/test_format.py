"""The modifier file: exact, complete, and shut to everything that is not one."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.format import (
    decode_modifier,
    disk_bytes,
    encode_modifier,
    load_modifier,
    read_modifier,
    save_modifier,
)
from cascade.compression.methods import Prune, Recipe, Truncate
from cascade.compression.packed import compress, expand
from cascade.errors import FormatError
from cascade.scoring.statistics import Score

SCORES = {"compressed": Score(n=300, passed=120, unparsed=3, accuracy=0.4, low=0.346, high=0.456)}
TEACHERS = ("answer-key-large",)
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


def tiny(seed: int = 0) -> AdapterWeights:
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    layers = {
        n: LoraPair(rng.normal(size=(4, 40)).astype(np.float32), rng.normal(size=(60, 4)).astype(np.float32))
        for n in names
    }
    return AdapterWeights(layers, 2.0, 4, BaseRef("tiny", "b" * 64), ("q_proj", "up_proj"), 5)


PLAIN = compress(tiny(), RECIPES["pruned int4"])
FILE = encode_modifier(PLAIN, scores=SCORES, teachers=TEACHERS)


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
        assert set(file.keys()) == {f"{f}.{s}" for f in "ab" for s in ("mask", "scales", "values")}
        header = json.loads(file.metadata()["cascade-modifier"])
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


# ---------------------------------------------------------------- files that an enemy wrote, with a hash that is right


def parts() -> tuple[dict, dict, bytes]:
    """Tensor table, inner header and payload of the good file."""
    length = struct.unpack("<Q", FILE[:8])[0]
    outer = json.loads(FILE[8 : 8 + length])
    inner = json.loads(outer.pop("__metadata__")["cascade-modifier"])
    return outer, inner, FILE[8 + length :]


def forge(outer: dict | str, inner: dict | str, payload: bytes) -> bytes:
    """A file with a right SHA-256 over whatever it holds. Text stands for JSON that no dict can express."""
    if isinstance(inner, dict):
        inner["sha256"] = inner.pop("sha256", "") and "0" * 64
        inner = json.dumps(inner, separators=(",", ":"))
    meta = json.dumps({"cascade-modifier": inner}, separators=(",", ":"))
    table = outer if isinstance(outer, str) else json.dumps(outer, separators=(",", ":"))[1:]
    text = ('{"__metadata__":' + meta + "," + table).encode()
    data = bytearray(struct.pack("<Q", len(text)) + text + payload)
    at = data.rfind(b'\\"sha256\\":\\"' + b"0" * 64, 0, 8 + len(text))
    if at >= 0:
        at += len(b'\\"sha256\\":\\"')
        data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def inner_edit(change):
    def make() -> bytes:
        outer, inner, payload = parts()
        change(inner)
        return forge(outer, inner, payload)

    return make


def outer_edit(change):
    def make() -> bytes:
        outer, inner, payload = parts()
        return forge(change(outer, payload) or outer, inner, payload)

    return make


def text_edit(change):
    def make() -> bytes:
        outer, inner, payload = parts()
        return forge(outer, change(json.dumps(inner | {"sha256": "0" * 64}, separators=(",", ":"))), payload)

    return make


def _row(index: int, value):
    def change(inner: dict) -> None:
        inner["layers"][0][index] = value

    return inner_edit(change)


def _set(**values):
    return inner_edit(lambda inner: inner.update({**values, "sha256": inner.pop("sha256")}))


def _deep(depth: int):
    return text_edit(lambda text: text.replace('"teachers":', '"x":' + "[" * depth + "]" * depth + ',"teachers":'))


def _duplicate_tensor() -> bytes:
    outer, inner, payload = parts()
    table = json.dumps(outer, separators=(",", ":"))[1:-1]
    return forge(f"{table},{table}}}", inner, payload)


def _bomb(window: bytes | None = None) -> bytes:
    """A mask of a few bytes that claims to open to a gigabyte."""
    outer, inner, _ = parts()
    size = 1 << 30
    compressor = zstandard.ZstdCompressor().compressobj(size=size)
    small = compressor.compress(b"\0" * 4096)  # the frame says a gigabyte, whatever follows
    small += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    for row in inner["layers"]:
        row[1:4], row[4], row[5] = [1 << 11, 1 << 20, 40], 0, 0
    inner["raw_bytes"] = {"a.mask": size}
    outer = {"a.mask": {"dtype": "U8", "shape": [len(small)], "data_offsets": [0, len(small)]}}
    at = len(small)
    for name in ("a.scales", "a.values"):
        outer[name] = {"dtype": "U8", "shape": [0], "data_offsets": [at, at]}
    return forge(outer, inner, small)


def _liar() -> bytes:
    """A compressed stream whose frame holds another length than the header says."""
    compressed = compress(tiny(), Recipe(prune=Prune(density_a=0.02, density_b=0.02)))
    data = encode_modifier(compressed)
    length = struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer.pop("__metadata__")["cascade-modifier"])
    mask = zstandard.ZstdCompressor().compress(b"\0" * 4000)
    rest = data[8 + length :]
    old = outer["a.mask"]["data_offsets"][1]
    shift = len(mask) - old
    for entry in outer.values():
        entry["data_offsets"] = [entry["data_offsets"][0] + shift, entry["data_offsets"][1] + shift]
    outer["a.mask"] = {"dtype": "U8", "shape": [len(mask)], "data_offsets": [0, len(mask)]}
    inner["raw_bytes"]["a.mask"] = 80
    return forge(outer, inner, mask + rest[old:])


def _entry(name: str, **values):
    return outer_edit(lambda outer, payload: outer[name].update(values))


def _payload_edit(flip: int):
    def make() -> bytes:
        outer, inner, payload = parts()
        harmed = bytearray(payload)
        harmed[flip] ^= 0x40
        return forge(outer, inner, bytes(harmed))

    return make


HOSTILE = {
    "newer version": _set(version=2),
    "version is text": _set(version="1"),
    "version is a truth value": _set(version=True),
    "no version": inner_edit(lambda inner: inner.pop("version")),
    "other format": _set(format="other"),
    "unknown key": inner_edit(lambda inner: inner.update({"code": "x", "sha256": inner.pop("sha256")})),
    "key is missing": inner_edit(lambda inner: inner.pop("layers")),
    "no layers": _set(layers=[]),
    "no digest": inner_edit(lambda inner: inner.pop("sha256")),
    "scaling is no number": text_edit(lambda text: text.replace('"scaling":2.0', '"scaling":NaN')),
    "scaling is infinite": text_edit(lambda text: text.replace('"scaling":2.0', '"scaling":1e999')),
    "rank is huge": _row(1, 1 << 40),
    "rank is zero": _row(1, 0),
    "rank is negative": _row(1, -4),
    "rank is a fraction": _row(1, 4.5),
    "rank beyond 64 bits": _row(1, 1 << 200),
    "inputs are huge": _row(2, 1 << 23),
    "outputs are huge": _row(3, 1 << 23),
    "keeps more than there is": _row(4, 10_000),
    "keeps fewer than the mask": _row(4, 1),
    "keeps a negative number": _row(5, -1),
    "exponent is huge": _row(6, 10**6),
    "exponent of another": _row(6, 3),
    "row is too short": inner_edit(lambda inner: inner["layers"][0].pop()),
    "layer has no name": _row(0, ""),
    "layer is there twice": inner_edit(lambda inner: inner["layers"][1].__setitem__(0, inner["layers"][0][0])),
    "other layer's name": _row(0, "model.layers.0.self_attn.k_proj"),
    "other seed": _set(init_seed=6),
    "seed is gone": _set(init_seed=None),
    "other recipe": inner_edit(lambda inner: inner["recipe"].update(values="int8")),
    "recipe without mask": inner_edit(lambda inner: inner["recipe"].update(prune=None)),
    "unknown method": inner_edit(lambda inner: inner["recipe"].update(method="pickle")),
    "other group": inner_edit(lambda inner: inner["recipe"].update(group=32)),
    "raw length of an unknown stream": _set(raw_bytes={"c.mask": 5}),
    "raw length is negative": _set(raw_bytes={"a.mask": -5}),
    "stream said to be compressed": _set(raw_bytes={"a.mask": 80}),
    "stream that would grow without measure": _bomb,
    "compressed stream that lies of its length": _liar,
    "base hash is a path": inner_edit(lambda inner: inner["base"].update(sha256="../../etc/passwd")),
    "expanded hash is wrong": _set(expanded_sha256="0" * 63 + "1"),
    "inner key twice": text_edit(lambda text: text.replace('"version":1', '"version":1,"version":1')),
    "inner header is a list": text_edit(lambda text: f"[{text}]"),
    "inner header nested 60 deep": _deep(60),
    "inner header nested 100,000 deep": _deep(100_000),
    "tensor twice": _duplicate_tensor,
    "tensors overlap": _entry("a.scales", data_offsets=[0, 8], shape=[8]),
    "gap between tensors": _entry("a.scales", data_offsets=[200, 208], shape=[8]),
    "tensor beyond the file": _entry("b.values", data_offsets=[0, 1 << 50]),
    "offsets are negative": _entry("a.mask", data_offsets=[-8, 0]),
    "offsets are fractions": _entry("a.mask", data_offsets=[0.0, 80.0]),
    "three offsets": _entry("a.mask", data_offsets=[0, 1, 2]),
    "shape is huge": _entry("a.mask", shape=[1 << 62]),
    "two dimensions": _entry("a.mask", shape=[8, 10]),
    "other type": _entry("a.mask", dtype="F64"),
    "tensor entry is a list": outer_edit(lambda outer, payload: outer.update({"a.mask": []})),
    "tensor entry has more": _entry("a.mask", x=1),
    "tensor is missing": outer_edit(lambda outer, payload: outer.pop("b.values") and None),
    "tensor too many": outer_edit(
        lambda outer, payload: outer.update({"c": {"dtype": "U8", "shape": [0], "data_offsets": [len(payload)] * 2}})
    ),
    "outer header is broken": outer_edit(lambda outer, payload: '"a": }'),
    "outer header nested": outer_edit(lambda outer, payload: '"a":' + "[" * 200_000 + "}"),
    "mask bit flipped": _payload_edit(3),
    "number changed": _payload_edit(-2),
    "header length beyond the file": lambda: struct.pack("<Q", 1 << 60) + FILE[8:],
    "header length beyond what headers have": lambda: struct.pack("<Q", 5 << 20) + b"{" * (6 << 20),
    "other safetensors file": lambda: (
        b"\x40" + b"\0" * 7 + b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(64)
    ),
    "zip archive": lambda: b"PK\x03\x04" + b"\0" * 500,
    "text": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
    "nothing but zeros": lambda: b"\0" * 4096,
}


def test_the_forger_makes_good_files_from_good_parts():
    outer, inner, payload = parts()
    assert decode_modifier(forge(outer, inner, payload))[1].layers == PLAIN.layers
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_without_excess_memory(tmp_path: Path, make):
    path = tmp_path / "modifier.safetensors"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as refusal:
            load_modifier(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert peak < 16 * path.stat().st_size + (2 << 20)
