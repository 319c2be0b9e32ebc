"""Learning rate, schedule, epochs and rank side by side: what the defaults of `training.lora` are chosen by.

    python perf/training_defaults.py [--train 160] [--test 120] [--threads 1] [--only REGEX]

One setting at a time is changed from a centre. Every cell trains a modifier on the same tasks of the quickstart
(reasoning-gym; the answers are the tasks' **own answer key**), from the same start and in the same order, and is
measured on the same held-out tasks: mean −log p of a reference answer's token with the paired difference to the
centre, and exact answers, all with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _figures import figure

from cascade import benchmarks
from cascade.benchmarks.mixture import load_tasks
from cascade.config import Lora, PromptStyle, check_config, load_config
from cascade.models.base import LoadedBase, end_token_ids, load_base
from cascade.models.student import Student
from cascade.scoring.statistics import mcnemar_exact, paired_bootstrap, wilson
from cascade.tasks import Message, Task
from cascade.training.examples import EncodedExample, encode_example
from cascade.training.layout import most_tokens
from cascade.training.loop import TargetLoss, TorchEngine, mean_loss, run_steps
from cascade.training.lora import add_lora, remove_lora
from cascade.training.packing import Row, plan_steps

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
STYLE = PromptStyle(name="direct", system="Give only the final answer.")
CENTRE = Lora(rank=16, learning_rate=1e-3, epochs=3, tokens_per_step=512, max_length=256)
CELLS: dict[str, dict[str, Any]] = {
    "centre: 1e-3, cosine, 3 epochs, rank 16": {},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "linear": {"schedule": "linear"},
    "constant": {"schedule": "constant"},
    "constant, learning rate 2e-3": {"schedule": "constant", "learning_rate": 2e-3},
    "5 epochs": {"epochs": 5},
    "rank 64": {"rank": 64},
}


@dataclass(frozen=True)
class Cell:
    """What one setting came to.

    Attributes:
        losses: of each held-out task, the mean over its answer's tokens (nats).
        passed: whether each was answered rightly.
        last: training loss, mean of the last tenth of the steps.
    """

    steps: int
    seconds: float
    last: float
    losses: list[float]
    passed: list[bool]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    raw = load_config(QUICKSTART).model_dump(mode="json")
    for part, count in (("train", options.train), ("test", options.test)):
        raw["tasks"][part]["count"] = count
    config = check_config(raw)
    loaded = load_base(config.base, torch.device(options.device))
    train, test = (load_tasks(config, part) for part in ("train", "test"))
    examples, held_out = encoded(loaded, train), encoded(loaded, test)
    print(
        f"{loaded.name}, {loaded.model.dtype}, {len(examples)} examples of {sum(map(len, examples))} tokens, "
        f"{len(test)} held-out tasks, seed {options.seed}\n",
        flush=True,
    )
    cells: dict[str, Cell] = {}
    for name, changes in CELLS.items():
        if re.search(options.only, name) or not cells:  # all are compared with the first
            cells[name] = measured(loaded, CENTRE.model_copy(update=changes), examples, held_out, test, options.seed)
            show(name, cells[name], next(iter(cells.values())))
    print(json.dumps(figures(cells)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--test", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="regular expression of the cells' names; the centre is always there")
    return parser.parse_args()


def encoded(loaded: LoadedBase, tasks: list[Task]) -> list[EncodedExample]:
    """Tasks with their reference answers."""
    ends = end_token_ids(loaded)
    found = []
    for task in tasks:
        messages = (*task.messages, Message("assistant", benchmarks.get(task.benchmark).reference_answer(task)))
        found.append(encode_example(task.id, messages, loaded.tokenizer, system=STYLE.system, end_ids=ends))
    return found


def measured(
    loaded: LoadedBase,
    lora: Lora,
    examples: list[EncodedExample],
    held_out: list[EncodedExample],
    test: list[Task],
    seed: int,
) -> Cell:
    """Train with these settings and look at the held-out tasks."""
    model = add_lora(loaded, lora, seed)
    try:
        module = TargetLoss(model)
        plan = plan_steps(examples, lora, seed, row_tokens=most_tokens(module.inputs))
        began = time.perf_counter()
        found = [report.loss for report in run_steps(TorchEngine(module, lora), plan, lora)]
        seconds = time.perf_counter() - began
        losses = [mean_loss(module, [Row((e,))], loaded.device) for e in held_out]
        _, verdicts = Student(loaded, max_tokens=48).judged(test, STYLE)
        last = statistics.mean(found[-max(1, len(found) // 10) :])
        return Cell(len(found), seconds, last, losses, [v.passed for v in verdicts])
    finally:
        remove_lora(model)
        loaded.model.requires_grad_(False)


def paired_mean(after: list[float], before: list[float]) -> tuple[float, float, float]:
    """Mean difference with its 95 % interval (normal)."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    mean, spread = statistics.mean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - spread, mean + spread


def show(name: str, cell: Cell, centre: Cell) -> None:
    n, passed = len(cell.passed), sum(cell.passed)
    bounds = wilson(passed, n)
    line = f"{name:42}{cell.steps:4} steps {cell.seconds:5.0f} s  training loss {cell.last:.3f}  "
    line += f"held-out {statistics.mean(cell.losses):.3f}"
    if cell is not centre:
        mean, low, high = paired_mean(cell.losses, centre.losses)
        line += f" ({mean:+.3f} [{low:+.3f}, {high:+.3f}])"
    line += f"  exact {passed / n:.1%} [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}] of {n}"
    if cell is not centre:
        change = paired_bootstrap(centre.passed, cell.passed)
        line += f" ({100 * (passed - sum(centre.passed)) / n:+.1f} points [{100 * change.low:+.1f}, "
        line += f"{100 * change.high:+.1f}], p {mcnemar_exact(centre.passed, cell.passed):.2g})"
    print(line, flush=True)


def figures(cells: dict[str, Cell]) -> dict[str, Any]:
    """Every cell's held-out loss and share of exact answers; a cell has no target of its own."""
    found: dict[str, Any] = {}
    for name, cell in cells.items():
        for what, value in (
            ("held_out_loss", statistics.mean(cell.losses)),
            ("exact", statistics.mean(map(float, cell.passed))),
        ):
            found[f"{what}, {name}"] = figure(value, n=len(cell.passed))
    return found


if __name__ == "__main__":
    main()
