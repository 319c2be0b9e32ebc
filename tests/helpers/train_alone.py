"""The train_modifier job alone: `python train_alone.py CONFIG [SECONDS]` trains on its tasks' reference answers.

SECONDS: between two looks at how many workers there could be.
"""

from __future__ import annotations

import sys

from cascade import benchmarks
from cascade.config import load_config
from cascade.errors import exit_with_message
from cascade.tasks import Example, Message
from ray_jobs import _train
from ray_jobs._context import Job, Metrics, connect_ray, run_job
from ray_jobs._results import training_style
from ray_jobs._runs import Runs


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


def main() -> None:
    runs = Runs(load_config(sys.argv[1]))
    _train.RESIZE_S = float(sys.argv[2]) if len(sys.argv) > 2 else _train.RESIZE_S
    connect_ray(runs.config)
    train(runs)


if __name__ == "__main__":
    exit_with_message(main)
