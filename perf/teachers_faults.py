"""A run with faults in which an actor is killed, and then a whole node: is every task accounted for?"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import ray
import ray.data
from ray.cluster_utils import Cluster
from teachers_lab import Figures, Lab, Server, storage
from teachers_tasks import config_for, questions

from cascade.tasks import Example, Verdict
from cascade.teachers.ledger import Ledger
from ray_jobs._generate import generate_answers
from ray_jobs._generate_tables import EXAMPLES, VERDICTS

_NODES = 2


def faults(server: Server, count: int) -> Figures:
    """5 % mixed faults, an actor and a node killed: are all tasks accounted for, and does the ledger fit the bill?"""
    server.set(faults=0.05, hang_s=5.0, latency_s=0.2, seed=1)
    aborts = 0
    with storage() as folder, cluster() as nodes:
        lab = Lab.of(config_for(server.url, folder, actors=4, max_concurrency=64), questions(count, "f"))
        actor = _Killer(server, count // 4, lambda: _kill_actor(nodes))
        node = _Killer(server, count // 2, lambda: _kill_node(nodes))
        with actor, node:
            try:
                generate_answers(lab.job, 1)
            except Exception as error:
                aborts = 1
                print(f"aborted: {error!r}", file=sys.stderr)
        verdicts = lab.job.run.read(VERDICTS, Verdict)
        accounted = len({v.task_id for v in verdicts})
        solved = len({e.task_id for e in lab.job.run.read(EXAMPLES, Example)})
        ledger = Ledger(lab.store, "perf")
        spent, at_most = ledger.spent(), ledger.spent_at_most()
    stats = server.stats()
    gap = abs(spent / stats["charged_usd"] - 1)
    within = stats["charged_usd"] <= at_most + 1e-9
    return {
        "accounted_for": (accounted, count, accounted == count),
        "aborts": (aborts, 0, aborts == 0),
        "actors_killed": (actor.killed, ">= 1", actor.killed >= 1),
        "nodes_killed": (node.killed, f">= 1 of {_NODES}", node.killed >= 1),
        "actors_killed_with_the_node": (node.actors, ">= 1", node.actors >= 1),
        "verified": (solved, None, True),
        "ledger_off_bill": (round(gap, 5), "<= 0.01", gap <= 0.01),
        "bill_within_ledgers_upper_bound": (within, True, within),
    }


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A head that computes nothing, and nodes with room for two teacher actors each and for those of the other."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    # A dead node is noticed sooner than by default.
    noticed = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
    store: dict[str, Any] = {"object_store_memory": 256 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed, **store, **_ports()}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(_NODES):
            made.add_node(num_cpus=1, **store, **_ports())
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def _ports() -> dict[str, Any]:
    """Ports whose defaults may belong to another Ray."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return {"dashboard_agent_listen_port": int(s.getsockname()[1])}


def _kill_actor(nodes: Cluster) -> int:
    """SIGKILL one teacher actor."""
    for node in nodes.worker_nodes:
        for process in _teachers(_raylet(node)):
            process.send_signal(signal.SIGKILL)
            return 1
    return 0


def _kill_node(nodes: Cluster) -> int:
    """SIGKILL all processes of a node that teacher actors are on; returns how many of these there were."""
    for node in nodes.worker_nodes:
        raylet = _raylet(node)
        if teachers := _teachers(raylet):
            for process in (raylet, *raylet.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            return len(teachers)
    return 0


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _teachers(raylet: psutil.Process) -> list[psutil.Process]:
    return [p for p in raylet.children(recursive=True) if "TeacherActor" in _command(p)]


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class _Killer:
    """Kills once, when the server has been asked so many requests.

    Attributes:
        actors: how many teacher actors died.
        killed: whether any did, 0 or 1.
    """

    def __init__(self, server: Server, after: int, kill: Callable[[], int]) -> None:
        self.server, self.after, self.kill = server, after, kill
        self.actors = self.killed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self.killed and not self._stop.wait(0.5):
            if self.server.stats()["arrived"] >= self.after:
                self.actors = self.kill()
                self.killed = min(1, self.actors)
