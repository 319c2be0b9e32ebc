"""Cost per task and memory of a test of the student from 100 to 12,000 tasks, on a tiny random base.

    python perf/evaluation_scale.py [--counts 100 1000 12000]

Each count runs in a process of its own, block by block as an actor does: answer, judge, write two Parquet parts. CPU
time counts, so that a busy machine changes little; the model is next to nothing, so that what is measured is ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from stand_in import save_tiny_base

from cascade.artifacts import Store, open_run
from cascade.config import Base, PromptStyle
from cascade.models.base import load_base
from cascade.models.student import Student
from cascade.tasks import Message, Task

BLOCK = 64
PLAIN = PromptStyle(name="plain")
FLAT = 1.25
"""Most that cost per task, and memory, may grow from the fewest tasks to the most."""


def question(number: int) -> Task:
    """Half are answered in words, half by likelihood; they differ in length."""
    texts = [f"{word} {number}" for word in ("one", "two", "three", "four")]
    reference = {"answer": number % 4, "labels": list("ABCD"), "texts": texts, "normalise": True}
    likelihood = number % 2 == 0
    return Task(
        f"arc/{number}",
        "arc",
        "scale",
        "train",
        (Message("user", f"Which of these is number {number}?" + " Think." * (number % 7)),),
        reference,
        form="likelihood" if likelihood else "chat",
        choices=tuple(texts) if likelihood else (),
        max_tokens=6,
    )


def run(count: int, folder: Path) -> dict[str, float]:
    """CPU seconds per task, and the process's largest memory in MB."""
    torch.set_num_threads(1)
    student = Student(load_base(Base(model=str(folder / "base"), dtype="float32"), torch.device("cpu")), max_tokens=6)
    target = open_run(Store(str(folder / f"out-{count}")), "scale", "test_domain")
    student.judged([question(i) for i in range(BLOCK)], PLAIN)
    began = time.process_time()
    for start in range(0, count, BLOCK):
        tasks = [question(i) for i in range(start, min(count, start + BLOCK))]
        completions, verdicts = student.judged(tasks, PLAIN)
        target.write_part("base_completions", completions)
        target.write_part("base_verdicts", verdicts)
    target.finish({})
    seconds = time.process_time() - began
    return {"per_task": seconds / count, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 12_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one, arguments.folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_base(Path(folder) / "base")
        print(f"{'tasks':>8}{'CPU ms per task':>18}{'peak MB':>10}")
        for count in arguments.counts:
            command = [sys.executable, __file__, "--one", str(count), "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{count:8}{1000 * rows[-1]['per_task']:18.2f}{rows[-1]['mb']:10.0f}", flush=True)
    cost, memory = (rows[-1][key] / rows[0][key] for key in ("per_task", "mb"))
    figures = {f"cost per task, {arguments.counts[-1]} against {arguments.counts[0]} tasks": cost, "memory": memory}
    print(json.dumps({k: {"value": round(v, 3), "target": FLAT, "met": v <= FLAT} for k, v in figures.items()}))


if __name__ == "__main__":
    main()
