"""Swapping and memory, in a process of its own, for perf/serving.py.

python perf/serving_swap.py ours|peft FOLDER MODEL DTYPE ROUNDS    prints one JSON object
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from serving_setup import DOMAINS, Setup, percentile, prepare, rss_bytes
from transformers import AutoTokenizer

from cascade import modifiers
from cascade.compression.apply import LoraSlot
from cascade.compression.flat import FlatAdapter
from cascade.config import load_config
from cascade.models.base import load_base
from cascade.models.files import base_folder
from serve.forms import Forms

GROWTH_SWAPS = 1000


def main() -> None:
    who, folder, model, dtype, weights, rounds = sys.argv[1:]
    torch.set_num_threads(2)
    setup = prepare(Path(folder), model, dtype, weights)
    print(json.dumps({"ours": ours, "peft": peft}[who](setup, int(rounds))))


def timed(action: Callable[[], object]) -> float:
    """Milliseconds, the GPU's work included."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def figures(times: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(times), "p95": percentile(times, 0.95), "n": len(times)}


def ours(setup: Setup, rounds: int) -> dict[str, object]:
    """Fills from the open flat files; cold: with the file's pages dropped from the system's cache before each.

    Memory is the process's, on a GPU what its tensors hold there.
    """
    # What is no weight is there before: the libraries' own state and the tokenizer.
    AutoTokenizer.from_pretrained(base_folder(setup.base))("x")
    torch.ones(300, 300, dtype=torch.float32) @ torch.ones(300, 300)
    gc.collect()
    cuda = torch.cuda.is_available()
    held_bytes: Callable[[], int] = torch.cuda.memory_allocated if cuda else rss_bytes
    before = held_bytes()
    loaded = load_base(setup.base, weights=load_config(setup.config).serving.weights)
    slot = LoraSlot(loaded.model)
    cache = Path(setup.store.path()).parent / "forms"
    forms = Forms(
        setup.store, cache, base_sha256=loaded.sha256, dtype=slot.dtype, check=slot.check, int8=slot.int8, pin=cuda
    )
    opened = [forms.open(current) for d in DOMAINS if (current := modifiers.current(setup.store, d))]
    for form in opened:
        slot.fill(form)
    base = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    gc.collect()
    resident = held_bytes() - before
    warm = [timed(partial(slot.fill, opened[i % 3])) for i in range(rounds)]
    cold = []
    for i in range(0 if cuda else min(rounds, 30)):
        form = opened[i % 3]
        os.fsync(form.file.fileno())
        os.posix_fadvise(form.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold.append(timed(partial(slot.fill, form)))
    settled = held_bytes()
    for i in range(GROWTH_SWAPS):
        slot.fill(opened[i % 3])
    gc.collect()
    growth = held_bytes() - settled
    slot.remove()
    return {
        "device": loaded.device.type,
        "base_bytes": base,
        "slot_bytes": slot.resident_bytes,
        "resident_bytes": resident,
        "growth_bytes": growth,
        "warm": figures(warm),
        "cold": figures(cold) if cold else None,
        "kept": exchanged(loaded.model, opened[:2], rounds),
    }


def exchanged(model: torch.nn.Module, forms: list[FlatAdapter], rounds: int) -> dict[str, object]:
    """Swaps between two modifiers that are both kept in memory."""
    slot = LoraSlot(model, adapters=2)
    for number, form in enumerate(forms):
        slot.fill(form, number)
    held, settled = slot.resident_bytes, rss_bytes()
    times = [timed(partial(slot.select, i % 2)) for i in range(max(rounds, GROWTH_SWAPS))]
    gc.collect()
    return {**figures(times), "slot_bytes": held, "growth_bytes": rss_bytes() - settled}


def peft(setup: Setup, rounds: int) -> dict[str, object]:
    """PEFT's three ways with the same adapters."""
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    loaded = load_base(setup.base)
    folders = [str(setup.peft[d]) for d in DOMAINS]
    model = PeftModel.from_pretrained(loaded.model, folders[0], adapter_name="slot")
    device = str(loaded.device)

    def load_and_set(i: int) -> None:
        model.load_adapter(folders[i % 3], adapter_name=f"new{i}")
        model.set_adapter(f"new{i}")
        model.delete_adapter("slot" if i == 0 else f"new{i - 1}")

    few = max(rounds // 10, 6)
    hot = [timed(partial(hotswap_adapter, model, folders[i % 3], "slot", torch_device=device)) for i in range(few)]
    loads = [timed(partial(load_and_set, i)) for i in range(few)]
    for i, name in enumerate("abc"):
        model.load_adapter(folders[i], adapter_name=name)
    sets = [timed(partial(model.set_adapter, "abc"[i % 3])) for i in range(rounds)]
    return {"load_set_delete": figures(loads), "hotswap": figures(hot), "set_adapter": figures(sets)}


main()
