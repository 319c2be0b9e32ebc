"""A 260 MB adapter through save, load and resume: time and memory, beside PEFT's own save and load.

    python perf/training_adapter.py [--layers 3] [--rank 528]

The base is random, in Llama-3.1-8B's shapes but of a few layers, so that it fits a small machine; the adapter is on
all linear layers, 260 MB in fp16. Resume is DeepSpeed's checkpoint of adapter and optimiser, saved and loaded again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from _figures import figure
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from cascade.compression.adapter import load_peft_folder
from cascade.config import Lora, Training
from cascade.models.base import LoadedBase
from cascade.training.deepspeed_engine import DeepSpeedEngine
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, run_steps
from cascade.training.lora import add_lora, save_adapter
from cascade.training.packing import plan_steps
from cascade.training.state_file import write_state

TARGET_BYTES = 260e6


def make_base(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    return model


class Table:
    """Times steps and notes how much memory is in use behind each; of one that is done again the shortest time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        took = time.perf_counter() - began
        self.seconds[name] = min(took, self.seconds.get(name, took))
        used = psutil.Process().memory_info().rss / 1e9
        print(f"{name:48}{took:9.2f} s{used:9.2f} GB in use", flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=528)
    options = parser.parse_args()
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29617")
    table, folder = Table(), Path(tempfile.mkdtemp(prefix="cascade-adapter-"))
    loaded = LoadedBase(make_base(options.layers), None, "random", "")  # type: ignore[arg-type]
    settings = Lora(rank=options.rank, epochs=2, tokens_per_step=64, max_length=64)
    model = table.measure("adapter from its seed", lambda: add_lora(loaded, settings, seed=1))
    examples = [EncodedExample(str(i), tuple(range(5, 37)), (False,) * 24 + (True,) * 8) for i in range(4)]
    plan = plan_steps(examples, settings, seed=1)
    engine = table.measure("DeepSpeed engine", lambda: make_engine(model, settings))
    steps = run_steps(engine, plan, settings)
    table.measure("one optimiser step of 64 tokens", lambda: next(steps))
    state = table.measure("checkpoint: copy, for which steps wait", lambda: engine.state(1))
    assert state is not None, "the only worker is the first"
    same = {"weights": state.weights, "moments": state.moments}
    for _ in range(3):
        table.measure("checkpoint: write, beside the steps", partial(write_state, state, folder / "checkpoint"))
        table.measure("checkpoint: torch.save of the same", partial(torch.save, same, folder / "rival.pt"))
    del state, same
    table.measure("checkpoint: load, to resume", lambda: engine.load(folder / "checkpoint"))
    ours, theirs = folder / "ours", folder / "peft"
    table.measure("adapter: save, fp16", lambda: save_adapter(model, loaded, 1, ours, engine.weights()))
    table.measure("adapter: PEFT's save_pretrained", lambda: model.save_pretrained(str(theirs)))
    table.measure("adapter: load", lambda: load_peft_folder(ours))
    base = model.unload()
    table.measure("adapter: PEFT's from_pretrained", lambda: PeftModel.from_pretrained(base, str(ours)))
    size = (ours / "adapter_model.safetensors").stat().st_size
    kept = sum(f.stat().st_size for f in (folder / "checkpoint").rglob("*") if f.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nadapter {size / 1e6:.1f} MB, checkpoint {kept / 1e6:.1f} MB, peak memory {peak / 1e9:.2f} GB")
    figures = {name: figure(value) for name, value in table.seconds.items()}
    figures["adapter_bytes"] = figure(size, TARGET_BYTES, abs(size / TARGET_BYTES - 1) < 0.02)
    figures["peak_bytes"] = figure(peak)
    print(json.dumps(figures))


def make_engine(model: PeftModel, settings: Lora) -> DeepSpeedEngine:
    return DeepSpeedEngine(TargetLoss(model), Training(lora=settings), torch.device("cpu"), torch.bfloat16)


if __name__ == "__main__":
    main()
