"""A small modifier file, its parts, and the same or other parts sealed with a hash that is right."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import zstandard

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.format import encode_modifier
from cascade.compression.methods import Prune, Recipe
from cascade.compression.packed import compress
from cascade.scoring.statistics import Score

SCORES = {"compressed": Score(n=300, passed=120, unparsed=3, accuracy=0.4, low=0.346, high=0.456)}
TEACHERS = ("answer-key-large",)


PRUNED = Recipe(prune=Prune(density_a=0.3, density_b=0.3, weights={"mlp-late": 2.0}), values="int4", group=16)


def tiny(seed: int = 0) -> AdapterWeights:
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    layers = {
        n: LoraPair(rng.normal(size=(4, 40)).astype(np.float32), rng.normal(size=(60, 4)).astype(np.float32))
        for n in names
    }
    return AdapterWeights(layers, 2.0, 4, BaseRef("tiny", "b" * 64), ("q_proj", "up_proj"), 5)


PLAIN = compress(tiny(), PRUNED)
FILE = encode_modifier(PLAIN, scores=SCORES, teachers=TEACHERS)


def parts(data: bytes = FILE) -> tuple[dict, dict, bytes]:
    """Tensor table, header and payload of a good file; the header's own stream is in neither table nor payload."""
    length = struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8 : 8 + length])
    outer.pop("__metadata__")
    payload, header = data[8 + length :], outer.pop("header")
    start, end = header["data_offsets"]
    for entry in outer.values():
        if entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [x - end + start for x in entry["data_offsets"]]
    return outer, json.loads(zstandard.decompress(payload[start:end])), payload[:start] + payload[end:]


def forge(outer: dict | str, inner: dict | str, payload: bytes, **envelope: object) -> bytes:
    """A file with a right SHA-256 over whatever it holds. Text stands for JSON that no dict can express."""
    text = (inner if isinstance(inner, str) else json.dumps(inner, separators=(",", ":"))).encode()
    table = outer if isinstance(outer, str) else json.dumps(outer, separators=(",", ":"))[1:]
    small = zstandard.compress(text)
    at = len(payload)
    entry = json.dumps({"dtype": "U8", "shape": [len(small)], "data_offsets": [at, at + len(small)]})
    table = table[:-1] + ("," if table[:-1] else "") + '"header":' + entry + "}"
    said = {"format": "cascade-modifier", "version": 2, "header_bytes": len(text), **envelope, "sha256": "0" * 64}
    return seal(table, json.dumps(said, separators=(",", ":")), payload + small)


def seal(table: str, metadata: str, payload: bytes) -> bytes:
    """A safetensors file with its hash put in, where there is a place for it."""
    text = (
        '{"__metadata__":' + json.dumps({"cascade-modifier": metadata}, separators=(",", ":")) + "," + table
    ).encode()
    data = bytearray(struct.pack("<Q", len(text)) + text + payload)
    at = data.rfind(b'\\"sha256\\":\\"' + b"0" * 64, 0, 8 + len(text))
    if at >= 0:
        at += len(b'\\"sha256\\":\\"')
        data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def first_version(data: bytes = FILE, **changes: object) -> bytes:
    """The same content as version 1 had it: the whole header in the metadata."""
    outer, inner, payload = parts(data)
    inner = {"format": "cascade-modifier", "version": 1, **inner, **changes, "sha256": "0" * 64}
    table = json.dumps(outer, separators=(",", ":"))[1:]
    return seal(table, json.dumps(inner, separators=(",", ":")), payload)
