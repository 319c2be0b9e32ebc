"""What the parts of `faults.py` share: a small pipeline, a cluster of a head and two workers, and drivers to kill."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.cluster_utils import Cluster

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from mock_server import Server
from pipelines import ROOT, environment, write_config
from stand_in import free_port

from cascade import benchmarks
from cascade.config import load_config
from cascade.teachers.ledger import Ledger
from ray_jobs import JOBS
from ray_jobs._runs import Runs

__all__ = ["ROOT", "Domain", "Driver", "Figures", "Nodes", "Row", "Server", "free_port", "wait_until"]

Figures = dict[str, tuple[Any, Any, bool]]
"""figure -> value, target, met"""
TIERS = (1, 2, 3)
IN_FLIGHT = 4
"""Requests that a teacher allows at once: what a kill can cost twice at most."""
CHECKPOINT_STEPS = 40
SOURCES = [
    {
        "benchmark": "reasoning_gym",
        "options": {
            "generators": [
                {"name": "gcd", "difficulty": 1, "options": {"max_value": 30}},
                {"name": "letter_counting", "difficulty": 2, "options": {"min_words": 2, "max_words": 3}},
                {"name": "chain_sum", "difficulty": 3, "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}},
            ]
        },
    }
]
"""Of which a base of 60,000 parameters learns to answer some."""
BUCKET_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Of the S3 server; the nodes hand them to what runs on them."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        back_s: from the kill until the job was further than it had been at the kill (serving: until all is answered).
    """

    fault: str
    happened: str
    lost: str
    back_s: float
    same: bool
    figures: Figures = field(default_factory=dict)


class Domain:
    """A domain of small questions for a tiny random base, with the mock server as its teachers and its own storage."""

    def __init__(self, folder: Path, name: str, server: Server, storage: str | None = None) -> None:
        self.name, self.server = name, server
        self.config_path = folder / f"{name}.yaml"
        self.log = folder / f"{name}.log"
        raw = yaml.safe_load(write_config(folder, storage=storage or str(folder / name)).read_text())
        for split, count in (("train", 96), ("validation", 24), ("test", 60)):
            raw["tasks"][split] = {"count": count, "sources": SOURCES}
        raw |= {"clusters": {"enabled": False}, "probe": {"enabled": False}}
        raw["student"] = {"max_tokens": 8, "prompts": [{"name": "direct"}]}
        raw["tiers"] = [_tier(number, server.url) for number in TIERS]
        raw["training"] = {
            "lora": {"rank": 4, "epochs": 36, "tokens_per_step": 1024, "max_length": 256},
            "checkpoint_steps": CHECKPOINT_STEPS,
        }
        raw["compression"] |= {"trials": 12}
        raw["execution"] = {"task_block": 8, "teacher_actors": 2, "student_actors": 2}
        self.config_path.write_text(yaml.safe_dump(raw), encoding="utf-8")

    @cached_property
    def runs(self) -> Runs:
        return Runs(load_config(self.config_path))

    def teach(self) -> None:
        """Tell the server what each teacher knows: the tasks of its own difficulty and below."""
        book = {}
        for task in self.runs.train_tasks:
            right = benchmarks.get(task.benchmark).reference_answer(task)
            for tier in TIERS:
                book[f"teacher-{tier}|{task.prompt}"] = right if task.difficulty <= tier else "I do not know."
        self.server.learn(book)

    def take_over(self, other: Domain, until: str) -> None:
        """Have what another storage has of the jobs before one, as if they had been run here."""
        source, target = Path(other.runs.config.storage), Path(self.runs.config.storage)
        skip = [f"{job}@*" for job in JOBS[JOBS.index(until) :]]
        if until == "generate_tier1":
            skip.append("ledger")
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*skip, "modifiers", "router"))

    def answered(self) -> Counter[str]:
        """How often each request of the ledger was answered, by its key."""
        return Counter(e.key for e in Ledger(self.runs.store, "sums").entries() if e.responded)


def _tier(number: int, url: str) -> dict[str, Any]:
    limits = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "max_concurrency": IN_FLIGHT}
    prices = {"input_usd_per_million": 5.0**number, "output_usd_per_million": 4 * 5.0**number}
    return {"name": f"teacher-{number}", "endpoints": [{"base_url": url, **limits}], "max_tokens": 64, **prices}


class Driver:
    """A process of the product that joins a cluster; or, without an address, has a Ray of its own."""

    def __init__(self, log: Path, command: Sequence[str], address: str | None) -> None:
        self.log = log
        self.command = [sys.executable, "-m", *command]
        self.environment = environment() | ({"RAY_ADDRESS": address} if address else {})
        self.start()

    @classmethod
    def job(cls, domain: Domain, job: str, address: str | None) -> Driver:
        """A job, or the pipeline."""
        return cls(domain.log, [f"ray_jobs.{job}", "--config", str(domain.config_path)], address)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def check(self) -> None:
        """
        Raises:
            RuntimeError: it has ended with an error.
        """
        if self.process.poll() not in (None, 0):
            raise RuntimeError(f"{' '.join(self.command)} failed:\n{self.log.read_text()[-3000:]}")

    def finish(self) -> None:
        """Wait for its end."""
        try:
            self.process.wait(600)
        finally:
            self.process.kill()
        self.check()

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def wait_until(
    reached: Callable[[], bool], driver: Driver, what: str, seconds: float = 300, pause: float = 0.05
) -> None:
    """
    Raises:
        RuntimeError: it did not come to that.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        driver.check()
        if driver.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not reached\n{driver.log.read_text()[-3000:]}")
        time.sleep(pause)


class Nodes:
    """A head that computes nothing, as in cluster.yaml, and worker nodes that can be killed. Ray's own time limits."""

    def __init__(self, workers: int = 2, cpus: int = 1) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.cpus = cpus
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | _own()
        )
        for _ in range(workers):
            self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        self.cluster.add_node(num_cpus=self.cpus, **_own())

    def where(self, mark: str) -> list[tuple[Any, list[psutil.Process]]]:
        """Worker nodes that have processes whose command has the mark, and these."""
        found = [(n, [p for p in _raylet(n).children(recursive=True) if mark in _command(p)]) for n in self.workers]
        return [(node, processes) for node, processes in found if processes]

    @property
    def workers(self) -> Sequence[Any]:
        return list(self.cluster.worker_nodes)

    def kill(self, node: Any) -> None:
        """SIGKILL all processes of a node at once."""
        for process in (raylet := _raylet(node), *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.cluster.shutdown()


@contextlib.contextmanager
def nodes(workers: int = 2, cpus: int = 1) -> Iterator[Nodes]:
    """A cluster for the time of the block."""
    # Ray's workers run at nice 15 by default: beside any other process, what is timed would wait for it.
    os.environ.update(environment() | {"RAY_worker_niceness": "0"} | BUCKET_KEYS)
    made = Nodes(workers, cpus)
    try:
        yield made
    finally:
        made.close()


def _own() -> dict[str, Any]:
    """Ports whose defaults may belong to another Ray, and little memory."""
    return {"dashboard_agent_listen_port": free_port(), "object_store_memory": 200 * 2**20}


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
