"""Steps of the large-adapter measurement, each run as a process of its own by compression.py."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, fp16_bytes, save_peft_folder
from cascade.compression.apply import LoraSlot
from cascade.compression.convert import compress_folder
from cascade.compression.format import load_modifier
from cascade.compression.layout import Levels
from cascade.compression.packed import expand
from cascade.training.seeded_init import initial_lora_a

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


def make(folder: Path) -> dict[str, object]:
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


def compress_it(folder: Path) -> dict[str, object]:
    """Time from PEFT folder to modifier file, and the peak of this process."""
    before = _peak()
    began = time.perf_counter()
    adapter, _ = compress_folder(folder / "adapter", folder / "modifier.safetensors")
    seconds = time.perf_counter() - began
    full, size = fp16_bytes(adapter), (folder / "modifier.safetensors").stat().st_size
    return {
        "large: fp16 MB": {"value": full / 1e6, "target": 260, "met": full >= 260e6},
        "large: share on disk": {"value": size / full, "target": 48 / 260, "met": size <= 48 / 260 * full},
        "large: seconds to compress": {"value": seconds, "target": 300, "met": seconds < 300},
        "large: peak memory / size": {"value": _peak() / full, "target": 4, "met": _peak() <= 4 * full},
        "large: of which libraries": {"value": before / full, "target": None, "met": True},
    }


def serve(folder: Path) -> dict[str, object]:
    """From a warm file to the serving form, on 2 threads; and that form against the exact expansion."""
    torch.set_num_threads(2)
    model = _Shapes()
    slot = LoraSlot(model)
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
    limit, held = 48 / 260 * full, slot.resident_bytes
    p50, least = statistics.median(wall), min(wall)
    return {
        "large: ms from warm file to serving form, p50 of 15": {"value": p50, "target": 50, "met": p50 < 50},
        "large: the same, the fastest": {"value": least, "target": 50, "met": least < 50},
        "large: the same, ms of CPU time, p50": {"value": statistics.median(cpu), "target": None, "met": True},
        "large: ms to copy as many bytes, p50 of 15": {"value": statistics.median(plain), "target": None, "met": True},
        "large: resident MB": {"value": held / 1e6, "target": limit / 1e6, "met": held <= limit},
        "large: serving form is the exact expansion": {"value": int(same), "target": 1, "met": bool(same)},
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


class _Shapes(torch.nn.Module):
    """Linear layers of the right shapes whose weights take no memory; nobody computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList()
        for _ in range(BLOCKS):
            block = torch.nn.Module()
            for name, (fan_in, fan_out) in SHAPES.items():
                parent, own = name.split(".")
                if not hasattr(block, parent):
                    setattr(block, parent, torch.nn.Module())
                layer = torch.nn.Linear(1, 1, bias=False)
                layer.in_features, layer.out_features = fan_in, fan_out
                layer.weight = torch.nn.Parameter(torch.zeros(1).expand(fan_out, fan_in), requires_grad=False)
                setattr(getattr(block, parent), own, layer)
            self.model.layers.append(block)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    step = {"make": make, "compress": compress_it, "serve": serve}[sys.argv[1]]
    print(json.dumps(step(Path(sys.argv[2]))))
