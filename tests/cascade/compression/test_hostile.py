"""Modifier files that an enemy wrote, with a hash that is right: refused with a reason, and without much memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from forged import FILE, PLAIN, first_version, forge, parts, tiny

from cascade.compression.format import decode_modifier, encode_modifier, load_modifier
from cascade.compression.methods import Prune, Recipe
from cascade.compression.packed import compress
from cascade.errors import FormatError


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
        return forge(outer, change(json.dumps(inner, separators=(",", ":"))), payload)

    return make


def _row(index: int, value):
    def change(inner: dict) -> None:
        inner["layers"][0][index] = value

    return inner_edit(change)


def _set(**values):
    return inner_edit(lambda inner: inner.update(values))


def _say(**envelope):
    return lambda: forge(*parts(), **envelope)


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
    outer, at = {"a.mask": {"dtype": "U8", "shape": [len(small)], "data_offsets": [0, len(small)]}}, len(small)
    for name in ("a.scales", "a.values"):
        outer[name] = {"dtype": "U8", "shape": [0], "data_offsets": [at, at]}
    return forge(outer, inner, small)


def _liar() -> bytes:
    """A compressed stream whose frame holds another length than the header says."""
    compressed = compress(tiny(), Recipe(prune=Prune(density_a=0.02, density_b=0.02)))
    outer, inner, payload = parts(encode_modifier(compressed))
    mask = zstandard.ZstdCompressor().compress(b"\0" * 4000)
    old = outer["a.mask"]["data_offsets"][1]
    shift = len(mask) - old
    for entry in outer.values():
        entry["data_offsets"] = [entry["data_offsets"][0] + shift, entry["data_offsets"][1] + shift]
    outer["a.mask"] = {"dtype": "U8", "shape": [len(mask)], "data_offsets": [0, len(mask)]}
    inner["raw_bytes"]["a.mask"] = 80
    return forge(outer, inner, mask + payload[old:])


def _hollow(layers: int) -> bytes:
    """Zeros cut into small blocks, so that they shrink by no more than is allowed, as masks that keep nothing."""
    outer, inner, _ = parts()
    inner["rank"], inner["layers"] = 256, [[f"l.{i}", 256, 1 << 17, 1, 0, 0, 0, 0] for i in range(layers)]
    size = layers << 22
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    small = b"".join(
        compressor.compress(b"\0" * min(115, size - at)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for at in range(0, size, 115)
    )
    small += compressor.flush()
    inner["raw_bytes"] = {"a.mask": size}
    outer, at = {"a.mask": {"dtype": "U8", "shape": [len(small)], "data_offsets": [0, len(small)]}}, len(small)
    for name, length in (("a.scales", 0), ("a.values", 0), ("b.mask", 32 * layers), ("b.scales", 0), ("b.values", 0)):
        outer[name] = {"dtype": "U8", "shape": [length], "data_offsets": [at, at + length]}
        at += length
    return forge(outer, inner, small + b"\0" * (32 * layers))


def _overflowing() -> bytes:
    """Numbers in 8 bits that are finite as they are packed, and not with their exponents."""
    outer, inner, payload = parts(encode_modifier(compress(tiny(), Recipe(values="int8"))))
    for row in inner["layers"]:
        row[6:] = [200, 200]
    return forge(outer, inner, payload)


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
    "newer version": _say(version=3),
    "version is text": _say(version="2"),
    "version is a truth value": _say(version=True),
    "no version": _say(version=None),
    "version 1 with a header of version 2": _say(version=1),
    "other format": _say(format="other"),
    "header is longer than it says": _say(header_bytes=200),
    "header is shorter than it says": _say(header_bytes=4000),
    "header has no length": _say(header_bytes=0),
    "unknown key in the metadata": _say(code="x"),
    "unknown key": _set(code="x"),
    "version 1, other content": lambda: first_version(init_seed=6),
    "key is missing": inner_edit(lambda inner: inner.pop("layers")),
    "no layers": _set(layers=[]),
    "layers without number": _set(layers=[[f"l.{i}", 1, 1, 1, 0, 0, 0, 0] for i in range(20_000)]),
    "lists without number": _set(teachers=[[]] * 500_000),
    "no digest": lambda: FILE.replace(b"sha256", b"sha257"),
    "scaling is zero": _set(scaling=0.0),
    "scaling beyond float32": _set(scaling=1e300),
    "numbers that become infinite": _overflowing,
    "rank above the adapter's": _set(rank=3),
    "a factor beyond all measure": _row(2, 1 << 24),
    "masks of nothing that would fill the memory": lambda: _hollow(2),
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
    "inner key twice": text_edit(lambda text: text.replace('"rank":4', '"rank":4,"rank":4')),
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
    assert peak < 32 * path.stat().st_size + (8 << 20)


def test_a_file_of_a_megabyte_that_would_become_five_gigabytes(tmp_path: Path):
    (tmp_path / "bomb").write_bytes(_hollow(8))
    script = """if True:
        import re, sys
        from cascade.compression.format import load_modifier
        from cascade.errors import FormatError
        # Of this program alone: `ru_maxrss` begins with what the tests' own process has had.
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        before = peak()
        try:
            load_modifier(sys.argv[1])
        except FormatError:
            print(peak() - before)
    """
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "bomb"], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) * 1024 < 32 * (tmp_path / "bomb").stat().st_size + (24 << 20)
