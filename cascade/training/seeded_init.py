"""LoRA's random start from a generator of our own, so that a modifier file can store A's start as one number.

Compression prunes A − A0, the change that training made, and rebuilds A0 from the seed when the file is opened.
That needs the same bits years later and on another machine, which neither torch nor numpy promise for their
distributions. Philox-4x64's raw 64-bit output is promised by numpy (its bit generators are stable), and the step
from bits to numbers is here: the upper 24 bits as a uniform in [-1, 1), exact in float32, times 1/sqrt(fan_in).
That is the distribution of PEFT's default (Kaiming-uniform with a = sqrt(5)).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_PART = 1 << 18
"""Numbers that are made at a time: the generator's own take four times the room."""


def initial_lora_a(seed: int, name: str, rank: int, fan_in: int) -> NDArray[np.float32]:
    """A0 of one adapted layer.

    Args:
        seed: of the whole adapter.
        name: of the layer, e.g. "model.layers.3.self_attn.q_proj"; each name gets a stream of its own.
        rank: rows of A.
        fan_in: columns of A, the layer's input features.

    Returns:
        float32 array of shape (rank, fan_in), uniform in ±1/sqrt(fan_in).
    """
    whole, at = np.empty(rank * fan_in, np.float32), 0
    for part in iter_initial_lora_a(seed, name, rank, fan_in, _PART):
        whole[at : at + part.size] = part
        at += part.size
    return whole.reshape(rank, fan_in)


def iter_initial_lora_a(seed: int, name: str, rank: int, fan_in: int, part: int) -> Iterator[NDArray[np.float32]]:
    """As `initial_lora_a`, flat and row by row, in parts of so many numbers: nothing larger is ever in memory."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator, size = np.random.Philox(key=key), rank * fan_in
    for start in range(0, size, part):
        bits = generator.random_raw(min(part, size - start)) >> np.uint64(40)
        uniform = bits.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        yield uniform * np.float32(1.0 / np.sqrt(fan_in))
