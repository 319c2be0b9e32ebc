"""How much memory a training worker takes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def memory_bytes(device: torch.device) -> int:
    """On a GPU, the most that this process ever had allocated there; on a CPU, what is resident of this process now.

    Resident memory counts pages of the base's file too, which all processes of a machine share. 0 where the kernel
    does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0
