"""Precision: of the answers that are accepted, how many are right, when a known share of them was planted wrong?"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from teachers_lab import Figures, Lab, Server, storage
from teachers_tasks import config_for

from cascade import benchmarks
from cascade.scoring.statistics import wilson
from cascade.tasks import Example, Task
from ray_jobs._generate import generate_answers
from ray_jobs._generate_tables import EXAMPLES

_WRONG_SHARE = 0.4
Made = tuple[list[Task], dict[str, str], set[str]]
"""Tasks, what the teacher answers to each prompt, and the ids whose answer is wrong."""


def precision(server: Server, count: int) -> Figures:
    """The share of the accepted answers that is right, for each kind; and how many of the right ones are kept.

    What is compared with the target is the lower bound of the 95 % interval: it takes 381 answers, all of them right.
    """
    figures: Figures = {}
    for kind, make in {"code": _code, "reasoning": _reasoning, "calls": _calls}.items():
        with storage() as folder:
            tasks, book, wrong = make(count, Path(folder), random.Random(kind))
            server.set(latency_s=0.05)
            server.learn(book)
            lab = Lab.of(config_for(server.url, f"{folder}/out", actors=2, max_tokens=512, timeout_s=30), tasks)
            generate_answers(lab.job, 1)
            accepted = {e.task_id for e in lab.job.run.read(EXAMPLES, Example)}
        right, n = len(accepted - wrong), len(accepted)
        interval = wilson(right, n)
        kept = right / (len(tasks) - len(wrong))
        planted = f"{len(wrong)} planted wrong, {kept:.1%} of the right kept"
        value = f"{right}/{n} [{interval.low:.3f}, {interval.high:.3f}], {planted}"
        figures[f"precision_{kind}"] = (value, "lower bound >= 0.99", interval.low >= 0.99)
    return figures


def _load(lines: list[dict[str, object]], folder: Path) -> list[Task]:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = benchmarks.get("jsonl").load("train", domain="perf", options={"path": str(path)}, seed=0, count=None)
    return sorted(found, key=lambda t: int(t.id.rsplit("/", 1)[-1]))


def _plant(tasks: list[Task], right: list[str], wrong: list[str], chance: random.Random) -> Made:
    planted = {i for i in range(len(tasks)) if chance.random() < _WRONG_SHARE}
    book = {t.prompt: wrong[i] if i in planted else right[i] for i, t in enumerate(tasks)}
    return tasks, book, {tasks[i].id for i in planted}


_FUNCTIONS: tuple[tuple[str, str, tuple[str, ...], Callable[[list[int], int], object]], ...] = (
    ("the sum of the numbers above {k}", "sum(x for x in xs if x > {k})",
     ("sum(x for x in xs if x >= {k})", "sum(x for x in xs)", "sum(xs[{k}:])"),
     lambda xs, k: sum(x for x in xs if x > k)),
    ("how many numbers are multiples of {k}", "sum(x % {k} == 0 for x in xs)",
     ("sum(x % {k} != 0 for x in xs)", "len([x for x in xs if x / {k} > 1])", "len(xs) // {k}"),
     lambda xs, k: sum(x % k == 0 for x in xs)),
    ("the numbers, each multiplied by {k}, largest first", "sorted((x * {k} for x in xs), reverse=True)",
     ("sorted(x * {k} for x in xs)", "[x * {k} for x in xs]", "sorted((x + {k} for x in xs), reverse=True)"),
     lambda xs, k: sorted((x * k for x in xs), reverse=True)),
)  # fmt: skip


def _code(count: int, folder: Path, chance: random.Random) -> Made:
    """Functions over lists; the wrong ones look right, return a constant, forge equality or end the process early."""
    lines: list[dict[str, object]] = []
    right, wrong = [], []
    for i in range(count):
        text, body, slips, value = _FUNCTIONS[i % len(_FUNCTIONS)]
        k = chance.randint(2, 6)
        samples = [[1, k, k + 1, 2 * k, 3 * k + 1, 7], [chance.randint(1, 40) for _ in range(8)], [k, k, 5 * k]]
        tests = [f"assert f{i}({xs}) == {value(xs, k)!r}" for xs in samples]
        lines.append({"id": i, "kind": "unit_tests", "prompt": f"Write f{i}(xs): {text.format(k=k)}.", "tests": tests})
        right.append(f"```python\ndef f{i}(xs):\n    return {body.format(k=k)}\n```")
        slip = chance.choice(slips).format(k=k)
        cheats = [
            f"def f{i}(xs):\n    return {slip}",
            f"def f{i}(xs):\n    return {value(samples[0], k)!r}",
            f"class E(int):\n    def __eq__(self, other):\n        return True\ndef f{i}(xs):\n    return E(0)",
            f"import os\ndef f{i}(xs):\n    os._exit(0)",
            f"def f{i}(xs):\n    return",
        ]
        wrong.append(f"```python\n{cheats[i % len(cheats)]}\n```")
    tasks = _load(lines, folder)
    return _plant(tasks, right, wrong, chance)


def _reasoning(count: int, folder: Path, chance: random.Random) -> Made:
    """Sums and differences; the wrong ones are near, have a digit swapped, or name the right number on the way."""
    lines: list[dict[str, object]] = []
    right, wrong = [], []
    for i in range(count):
        a, b = chance.randint(100, 999), chance.randint(10, 99)
        value = a + b if i % 2 else a - b
        lines.append(
            {"id": i, "kind": "exact", "prompt": f"No. {i}: {a} {'+' if i % 2 else '-'} {b} = ?", "answer": value}
        )
        right.append(chance.choice([f"{value}", f"Final answer: {value}", f"<think>{a}, {b}</think>{value}"]))
        off = value + chance.choice([-10, -1, 1, 10, 100])
        wrong.append(
            chance.choice([f"{off}", f"Final answer: {off}", f"It is not {value}, the answer is {off}", f"{value}0"])
        )
    tasks = _load(lines, folder)
    return _plant(tasks, right, wrong, chance)


def _calls(count: int, folder: Path, chance: random.Random) -> Made:
    """Calls of one of two functions; the wrong ones have a wrong value, name or type, or a call too many."""
    kinds = {"city": {"type": "string"}, "days": {"type": "integer"}}
    functions = [
        {"name": n, "parameters": {"type": "dict", "properties": kinds, "required": ["city", "days"]}}
        for n in ("get_weather", "get_traffic")
    ]
    lines: list[dict[str, object]] = []
    right, wrong = [], []
    for i in range(count):
        name, other = chance.sample(["get_weather", "get_traffic"], 2)
        city, days = chance.choice(["Oslo", "Lima", "Pune", "Graz"]), chance.randint(1, 9)
        expected = [{name: {"city": [city], "days": [days]}}]
        prompt = f"Case {i}: {name.removeprefix('get_')} in {city} for {days} days."
        lines.append({"id": i, "kind": "calls", "prompt": prompt, "functions": functions, "expected": expected})
        call = f"{name}(city={city!r}, days={days})"
        right.append(f"[{call}]")
        wrong.append(
            chance.choice([
                f"[{name}(city={city!r}, days={days + 1})]",
                f"[{other}(city={city!r}, days={days})]",
                f"[{name}(city={city!r}, days='{days}')]",
                f"[{call}, {call}]",
                f"[{name}(city={city!r})]",
                f"[{name}(city={city!r}, days={days}, unit='C')]",
            ])
        )  # fmt: skip
    tasks = _load(lines, folder)
    return _plant(tasks, right, wrong, chance)
