"""Cost per task and memory of a test of the student from 100 to 12,000 tasks, in the driver and in its actor.

    python perf/evaluation_scale.py [--counts 100 1000 12000]     # 3 minutes on two cores

Each count is a driver of its own with a Ray of its own: tasks fanned out block by block to an actor that answers,
judges and writes two Parquet parts, verdicts brought back, and parts merged. The student is a stand-in, a random base
of 60,000 parameters, next to nothing: what is measured is ours. CPU time counts, so that a busy machine changes little,
and of it what the tasks cost beyond those of the count before, so that what a start costs is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from _figures import at_most

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from evaluation_noted import NotingStudent, largest_mib, noted
from own_ray import local_ray

from cascade.artifacts import open_run
from cascade.config import PromptStyle, load_config
from cascade.store import Store
from cascade.tasks import Message, Task
from ray_jobs import _evaluate
from ray_jobs._context import Job
from ray_jobs._evaluate import Assignment, evaluate
from ray_jobs._runs import Runs

FLAT = 1.25
"""Most that cost per task, and memory, may grow from the fewest tasks to the most."""
PROCESSES = ("driver", "actor")


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


def measure(count: int, config_path: Path) -> dict[str, dict[str, float]]:
    """By process: CPU seconds, tasks that they were spent on, and the process's largest memory in MiB."""
    _evaluate.StudentActor = NotingStudent  # type: ignore[misc, assignment]
    config = load_config(config_path)
    run = open_run(Store(config.storage), "scale", "test_domain")
    run.start(config)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with local_ray():
        began = time.process_time()
        tasks = [question(number) for number in range(count)]
        job = Job(config, cast(Runs, SimpleNamespace()), run)
        evaluate(job, [Assignment("base", tasks, PromptStyle(name="plain"))])
        run.finish({})
        seconds = time.process_time() - began
    *before, last = noted(run.store)
    spent = last["cpu_s"] - before[0]["cpu_s"]
    return {
        "driver": {
            "cpu_s": seconds,
            "tasks": count,
            "mib": largest_mib(),
        },
        "actor": {"cpu_s": spent, "tasks": sum(len(batch["tasks"]) for batch in before), "mib": last["mib"]},
    }


def further(rows: list[dict[str, Any]], process: str) -> list[float]:
    """CPU milliseconds that a task costs which a count has beyond the one before."""
    found = [row[process] for row in rows]
    pairs = zip(found[1:], found, strict=False)
    return [1000 * (more["cpu_s"] - less["cpu_s"]) / (more["tasks"] - less["tasks"]) for more, less in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 12_000], help="three or more, rising")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.config)))
        return
    from pipelines import environment, write_config  # and torch with them, which the measured drivers do without

    rows: list[dict[str, Any]] = []
    print(f"{'':8}{'CPU ms per further task':>28}{'peak MiB':>20}")
    print(f"{'tasks':>8}" + "".join(f"{process:>14}" for process in PROCESSES) + "".join(f"{p:>10}" for p in PROCESSES))
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(prefix="scale-", ignore_cleanup_errors=True) as folder:
            config = write_config(Path(folder))
            command = [sys.executable, __file__, "--one", str(count), "--config", str(config)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        costs = [f"{further(rows, process)[-1]:14.2f}" if len(rows) > 1 else f"{'':14}" for process in PROCESSES]
        print(f"{count:8}{''.join(costs)}" + "".join(f"{rows[-1][p]['mib']:10.0f}" for p in PROCESSES), flush=True)
    figures = {}
    for process in PROCESSES:
        cost = further(rows, process)
        figures[f"cost of a further task in the {process}, most against fewest"] = cost[-1] / cost[0]
        figures[f"memory of the {process}, most against fewest"] = rows[-1][process]["mib"] / rows[0][process]["mib"]
    print(json.dumps({name: at_most(value, FLAT) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
