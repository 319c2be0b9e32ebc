"""What perf/serving.py and its contenders share: a store with three modifiers of 48 MB, and clients."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
import yaml
from torch import nn

from cascade import modifiers
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, save_peft_folder
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress
from cascade.config import Base, load_config
from cascade.models.base import load_base
from cascade.models.files import base_folder
from cascade.store import Store

DOMAINS = ("code", "reasoning", "automation")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODIFIER_BYTES = 48e6
QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "Name three rivers in Europe and say where they end.",
    "What is 17 times 23?",
    "Sort these words: pear, apple, fig.",
    "Which tool books a flight from Paris to Rome?",
)


@dataclass(frozen=True)
class Setup:
    """Where everything is."""

    base: Base
    config: Path
    store: Store
    peft: dict[str, Path]


def prepare(folder: Path, model: str, dtype: str, weights: str = "full") -> Setup:
    """Base, store, PEFT folders and config below a folder; what is there already is used again.

    The modifiers weigh 48 MB in the dtype: give each dtype a folder of its own.
    """
    base = Base(model=str(base_folder(Base(model=model))), dtype=dtype)  # type: ignore[arg-type]
    store = Store(str(folder / "store"))
    peft = {d: folder / "peft" / d for d in DOMAINS}
    if not all(modifiers.current(store, d) for d in DOMAINS):
        loaded = load_base(base, torch.device("cpu"))
        number = loaded.model.dtype.itemsize
        for seed, domain in enumerate(DOMAINS):
            adapter = random_adapter(loaded.model, BaseRef(loaded.name, loaded.sha256), number, seed)
            save_peft_folder(adapter, peft[domain])
            modifiers.publish(store, domain, compress(adapter, Recipe()), fp16_size=adapter)
    config = folder / "serving.yaml"
    config.write_text(yaml.safe_dump(_config(base, store.uri, weights)), encoding="utf-8")
    load_config(config)
    return Setup(base, config, store, peft)


def random_adapter(model: nn.Module, base: BaseRef, number: int, seed: int) -> AdapterWeights:
    """A LoRA on all linear layers whose factors weigh 48 MB at `number` bytes each, strong enough to change answers."""
    rng = np.random.default_rng(seed)
    found = {n: m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS and isinstance(m, nn.Linear)}
    rank = int(MODIFIER_BYTES / number / sum(m.in_features + m.out_features for m in found.values()))
    layers = {}
    for name, module in found.items():
        # float16, so that the published file holds the very numbers that PEFT gets.
        a = rng.normal(scale=module.in_features**-0.5, size=(rank, module.in_features)).astype(np.float16)
        b = rng.normal(scale=0.3 * rank**-0.5, size=(module.out_features, rank)).astype(np.float16)
        layers[name] = LoraPair(a.astype(np.float32), b.astype(np.float32))
    return AdapterWeights(layers, 0.5, rank, base, TARGETS)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        leave_after_s: the client goes away so long after it has begun, if the answer is not there yet.
        margins: the answer comes with the log-probabilities of the two likeliest tokens.
    """

    model: str
    question: str
    tokens: int
    stream: bool = False
    leave_after_s: float | None = None
    margins: bool = False


@dataclass
class Answered:
    """What came of a request.

    Attributes:
        seconds: until the answer was whole.
        margins: where the request asked for them, per token its text and by how many nats it was ahead of the next.
    """

    ask: Ask
    status: int = 0
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    left: bool = False
    margins: list[tuple[str, float]] = field(default_factory=list)


async def load(url: str, asks: Sequence[Ask], clients: int) -> tuple[list[Answered], float]:
    """Let so many clients work off the requests; returns what came of each, and the seconds it took."""
    waiting, done = list(enumerate(asks)), {}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client() -> None:
            while waiting:
                number, ask = waiting.pop(0)
                done[number] = await one(http, ask)

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - start
    return [done[i] for i in range(len(asks))], seconds


async def arriving(url: str, asks: Sequence[Ask], per_second: float) -> list[Answered]:
    """Requests that come at a steady rate, whatever becomes of those before; returns what came of each."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        running = []
        for ask in asks:
            running.append(asyncio.create_task(one(http, ask)))
            await asyncio.sleep(1 / per_second)
        return list(await asyncio.gather(*running))


async def one(http: httpx.AsyncClient, ask: Ask) -> Answered:
    """Ask one thing."""
    answered = Answered(ask)
    start = time.perf_counter()
    try:
        async with asyncio.timeout(ask.leave_after_s):
            await _converse(http, ask, answered)
    except TimeoutError:
        answered.left = True
    except httpx.HTTPError as error:
        answered.status, answered.text = -1, repr(error)
    answered.seconds = time.perf_counter() - start
    return answered


def body_of(ask: Ask) -> dict[str, object]:
    """What is sent for it to /v1/chat/completions."""
    body: dict[str, object] = {
        "model": ask.model,
        "messages": [{"role": "user", "content": ask.question}],
        "max_tokens": ask.tokens,
        "temperature": 0,
        "stream": ask.stream,
    }
    if ask.margins:
        body |= {"logprobs": True, "top_logprobs": 2}
    return body | ({"stream_options": {"include_usage": True}} if ask.stream else {})


async def _converse(http: httpx.AsyncClient, ask: Ask, answered: Answered) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=body_of(ask)) as response:
        answered.status, answered.headers = response.status_code, dict(response.headers)
        if not ask.stream or response.status_code != 200:
            answer = response.json() if (await response.aread()) else {}
            if response.status_code == 200:
                answered.text = answer["choices"][0]["message"]["content"]
                answered.tokens = answer["usage"]["completion_tokens"]
                for token in (answer["choices"][0].get("logprobs") or {}).get("content") or ():
                    first, second = (rival["logprob"] for rival in token["top_logprobs"][:2])
                    answered.margins.append((token["token"], first - second))
            return
        ended = False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = httpx.Response(200, content=line[6:]).json()
                answered.tokens = (event.get("usage") or {}).get("completion_tokens", answered.tokens)
                for choice in event.get("choices", ()):
                    answered.text += choice["delta"].get("content") or ""
        if not ended:
            answered.status = -2


def rss_bytes(pid: int | None = None) -> int:
    """Memory of a process that is not shared with others or backed by files it only reads."""
    with open(f"/proc/{pid or os.getpid()}/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def _config(base: Base, storage: str, weights: str) -> dict[str, object]:
    source = [{"benchmark": "reasoning_gym", "options": {}}]
    tier = {"endpoints": [{"base_url": "answer-key"}], "input_usd_per_million": 0.1, "output_usd_per_million": 0.1}
    return {
        "domain": "code",
        "storage": storage,
        "base": base.model_dump(mode="json"),
        "tasks": {split: {"count": 10, "sources": source} for split in ("train", "validation", "test")},
        "tiers": [{**tier, "name": f"answer-key-{i}", "answer_key": {"max_difficulty": i}} for i in (1, 2, 3)],
        "budget_usd": 1.0,
        "serving": {"weights": weights},
    }
