"""How much memory a training worker takes, and what is looked through for garbage in it."""

from __future__ import annotations

import gc
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


def settle_objects() -> None:
    """Collect garbage now, and leave what is alive after that out of later collections, until `gc.unfreeze`.

    Behind a first step these are the hundreds of thousands of objects of the libraries and of compiled code. To look
    through them all stops a training for the better part of a second, which Python does every hundred steps or so.
    """
    gc.collect()
    gc.freeze()
