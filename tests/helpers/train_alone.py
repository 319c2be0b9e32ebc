"""The train_modifier job alone: `python train_alone.py CONFIG [nodes]` trains on its tasks' reference answers.

With `nodes` Ray has a head and one further node of one CPU each; the second goes when the file `CONFIG.fewer` appears
and another comes with `CONFIG.more`.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from cascade import benchmarks
from cascade.config import load_config
from cascade.tasks import Example, Message
from ray_jobs import _train
from ray_jobs._context import Job, connect_ray
from ray_jobs._runs import Runs
from ray_jobs._test import training_style


def examples_of(runs: Runs) -> list[Example]:
    """The training tasks with their reference answers, as a teacher that is never wrong would give them."""
    return [
        Example(
            t.id, t.benchmark, t.domain, t.category, t.difficulty,
            (*t.messages, Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))), "answer-key", 1,
        )
        for t in runs.train_tasks
    ]  # fmt: skip


def follow(path: Path) -> None:
    """A cluster of two nodes that loses one and gets another when told."""
    import os

    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    _train.RESIZE_S = 2.0

    def watch() -> None:
        while not path.with_suffix(".fewer").exists():
            time.sleep(0.2)
        cluster.remove_node(second, allow_graceful=False)
        while not path.with_suffix(".more").exists():
            time.sleep(0.2)
        cluster.add_node(num_cpus=1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    path = Path(sys.argv[1])
    runs = Runs(load_config(path))
    if "nodes" in sys.argv[2:]:
        follow(path)
    connect_ray(runs.config)
    run = runs.train_modifier
    run.start(runs.config)
    run.finish(_train.train_modifier(Job(runs.config, runs, run), examples_of(runs), training_style(runs)))


if __name__ == "__main__":
    main()
