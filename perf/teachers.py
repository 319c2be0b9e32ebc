"""Teachers: throughput, limits, faults, kills, bills, budgets, precision and memory, against a mock OpenAI server.

    python perf/teachers.py                       # everything, with 12,000 and 100,000 tasks: an hour on two cores
    python perf/teachers.py --tasks 2000 --memory-tasks 5000 --only throughput faults

The server adds 200 ms to every answer and runs on this machine, as do the tools compared with (Bespoke curator and
distilabel, pinned, in environments of their own that this script makes, and ray.data.llm). Rates are the server's own
count from the first request to the last response, so that nobody's start counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from _figures import figure
from own_ray import local_ray
from rich.console import Console
from rich.table import Table
from teachers_faults import faults
from teachers_lab import Figures, Lab, Server, mock_server
from teachers_parts import budget, kills, limits, memory, throughput
from teachers_plan import estimate
from teachers_precision import precision

from cascade.config import load_config
from ray_jobs._generate import generate_answers

PARTS = ("throughput", "limits", "faults", "kills", "budget", "precision", "plan", "memory")


def measure(part: str, server: Server, options: argparse.Namespace) -> Figures:
    """The figures of one part."""
    if part == "throughput":
        with local_ray():
            return throughput(server, options.requests)
    if part == "limits":
        with local_ray():
            return limits(server, options.limit_seconds)
    if part == "faults":
        return faults(server, options.tasks)
    if part == "kills":
        return kills(server, options.requests)
    if part == "budget":
        return budget(server, options.requests)
    if part == "precision":
        with local_ray():
            return precision(server, options.precision_tasks)
    if part == "plan":
        return estimate(server, options.plan_seeds)
    return memory(server, (1000, options.memory_tasks))


def drive(config: str) -> None:
    """A driver by itself, for its memory to be looked at."""
    with local_ray():
        generate_answers(Lab.opened(load_config(config)).job, 1)


def show(figures: dict[str, dict[str, Any]]) -> None:
    """A table for people, then the JSON line."""
    table = Table(title="Teachers", title_justify="left")
    for heading in ("figure", "value", "target", "met"):
        table.add_column(heading)
    for name, of in figures.items():
        target = "" if of["target"] is None else str(of["target"])
        table.add_row(name, str(of["value"]), target, "yes" if of["met"] else "NO")
    Console(width=100).print(table)
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=2000, help="of throughput, kills and budget")
    parser.add_argument("--tasks", type=int, default=12_000, help="of the run with faults")
    parser.add_argument("--limit-seconds", type=float, default=150, help="length of the run under limits")
    parser.add_argument("--precision-tasks", type=int, default=720, help="of each kind")
    parser.add_argument("--plan-seeds", type=int, default=600, help="cascades that are planned and run")
    parser.add_argument("--memory-tasks", type=int, default=100_000)
    parser.add_argument("--driver", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.driver:
        drive(options.driver)
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let everything else on this machine go first
    figures: dict[str, dict[str, Any]] = {}
    with mock_server() as server:
        for part in options.only:
            print(f"{part} …", file=sys.stderr, flush=True)
            found = measure(part, server, options)
            figures |= {name: figure(*of) for name, of in found.items()}
            print(f"  {found}", file=sys.stderr, flush=True)
    show(figures)


if __name__ == "__main__":
    main()
