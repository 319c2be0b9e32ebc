"""How many tokens are held at once where a GPU's memory is shared."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from cascade.models.room import tokens_in_memory


def test_memory_that_an_earlier_batch_gave_back_is_room_for_the_next(loaded, monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda"), model=loaded.model)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)

    def tokens(free: int, reserved: int) -> int:
        """On a GPU of 100 GB, half of it ours, of which tensors hold 1."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        return tokens_in_memory(gpu)

    first = tokens(free=99 * 10**9, reserved=10**9)
    assert tokens(free=51 * 10**9, reserved=49 * 10**9) == first, "torch's allocator kept what a batch gave back"
    assert tokens(free=4 * 10**9, reserved=10**9) < first / 10, "others hold nearly all of it"
