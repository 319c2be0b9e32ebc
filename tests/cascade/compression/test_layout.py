"""How the form for a base in 8 bits is filled up to the kernel's blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_in import random_adapter

from cascade.compression.flat import layout_of, write_block
from cascade.compression.layout import Bytes
from cascade.compression.packed import _BLOCK, filled
from cascade.models.int8 import BLOCK


@pytest.mark.parametrize(
    ("rank", "held"), [(1, 1), (8, 8), (14, 14), (15, 16), (16, 16), (20, 20), (46, 48), (78, 80), (100, 112)]
)
def test_a_rank_is_filled_up_where_that_takes_little_memory(rank, held):
    assert filled(rank) == held
    assert _BLOCK == BLOCK


@pytest.mark.parametrize("rank", [14, 15, 20, 46])
def test_what_fills_up_changes_nothing(tiny_folder, rank):
    adapter = random_adapter(tiny_folder, seed=3, rank=rank)
    layout = layout_of(adapter, torch.bfloat16, int8=True)
    block = torch.full((layout.nbytes,), 77, dtype=torch.uint8)  # what was in the slot before
    write_block(adapter, layout, block)
    for name, held in layout.views(block).items():
        assert isinstance(held, Bytes)
        pair = adapter.layers[name]
        rows = torch.randn(3, pair.a.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        found = held.onto(torch.zeros(3, pair.b.shape[0], dtype=torch.bfloat16), rows, 1.0).float().numpy()
        expected = adapter.scaling * rows.float().numpy() @ pair.a.T @ pair.b.T
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
