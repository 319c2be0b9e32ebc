"""The train_modifier job alone: `python train_alone.py CONFIG [SECONDS]` trains on its tasks' reference answers.

SECONDS: between two looks at how many workers there could be. Its steps then take `PACE_S` at least.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from cascade import benchmarks
from cascade.config import load_config
from cascade.tasks import Example, Message
from cascade.training.measures import StepReport
from ray_jobs import _train
from ray_jobs._context import Job, Metrics, connect_ray, run_job
from ray_jobs._exit import exit_with_code
from ray_jobs._results import training_style
from ray_jobs._runs import Runs

PACE_S = 0.03
"""Ray learns of new nodes every 20 s: however fast the machine, training must not have ended by then."""


def examples_of(runs: Runs) -> list[Example]:
    """The training tasks with their reference answers, as a teacher that is never wrong would give them."""
    return [
        Example(
            t.id, t.benchmark, t.domain, t.category, t.difficulty,
            (*t.messages, Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))), "answer-key", 1,
        )
        for t in runs.train_tasks
    ]  # fmt: skip


def train(runs: Runs) -> None:
    """Run the job, on the Ray that this process has joined."""

    def work(job: Job) -> Metrics:
        return _train.train_modifier(job, examples_of(runs), training_style(runs))

    run_job("train_modifier", work, runs)


def paced_worker(settings: dict[str, Any]) -> None:
    """The job's own worker, held back to the pace."""
    from ray_jobs import _train_worker

    class Paced(_train_worker.Recorder):
        def add(self, report: StepReport) -> None:
            super().add(report)
            time.sleep(max(0.0, PACE_S - report.seconds))

    _train_worker.Recorder = Paced
    _train_worker.train_worker(settings)


def main() -> None:
    runs = Runs(load_config(sys.argv[1]))
    if len(sys.argv) > 2:
        _train.RESIZE_S, _train.train_worker = float(sys.argv[2]), paced_worker
    connect_ray(runs.config)
    train(runs)


if __name__ == "__main__":
    exit_with_code(main)
