"""A plain padded PEFT loop on tokenised examples, and what every contender of perf/training.py shares.

Knows nothing of Cascade: this is what one writes with torch, transformers and peft. Run by perf/training.py.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


class Stopwatch:
    """Seconds spent training, without warm-up and validation; the validation loss over that time; peak memory."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.seconds, self.targets, self.tokens, self.computed = job, 0.0, 0, 0, 0
        self.cpu_seconds = 0.0
        self.steps: list[list[float]] = []
        self.counters: list[dict[str, int]] = []
        self.curve: list[list[float]] = []
        self.profile: dict[str, float] = {}
        self.warmup = job["warmup_steps"]
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def step(self, examples: list[dict[str, Any]], validate: Any, computed: Any = None) -> bool:
        """Note a step that just ended; returns whether to go on.

        Args:
            computed: called for how many tokens the model computed, where that is neither those nor padded ones.
        """
        wait_for(self.job["device"])
        now = time.perf_counter()
        if self.warmup > 0:
            self.warmup -= 1
        else:
            self.seconds += now - self.began
            self.cpu_seconds += time.process_time() - self.cpu_began
            targets = sum(sum(e["mask"]) for e in examples)
            self.steps.append([now - self.began, targets])
            self.counters.append(counters(self.job["device"]))
            self.targets += targets
            self.tokens += sum(len(e["ids"]) for e in examples)
            self.computed += computed() if computed else len(examples) * max(len(e["ids"]) for e in examples)
        number = len(self.steps)
        if number and number % self.job["validate_every"] == 0:
            self.curve.append([self.seconds, validate()])
        wait_for(self.job["device"])
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        return number < self.job["steps"] and self.seconds < self.job["most_seconds"]

    def figures(self) -> dict[str, Any]:
        """What perf/training.py takes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.job["device"] == "cuda":
            peak = torch.cuda.max_memory_allocated()
        fields = ("seconds", "cpu_seconds", "targets", "tokens", "computed", "steps", "counters", "curve", "profile")
        return {name: getattr(self, name) for name in fields} | {"peak_bytes": peak}

    def report(self) -> None:
        """Print the figures as the last line."""
        print(json.dumps(self.figures()), flush=True)


def counters(device: str) -> dict[str, int]:
    """How often something has happened until now that makes the step slow in which it does."""
    found = {"collections": gc.get_stats()[2]["collections"]}
    dynamo = sys.modules.get("torch._dynamo.utils")
    found["compilations"] = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
    if device == "cuda":
        memory = torch.cuda.memory_stats()
        found |= {name: memory[name] for name in ("num_alloc_retries", "num_device_alloc")}
    return found


def wait_for(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def read_job(path: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The job (a JSON file, by default the one named on the command line), its training and validation examples."""
    job = json.loads(Path(path or sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    data = json.loads(Path(job["data"]).read_text())
    return job, data["train"], data["validation"]


def load_model(job: dict[str, Any]) -> Any:
    dtype = getattr(torch, job["dtype"])
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(job["device"])


def lora_config(job: dict[str, Any]) -> LoraConfig:
    rank = job["rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def batches(train: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Examples in random order, epoch after epoch."""
    rng = random.Random(0)
    while True:
        order = rng.sample(train, len(train))
        for i in range(0, len(order) - size + 1, size):
            yield order[i : i + size]


@torch.no_grad()
def validation_loss(model: Any, examples: list[dict[str, Any]], device: str) -> float:
    """Mean −log p of the target tokens, each example on its own."""
    total = count = 0.0
    was_training = model.training
    model.eval()
    for example in examples:
        ids = torch.tensor([example["ids"]], device=device)
        mask = torch.tensor(example["mask"][1:], device=device, dtype=torch.bool)
        log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, 1:, None])[:, 0][mask].sum())
        count += int(mask.sum())
    model.train(was_training)
    return total / count


def padded(examples: list[dict[str, Any]], device: str) -> dict[str, torch.Tensor]:
    """The model's arguments for examples padded on the right to the longest."""
    longest = max(len(e["ids"]) for e in examples)
    ids = torch.tensor([e["ids"] + [0] * (longest - len(e["ids"])) for e in examples], device=device)
    seen = torch.tensor([[1] * len(e["ids"]) + [0] * (longest - len(e["ids"])) for e in examples], device=device)
    masks = torch.tensor([e["mask"] + [False] * (longest - len(e["ids"])) for e in examples], device=device)
    return {"input_ids": ids, "attention_mask": seen, "labels": torch.where(masks, ids, -100)}


def main() -> None:
    job, train, validation = read_job()
    model = get_peft_model(load_model(job), lora_config(job))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=job["learning_rate"])
    forward = torch.compile(model, dynamic=True) if job.get("compile") else model
    model.train()
    watch = Stopwatch(job)
    for batch in batches(train, job["batch"]):
        targets = sum(sum(e["mask"]) for e in batch)
        for start in range(0, len(batch), job["micro_batch"]):
            part = batch[start : start + job["micro_batch"]]
            loss = forward(**padded(part, job["device"]), use_cache=False).loss
            (loss * (sum(sum(e["mask"]) for e in part) / targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not watch.step(batch, lambda: validation_loss(model, validation, job["device"])):
            break
    watch.report()


if __name__ == "__main__":
    main()
