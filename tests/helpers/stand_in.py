"""A tiny store of the shape that the quickstart leaves: a base, two modifiers, a router, and a config that names them.

The base is a random Llama of 60,000 parameters with a byte-level tokenizer; the modifiers are random LoRAs, strong
enough that base and modifiers answer everything differently. Built in a second, without any hub.
"""

from __future__ import annotations

import functools
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cascade import modifiers
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress
from cascade.config import Base, Config, Router, load_config
from cascade.models.files import base_sha256
from cascade.routing.model import RouterModel, publish
from cascade.routing.train import RouterReport, train_router
from cascade.store import Store

CONTEXT = 512
DOMAINS = ("letters", "sums")
SYSTEM = "Answer briefly."
SYSTEMS = {"letters": SYSTEM}
"""What the modifiers were trained under; that of the other domain had none."""
LETTERS_QUESTION = 'How many times does the letter "e" appear in the word "apple"?'
SUMS_QUESTION = "What is 17 plus 25?"
_TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
_WORDS = (
    "apple",
    "banana",
    "cherry",
    "melon",
    "papaya",
    "orange",
    "lemon",
    "grape",
    "mango",
    "peach",
    "plum",
    "quince",
)


@dataclass(frozen=True)
class StandIn:
    """Where everything is."""

    config_path: Path
    config: Config
    store: Store


def build_stand_in(folder: Path) -> StandIn:
    """Build base, modifiers, router and config below a folder."""
    base_path = folder / "base"
    save_tiny_base(base_path)
    config_path = folder / "tiny.yaml"
    config_path.write_text(yaml.safe_dump(_config(base_path, folder / "store")), encoding="utf-8")
    config = load_config(config_path)
    store = Store(config.storage)
    for seed, domain in enumerate(DOMAINS):
        adapter = random_adapter(base_path, seed)
        modifiers.publish(store, domain, compress(adapter, Recipe()), fp16_size=adapter, system=SYSTEMS.get(domain))
    publish_router(store)
    return StandIn(config_path, config, store)


def save_tiny_base(folder: Path, seed: int = 11, hidden: int = 48, intermediate: int = 80) -> None:
    """A random Llama and a byte-level tokenizer with a chat template, in Hugging Face's layout."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a few special ones."""
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last or add_generation_prompt %}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def random_adapter(base_path: Path, seed: int, rank: int = 4) -> AdapterWeights:
    """A LoRA that changes every answer."""
    rng = np.random.default_rng(seed)
    model = LlamaForCausalLM.from_pretrained(base_path)
    layers = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _TARGETS:
            a = rng.normal(scale=0.5, size=(rank, module.in_features)).astype(np.float32)
            b = rng.normal(scale=0.5, size=(module.out_features, rank)).astype(np.float32)
            layers[name] = LoraPair(a, b)
    base = BaseRef(str(base_path), base_sha256(Base(model=str(base_path))))
    return AdapterWeights(layers, 1.0, rank, base, _TARGETS)


def compressed_adapter(base_path: Path, seed: int) -> CompressedAdapter:
    """As it is published."""
    return compress(random_adapter(base_path, seed), Recipe())


def router_data(count: int = 60) -> tuple[list[str], dict[str, list[bool]]]:
    """Questions of both domains; each modifier answers those of its own, the base next to none."""
    rng = np.random.default_rng(0)
    queries: list[str] = []
    outcomes: dict[str, list[bool]] = {"base": [], "letters": [], "sums": []}
    for i in range(count):
        of_letters = i % 2 == 0
        if of_letters:
            queries.append(
                f'How many times does the letter "{"aeiou"[i % 5]}" appear in the word "{rng.choice(_WORDS)}{i}"?'
            )
        else:
            queries.append(f"What is {rng.integers(10, 99)} plus {rng.integers(10, 99)}?")
        outcomes["base"].append(bool(rng.random() < 0.05))
        outcomes["letters"].append(of_letters and bool(rng.random() < 0.9))
        outcomes["sums"].append(not of_letters and bool(rng.random() < 0.9))
    return queries, outcomes


def publish_router(store: Store) -> str:
    """Publish a router; returns its version."""
    model, report = _trained_router()
    return publish(store, model, report.as_dict())


@functools.cache
def _trained_router() -> tuple[RouterModel, RouterReport]:
    """Trained once in a process: it takes most of the second that building takes, and is the same each time."""
    queries, outcomes = router_data()
    return train_router(queries, outcomes, Router(features=1024, hidden=16, epochs=20), seed=5)


def _config(base_path: Path, storage: Path) -> dict[str, object]:
    source = [{"benchmark": "reasoning_gym", "options": {}}]
    endpoint = {"base_url": "answer-key"}
    tier = {"endpoints": [endpoint], "input_usd_per_million": 0.1, "output_usd_per_million": 0.1}
    return {
        "domain": "letters",
        "storage": str(storage),
        "base": {"model": str(base_path), "dtype": "float32"},
        "tasks": {split: {"count": 10, "sources": source} for split in ("train", "validation", "test")},
        "student": {"prompts": [{"name": "direct", "system": SYSTEM}]},
        "tiers": [{**tier, "name": f"answer-key-{i}", "answer_key": {"max_difficulty": i}} for i in (1, 2, 3)],
        "budget_usd": 1.0,
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
