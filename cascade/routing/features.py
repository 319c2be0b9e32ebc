"""A query as a fixed vector: hashed word and character n-grams.

Nothing is learned or stored here, so the same text gives the same vector in every process, on every machine and in
every later version: n-grams are hashed with fixed arithmetic (never Python's salted `hash`). Digits are folded to
"0", because a router should know a sum by its shape and not by its numbers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 4096
"""Longer queries are represented by their first and last half of this many bytes: bounded time per request."""

_CHARACTER_SIZES = (3, 4, 5)
_WORD_WEIGHT = 2.0
_WORDS = re.compile(rb"[^\W_]+|[^\w\s]")
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_FNV_PRIME = np.uint64(0x100000001B3)
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)


def featurize(queries: Sequence[str], buckets: int) -> NDArray[np.float32]:
    """Vectors of queries.

    Args:
        queries: any text; the empty string gives the zero vector.
        buckets: length of a vector.

    Returns:
        float32 array of shape (queries, buckets); rows have Euclidean length 1. Entries are damped counts
        (log of 1 + count), words weighing more than characters.
    """
    rows = np.zeros((len(queries), buckets), dtype=np.float32)
    for row, query in zip(rows, queries, strict=True):
        text = _normalise(query)
        characters = np.bincount(_character_hashes(text) % np.uint64(buckets), minlength=buckets)
        words = np.bincount(_word_hashes(text) % np.uint64(buckets), minlength=buckets)
        row += np.log1p(characters) + _WORD_WEIGHT * np.log1p(words)
        norm = np.linalg.norm(row)
        if norm > 0:
            row /= norm
    return rows


def _normalise(query: str) -> bytes:
    """Lower case, single spaces, digits folded, at most `MAX_BYTES` long, a space at either end."""
    text = " ".join(query.lower().split()).encode("utf-8", errors="replace").translate(_DIGITS)
    if len(text) > MAX_BYTES:
        text = text[: MAX_BYTES // 2] + b" " + text[-MAX_BYTES // 2 :]
    return b" " + text + b" " if text else b""


def _character_hashes(text: bytes) -> NDArray[np.uint64]:
    """FNV-1a of every byte n-gram, all positions at once."""
    data = np.frombuffer(text, dtype=np.uint8).astype(np.uint64)
    found = []
    for size in _CHARACTER_SIZES:
        count = len(data) - size + 1
        if count <= 0:
            continue
        hashes = np.full(count, _FNV_OFFSET ^ np.uint64(size), dtype=np.uint64)
        for offset in range(size):
            hashes = (hashes ^ data[offset : offset + count]) * _FNV_PRIME
        found.append(hashes ^ (hashes >> np.uint64(32)))
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)


def _word_hashes(text: bytes) -> NDArray[np.uint64]:
    """CRC-32 of every word and every pair of neighbouring words."""
    words = _WORDS.findall(text)
    pairs = [a + b" " + b for a, b in pairwise(words)]
    return np.array([zlib.crc32(gram) for gram in [*words, *pairs]], dtype=np.uint64)
