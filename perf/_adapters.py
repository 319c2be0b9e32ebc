"""Converged adapters on the real base, made by the project's own loop and kept in a folder between runs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade import benchmarks
from cascade.benchmarks.mixture import load_tasks
from cascade.config import Config
from cascade.fingerprints import fingerprint
from cascade.models.base import LoadedBase, end_token_ids
from cascade.tasks import Message, Task
from cascade.training.examples import EncodedExample, encode_example
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora, remove_lora, save_adapter
from cascade.training.packing import Row, pack, plan_steps

SYSTEM = "Give only the final answer."
DOMAINS = {
    "words": [
        {"name": "word_sequence_reversal", "weight": 3, "options": {"min_words": 3, "max_words": 6}},
        {"name": "aiw", "weight": 3, "options": {"max_entities": 6}},
        {"name": "spell_backward", "weight": 2, "options": {"min_word_len": 3, "max_word_len": 5}},
    ],
    "numbers": [
        {"name": "number_sorting", "weight": 3, "options": {"min_numbers": 3, "max_numbers": 5}},
        {"name": "chain_sum", "weight": 3, "options": {"min_terms": 2, "max_terms": 2, "max_digits": 2}},
        {"name": "family_relationships", "weight": 2, "options": {"min_family_size": 4, "max_family_size": 5}},
    ],
}
"""Families of reasoning-gym that the base mostly fails, by domain. Their answers are the answer key's."""
ROW_TOKENS = {"cpu": 512, "cuda": 4096}
"""Of held-out examples computed at once: a GPU spends as long on launching a short row as on a long one."""
_PRICE = {"input_usd_per_million": 0, "output_usd_per_million": 0, "answer_key": {"max_difficulty": 9}}
_TIER = {"endpoints": [{"base_url": "answer-key"}], **_PRICE}


@dataclass(frozen=True)
class Cell:
    """One adapter to compress: what it learned, how large it is, from which seed, and whether A stayed at its start."""

    domain: str
    rank: int
    seed: int
    freeze_a: bool = False

    def __str__(self) -> str:
        return f"{self.domain} r{self.rank} s{self.seed}{' A frozen' if self.freeze_a else ''}"


@dataclass(frozen=True)
class Splits:
    """Encoded examples of a domain: to train on, to search on, and to report on."""

    train: list[EncodedExample]
    validation: list[EncodedExample]
    test: list[EncodedExample]


def config_of(cell: Cell, base: str, counts: tuple[int, int, int], epochs: float) -> Config:
    """What the product would be told for this cell; `counts` of train, validation and test tasks."""
    source = {"benchmark": "reasoning_gym", "options": {"generators": DOMAINS[cell.domain]}}
    splits = zip(("train", "validation", "test"), counts, strict=True)
    rate = 1e-3 if cell.rank <= 32 else 5e-4
    lora = {"rank": cell.rank, "learning_rate": rate, "epochs": epochs, "tokens_per_step": 768, "max_length": 256}
    if cell.freeze_a:
        lora |= {"freeze_a": True, "learning_rate": 2 * rate}  # B alone has to go the whole way
    return Config.model_validate(
        {
            "domain": cell.domain,
            "seed": cell.seed,
            "base": {"model": base},
            "tasks": {name: {"count": count, "sources": [source]} for name, count in splits},
            "tiers": [{"name": f"answer-key-{n}", **_TIER} for n in (1, 2, 3)],
            "budget_usd": 1,
            "training": {"lora": lora},
        }
    )


def encoded(config: Config, loaded: LoadedBase) -> Splits:
    """All splits with their reference answers as targets."""

    def split(tasks: list[Task]) -> list[EncodedExample]:
        return [_encode(task, loaded) for task in tasks]

    return Splits(*(split(load_tasks(config, name)) for name in ("train", "validation", "test")))  # type: ignore[arg-type]


def _encode(task: Task, loaded: LoadedBase) -> EncodedExample:
    answer = Message("assistant", benchmarks.get(task.benchmark).reference_answer(task))
    return encode_example(
        task.id, (*task.messages, answer), loaded.tokenizer, system=SYSTEM, end_ids=end_token_ids(loaded)
    )


def trained_adapter(config: Config, loaded: LoadedBase, splits: Splits, cache: Path) -> Path:
    """PEFT folder of a cell's adapter, trained on first use."""
    key = fingerprint(tasks=config.tasks, seed=config.seed, training=config.training, base=loaded.sha256)
    lora = config.training.lora
    folder = cache / f"{config.domain}-r{lora.rank}-s{config.seed}-{key}"
    if (folder / "curve.json").exists():
        return folder
    began = time.perf_counter()
    model = add_lora(loaded, lora, config.seed)
    try:
        engine = TorchEngine(TargetLoss(model), lora)
        plan = plan_steps(splits.train, lora, config.seed)
        curve = []
        for report in run_steps(engine, plan, lora):
            curve.append(report.loss)
            if report.step % 20 == 0:
                print(f"  step {report.step} of {len(plan)}: loss {report.loss:.3f}", flush=True)
        save_adapter(model, loaded, config.seed, folder)
    finally:
        remove_lora(model)
        loaded.model.requires_grad_(False)
    seconds = time.perf_counter() - began
    (folder / "curve.json").write_text(json.dumps({"loss": curve, "seconds": seconds}))
    print(f"  trained {folder.name} in {seconds:.0f} s: loss {curve[0]:.2f} to {curve[-1]:.3f}", flush=True)
    return folder


@dataclass(frozen=True)
class Measure:
    """How a model does on held-out examples.

    Attributes:
        loss: mean cross-entropy per target token, nats.
        correct: per example, whether greedy decoding gives the reference answer word for word: it does exactly if
            the most likely token is the right one at every position of the answer, its end included.
        losses: cross-entropy of every target token, nats, in one order for the same examples.
    """

    loss: float
    correct: tuple[bool, ...]
    losses: torch.Tensor

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    def drift(self, other: Measure) -> float:
        """Mean change of a target's log-probability, nats, either way."""
        return float((self.losses - other.losses).abs().mean())


@torch.no_grad()
def measure(loaded: LoadedBase, examples: list[EncodedExample]) -> Measure:
    """Loss and greedy exact match, in one pass without generating."""
    losses, right = [], {}
    for row in pack(examples, ROW_TOKENS[loaded.device.type]):
        batch = row.tensors(loaded.device)
        logits = loaded.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            logits_to_keep=batch["target_index"],
        ).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), batch["target_ids"], reduction="none").cpu())
        hits = (logits.argmax(-1) == batch["target_ids"]).tolist()
        at = 0
        for example in row.examples:
            right[example.sample_id] = all(hits[at : at + example.targets])
            at += example.targets
    joined = torch.cat(losses)
    return Measure(float(joined.mean()), tuple(right[e.sample_id] for e in examples), joined)


def rows_for_calibration(splits: Splits, count: int = 16) -> list[Row]:
    """Some packed training rows."""
    rows = pack(splits.train, 256)
    return rows[:: max(1, len(rows) // count)][:count]
