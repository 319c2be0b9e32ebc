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


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes may stay on a device while a training goes on there; a CPU's memory is not asked.

    They are wanted between two steps, when activations are gone, and still there in the next.
    """
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return fits(size, torch.cuda.max_memory_allocated(device), share, free + torch.cuda.memory_reserved(device))


def fits(size: int, peak: int, share: int, at_hand: int) -> bool:
    """Whether there is room for so many bytes beside the most that a step ever took.

    Args:
        share: bytes that this process may take of the GPU; at_hand: those that others leave to it.
    """
    return peak + size <= min(share, at_hand)


def settle_objects() -> None:
    """Collect garbage now, and leave what is alive after that out of later collections, until `gc.unfreeze`.

    Behind a first step these are the hundreds of thousands of objects of the libraries and of compiled code. To look
    through them all stops a training for the better part of a second, which Python does every hundred steps or so.
    """
    gc.collect()
    gc.freeze()
