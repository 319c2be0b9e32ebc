"""What perf/routing.py measures on: three modifiers trained on the real base, and who of the four answers what rightly.

The modifiers learn the reference answers of training tasks, so their teacher **replays the answer key**. Every
candidate answers the same held-out tasks of the three domains, asked as when it serves. What took long is kept in a
folder: one JSON file for each candidate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _adapters import DOMAINS as FAMILIES
from _adapters import SYSTEM
from numpy.typing import NDArray

from cascade import benchmarks
from cascade.benchmarks.ordering import shuffled
from cascade.config import Base, Lora, PromptStyle
from cascade.models.base import LoadedBase, default_device, end_token_ids, load_base
from cascade.models.chat import prompt_text
from cascade.models.student import Student
from cascade.routing.model import BASE
from cascade.tasks import Message, Split, Task
from cascade.training.examples import EncodedExample, encode_example
from cascade.training.layout import most_tokens
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora, remove_lora
from cascade.training.packing import plan_steps

CONFIGS = Path(__file__).parent.parent / "configs"
SEED = 17


@dataclass(frozen=True)
class Domain:
    """How a domain is asked here.

    Attributes:
        train: training tasks, `judged` held-out ones that all candidates answer.
        most_tokens: of an answer; the reference answers fit.
        longest: prompts of more tokens are left out, since two cores read some hundred tokens a second.
    """

    name: str
    train: int
    judged: int
    most_tokens: int
    longest: int
    epochs: float
    system: str | None = None


DOMAINS = (
    Domain("automation", 120, 140, 64, 520, 3),
    Domain("code", 200, 120, 128, 256, 2),
    Domain("reasoning", 320, 240, 24, 128, 3, SYSTEM),
)


def tasks(domain: Domain, split: Split, data: Path, count: int, loaded: LoadedBase | None) -> list[Task]:
    """Tasks of a split, in seeded order; with a base those alone whose prompts are short enough."""
    if domain.name == "reasoning":
        options: dict[str, Any] = {"generators": [g for family in FAMILIES.values() for g in family]}
        found = benchmarks.get("reasoning_gym").load(split, domain="reasoning", options=options, seed=SEED, count=count)
    elif domain.name == "code":
        options = {"path": str(data / "mbpp.jsonl"), "form": "chat", "shots": 0}
        found = benchmarks.get("mbpp").load(split, domain="code", options=options, seed=SEED, count=None)
    else:
        source = yaml.safe_load((CONFIGS / "automation.yaml").read_text())["tasks"]["train"]["sources"][0]
        found = benchmarks.get("bfcl").load(
            split, domain="automation", options=source["options"], seed=SEED, count=None
        )
    found = shuffled(found, SEED, len(found))
    if loaded is not None:
        found = [t for t in found if len(_prompt_ids(loaded, t, domain)) <= domain.longest]
    return found[:count]


def _prompt_ids(loaded: LoadedBase, task: Task, domain: Domain) -> list[int]:
    return Student(loaded).prompt_ids(task, PromptStyle(name="as-served", system=domain.system))


def outcomes(folder: Path, data: Path, base: str) -> tuple[list[Task], list[str], dict[str, list[bool]]]:
    """Held-out tasks, the domain of each, and per candidate whether it answered them rightly."""
    loaded = load_base(Base(model=base), default_device())
    asked = [(d, t) for d in DOMAINS for t in tasks(d, "test", data, d.judged, loaded)]
    found = {BASE: _judged(folder / "base.json", loaded, asked, None)}
    for domain in DOMAINS:
        kept = folder / f"{domain.name}.json"
        if not kept.exists():
            model = add_lora(loaded, _lora(domain), SEED)
            try:
                _train(loaded, model, domain, data)
                model.eval()
                _judged(kept, loaded, asked, domain.system)
            finally:
                remove_lora(model)
                loaded.model.requires_grad_(False)
        found[domain.name] = _judged(kept, loaded, asked, domain.system)
    return [t for _, t in asked], [d.name for d, _ in asked], found


def _lora(domain: Domain) -> Lora:
    return Lora(rank=96, learning_rate=1e-3, epochs=domain.epochs, tokens_per_step=1024, max_length=1024)


def _train(loaded: LoadedBase, model: torch.nn.Module, domain: Domain, data: Path) -> None:
    """A modifier from the answer key."""
    lora, ends = _lora(domain), end_token_ids(loaded)
    examples: list[EncodedExample] = []
    for task in tasks(domain, "train", data, domain.train, loaded):
        answer = Message("assistant", benchmarks.get(task.benchmark).reference_answer(task))
        messages = (*task.messages, answer)
        examples.append(encode_example(task.id, messages, loaded.tokenizer, system=domain.system, end_ids=ends))
    module = TargetLoss(model)
    plan = plan_steps(examples, lora, SEED, row_tokens=most_tokens(module.inputs))
    began = time.perf_counter()
    losses = [report.loss for report in run_steps(TorchEngine(module, lora), plan, lora)]
    print(
        f"{domain.name}: {len(examples)} examples, {len(plan)} steps, {time.perf_counter() - began:.0f} s, "
        f"loss {losses[0]:.2f} to {losses[-1]:.3f}",
        flush=True,
    )


def _judged(kept: Path, loaded: LoadedBase, asked: Sequence[tuple[Domain, Task]], system: str | None) -> list[bool]:
    """Verdicts of whatever is on the model, from the file if it is there."""
    wanted = [t.id for _, t in asked]
    if kept.exists():
        passed = json.loads(kept.read_text())
        if set(wanted) <= set(passed):
            return [passed[i] for i in wanted]
    passed, began = {}, time.perf_counter()
    for domain in DOMAINS:
        own = [t for d, t in asked if d is domain]
        student = Student(loaded, max_tokens=domain.most_tokens)
        _, verdicts = student.judged(own, PromptStyle(name="as-served", system=system))
        passed |= {v.task_id: v.passed for v in verdicts}
        share = sum(v.passed for v in verdicts) / len(own)
        print(f"  {kept.stem} on {domain.name}: {share:.1%} of {len(own)}", flush=True)
    kept.write_text(json.dumps(passed))
    print(f"  {kept.stem}: {time.perf_counter() - began:.0f} s", flush=True)
    return [passed[i] for i in wanted]


@torch.inference_mode()
def base_states(loaded: LoadedBase, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the base makes of queries: mean of its last hidden states, and the entropy of its next token.

    Returns:
        Shape (texts, hidden size), each row of length 1; shape (texts, 2): entropy behind the query's last token and
        its mean over the query, in nats.
    """
    states, entropies = [], []
    for text in texts:
        prompt = prompt_text(loaded.tokenizer, [Message("user", text[:2000])])
        ids = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(loaded.device)
        out = loaded.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        mean = out.hidden_states[-1][0].float().mean(0)
        logp = out.logits[0].float().log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        states.append((mean / mean.norm()).cpu().numpy())
        entropies.append([float(entropy[-1]), float(entropy.mean())])
    return np.stack(states), np.array(entropies, dtype=np.float32)
