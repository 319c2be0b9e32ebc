"""Steps of the large-adapter measurement, each run as a process of its own by compression.py.

What serving needs is imported by its step: the memory of the command is measured without it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _figures import Figures, at_least, at_most, figure

from cascade.compression.adapter import (
    AdapterWeights,
    BaseRef,
    LoraPair,
    fp16_bytes,
    load_peft_folder,
    save_peft_folder,
)
from cascade.training.seeded_init import initial_lora_a

if TYPE_CHECKING:
    from torch import nn

SHAPES = {  # inputs, outputs of Llama-3.1-8B's linear layers
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
BLOCKS, RANK = 32, 50


def make(folder: Path) -> Figures:
    """An adapter as training leaves it: singular values that fall, A near its start; 260 MB in fp16."""
    rng = np.random.default_rng(0)
    layers = {}
    fall = (0.9 ** np.arange(RANK)).astype(np.float32)
    for block in range(BLOCKS):
        for name, (fan_in, fan_out) in SHAPES.items():
            full = f"model.layers.{block}.{name}"
            noise = rng.standard_normal((RANK, fan_in), dtype=np.float32) * (0.1 / np.sqrt(3 * fan_in))
            a = (initial_lora_a(1, full, RANK, fan_in) + noise).astype(np.float16)
            b = rng.standard_normal((fan_out, RANK), dtype=np.float32) * (0.01 * fall)
            layers[full] = LoraPair(a, b.astype(np.float16))
    targets = tuple(sorted(name.split(".")[1] for name in SHAPES))
    adapter = AdapterWeights(layers, 2.0, RANK, BaseRef("llama-3.1-8b-shapes"), targets, 1)
    save_peft_folder(adapter, folder / "adapter", dtype="float16")
    return {}


def compress_it(folder: Path) -> Figures:
    """Time from PEFT folder to modifier file by `cascade compress`, and the peak of this process."""
    from ray_jobs.cli import app

    for library in ("ray_jobs.commands.compress", "torch"):  # which the command would import
        import_module(library)
    before, source, file = _peak(), folder / "adapter", folder / "modifier.safetensors"
    began = time.perf_counter()
    app(["compress", str(source), str(file)], standalone_mode=False)
    seconds, peak = time.perf_counter() - began, _peak()
    full, size = fp16_bytes(load_peft_folder(source)), file.stat().st_size
    return {
        "large: fp16 MB": at_least(full / 1e6, 260),
        "large: share on disk": at_most(size / full, 48 / 260),
        "large: seconds to compress": at_most(seconds, 300),
        "large: peak memory / size": at_most(peak / full, 4),
        "large: of which libraries": figure(before / full),
    }


def serve(folder: Path) -> Figures:
    """From a warm file to the serving form, on 2 threads; and that form against the exact expansion."""
    import torch

    from cascade.compression.apply import LoraSlot
    from cascade.compression.format import load_modifier
    from cascade.compression.layout import Levels
    from cascade.compression.packed import expand

    torch.set_num_threads(2)
    slot = LoraSlot(_model())
    file = folder / "modifier.safetensors"
    slot.fill(load_modifier(file))
    wall, cpu = _milliseconds(lambda: slot.fill(load_modifier(file, verify=False)))
    source, copy = np.ones(slot.resident_bytes, np.uint8), np.ones(slot.resident_bytes, np.uint8)
    plain, _ = _milliseconds(lambda: np.copyto(copy, source))
    compressed = load_modifier(file)
    exact, same = expand(compressed).layers, True
    for spec in compressed.layers:
        held, pair = slot._patches[spec.name].held, exact[spec.name]
        assert isinstance(held, Levels)
        for found, wanted, exponent in zip(held.matrices(), (pair.a, pair.b.T), spec.exponents, strict=True):
            same &= np.array_equal(np.ldexp(found.numpy(), exponent), wanted)
    full = sum(2 * RANK * (i + o) for i, o in SHAPES.values()) * BLOCKS
    limit, size = 48 / 260 * full, slot.resident_bytes
    p50, least = statistics.median(wall), min(wall)
    return {
        "large: ms from warm file to serving form, p50 of 15": at_most(p50, 50),
        "large: the same, the fastest": at_most(least, 50),
        "large: the same, ms of CPU time, p50": figure(statistics.median(cpu)),
        "large: ms to copy as many bytes, p50 of 15": figure(statistics.median(plain)),
        "large: resident MB": at_most(size / 1e6, limit / 1e6),
        "large: serving form is the exact expansion": at_least(int(same), 1),
    }


def _milliseconds(work: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Wall and CPU time (of all threads) of each of 15 runs."""
    wall, cpu = [], []
    for _ in range(15):
        began, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - spent))
    return wall, cpu


def _model() -> nn.Module:
    """Linear layers of the right shapes whose weights take no memory; nobody computes with them."""
    import torch
    from torch import nn

    whole = nn.Module()
    whole.model = nn.Module()
    whole.model.layers = nn.ModuleList()
    for _ in range(BLOCKS):
        block = nn.Module()
        for name, (fan_in, fan_out) in SHAPES.items():
            parent, own = name.split(".")
            if not hasattr(block, parent):
                setattr(block, parent, nn.Module())
            layer = nn.Linear(1, 1, bias=False)
            layer.in_features, layer.out_features = fan_in, fan_out
            layer.weight = nn.Parameter(torch.zeros(1).expand(fan_out, fan_in), requires_grad=False)
            setattr(getattr(block, parent), own, layer)
        whole.model.layers.append(block)
    return whole


def _peak() -> int:
    """Bytes. Not `ru_maxrss`, which begins with what the process that started this one had in memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    step = {"make": make, "compress": compress_it, "serve": serve}[sys.argv[1]]
    print(json.dumps(step(Path(sys.argv[2]))))
