"""Where the control plane saturates: 1, 2, 4 … 256 virtual nodes' worth of teachers and students on this machine.

    python perf/scale.py [--nodes 1 2 4 8 16 32 64 128 256] [--seconds 15]     # 6 minutes on two cores

A virtual node is a teacher actor with 32 requests in flight whose endpoint sleeps five seconds for each: 6.4 requests
per second. All else is what a job runs: desk (limiter and budget), ledger, the driver's display. Nodes share two
processes, so on two cores those are full before the desk's one is: CPU seconds per request say how far each part
goes with a core of its own. Then the driver by blocks of sleeping students, and the ledger by rows. JSON comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.data
from _figures import figure
from own_ray import local_ray
from ray.data import ActorPoolStrategy
from scale_nodes import LATENCY_S, PLACES, Crowd, SleepingStudent, config_for, question

from cascade.store import Store
from cascade.tasks import Task, Verdict, to_table
from cascade.teachers.ledger import Ledger, LedgerEntry, Sent
from ray_jobs._desk import open_desk
from ray_jobs._meter import TierMeter

PROCESSES = 2
BLOCK = 64
"""Tasks of a block of students, as `execution.task_block` has it."""
SATURATED = 0.9
"""Share of what the nodes could do below which something is in their way."""


@dataclass(frozen=True)
class Load:
    """What so many nodes came to. CPU in seconds per second, memory in MiB."""

    nodes: int
    per_second: float
    share: float
    desk_cpu: float
    driver_cpu: float
    nodes_cpu: float
    desk_mib: float
    node_mib: float


def teachers(nodes: int, seconds: float) -> Load:
    """Run so many virtual nodes against one desk, with the driver's display."""
    with tempfile.TemporaryDirectory(prefix="scale-", ignore_cleanup_errors=True) as folder:
        config = config_for(folder, nodes)
        desk = open_desk(config, Store(folder), 1)
        remote: Any = ray.remote(Crowd).options(num_cpus=0, max_concurrency=8)
        first = min(PROCESSES, nodes)
        crowds = [remote.remote(config, desk, range(n, nodes, first)) for n in range(first)]
        running = [crowd.run.remote() for crowd in crowds]
        meter, me = TierMeter(1, "sleeper", 10**9, 0, 0, 1e6), psutil.Process()
        desk_process = psutil.Process(ray.get(desk.__ray_call__.remote(lambda _: os.getpid())))
        try:
            _show(desk, meter, 2 * LATENCY_S)
            before, began = _reading(crowds, desk_process, me), time.monotonic()
            _show(desk, meter, seconds)
            after, took = _reading(crowds, desk_process, me), time.monotonic() - began
        finally:
            for actor in (*crowds, desk):
                ray.kill(actor)
        del running
    answered, desk_cpu, driver_cpu, nodes_cpu = ((b - a) / took for a, b in zip(before[:4], after[:4], strict=True))
    return Load(
        nodes, answered, answered * LATENCY_S / (PLACES * nodes), desk_cpu, driver_cpu, nodes_cpu, *_mib(after, nodes)
    )


def _show(desk: Any, meter: TierMeter, seconds: float) -> None:
    """What the driver does while it waits: once a second it takes in what is done."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1.0)
        for news in ray.get(desk.take_done.remote()):
            meter.add(news.passed, news.cost_usd, news.paid_usd, news.requests)
        meter.state()


def _reading(crowds: list[Any], desk: psutil.Process, me: psutil.Process) -> tuple[float, ...]:
    """Answered; CPU seconds of desk, driver and nodes; bytes of the desk and the nodes."""
    found = ray.get([crowd.so_far.remote() for crowd in crowds])
    sums = [sum(column) for column in zip(*found, strict=True)]
    return sums[0], _cpu(desk), _cpu(me), sums[1], _private(desk), sums[2]


def _mib(reading: tuple[float, ...], nodes: int) -> tuple[float, float]:
    return reading[4] / 2**20, reading[5] / 2**20 / nodes


def _cpu(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def _private(process: psutil.Process) -> int:
    """Resident memory without what is shared, such as the object store."""
    used = process.memory_info()
    return int(used.rss - used.shared)


def driver(blocks: int) -> dict[str, float]:
    """A driver over so many blocks of sleeping students: seconds, its CPU, and by how much its memory grew."""
    with local_ray():
        tasks = [question(0, n) for n in range(BLOCK)]
        tables = [to_table(Task, tasks)] * blocks
        me = psutil.Process()
        before, cpu, began = _private(me), _cpu(me), time.monotonic()
        pool = ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=16, max_tasks_in_flight_per_actor=17)
        rows = ray.data.from_arrow(tables).map_batches(
            SleepingStudent,
            batch_size=None,
            batch_format="pyarrow",
            compute=pool,
            num_cpus=0.25,
            fn_constructor_kwargs={"seconds": 0.1},
        )
        verdicts = sum(len(b) for b in rows.iter_batches(batch_size=None, batch_format="pyarrow"))
        assert verdicts == blocks * BLOCK
        took = time.monotonic() - began
        return {"seconds": took, "cpu": _cpu(me) - cpu, "mib": (_private(me) - before) / 2**20}


def held(count: int) -> dict[str, float]:
    """What a task and its verdict take in the driver of a test, which holds them all."""
    me = psutil.Process()
    before = _private(me)
    tasks = [question(0, n) for n in range(count)]
    verdicts = {t.id: Verdict(t.id, "base", "", "fail") for t in tasks}
    assert len(verdicts) == count
    return {"bytes": (_private(me) - before) / count}


def ledger(rows: int) -> dict[str, float]:
    """Writing rows (two lines each) and reading them again: CPU, bytes on disk, bytes in memory."""
    me = psutil.Process()
    with tempfile.TemporaryDirectory(prefix="scale-", ignore_cleanup_errors=True) as folder:
        writer, cpu = Ledger(Store(folder), "scale"), _cpu(me)
        for n in range(rows):
            key = f"{n:064x}"
            writer.append(Sent(key, "scale", 1, 0.01))
            last = writer.append(LedgerEntry(key, "scale", 1, f"t/{n}", 0, "m", "u", text="word " * 300))
        last.result()
        writer.close()
        written = _cpu(me) - cpu
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.jsonl"))
        del writer
        _trim()
        before, cpu = _private(me), _cpu(me)
        reader = Ledger(Store(folder), "scale")
        assert len(reader) == rows
        read = _cpu(me) - cpu
        _trim()
        return {
            "write_us": 1e6 * written / rows,
            "read_us": 1e6 * read / rows,
            "disk_bytes": size / rows,
            "memory_bytes": (_private(me) - before) / rows,
        }


def _trim() -> None:
    """Give back what was freed, where the C library can: what stays is what is held."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def apart(part: str, number: int) -> dict[str, float]:
    """A part in a process of its own, so that its memory is its own."""
    done = subprocess.run([sys.executable, __file__, "--part", part, str(number)], check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(loads: list[Load]) -> None:
    print(f"{'nodes':>6}{'requests/s':>12}{'of allowed':>12}{'CPU: desk':>11}{'driver':>8}{'nodes':>8}", end="")
    print(f"{'desk MiB':>10}{'MiB/node':>10}")
    for x in loads:
        print(f"{x.nodes:6}{x.per_second:12.1f}{x.share:12.1%}{x.desk_cpu:11.2f}{x.driver_cpu:8.2f}", end="")
        print(f"{x.nodes_cpu:8.2f}{x.desk_mib:10.0f}{x.node_mib:10.1f}")


def figures(loads: list[Load]) -> dict[str, float]:
    """How far the nodes could be fed here, and what one core for each part would carry."""
    last = max(loads, key=lambda x: x.per_second)
    return {
        "nodes fed here": max((x.nodes for x in loads if x.share >= SATURATED), default=0),
        "requests/s here": round(last.per_second, 1),
        "requests/s of a core of the desk": round(last.per_second / last.desk_cpu),
        "requests/s of a core of the driver": round(last.per_second / last.driver_cpu),
        "requests/s of a core of teacher actors": round(last.per_second / last.nodes_cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2**n for n in range(9)])
    parser.add_argument("--seconds", type=float, default=15.0, help="for which each number of nodes is looked at")
    parser.add_argument("--blocks", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--rows", type=int, default=100_000, help="of the ledger, and of tasks in a driver")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = {"driver": driver, "held": held, "ledger": ledger}
    if options.part:
        print(json.dumps(parts[options.part[0]](int(options.part[1]))))
        return
    os.environ.setdefault("RAY_worker_niceness", "0")
    with local_ray():
        loads = [teachers(nodes, options.seconds) for nodes in options.nodes]
    show(loads)
    found = figures(loads)
    for blocks in options.blocks:
        part = apart("driver", blocks)
        print(
            f"driver, {blocks} blocks: {part['seconds']:.1f} s, {part['cpu']:.1f} s of CPU, {part['mib']:.0f} MiB more"
        )
        found |= {f"driver: CPU ms per block of {blocks}": round(1000 * part["cpu"] / blocks, 2)}
        found |= {f"driver: kB per block of {blocks}": round(1024 * part["mib"] / blocks, 1)}
    found |= {"driver of a test: bytes per task": round(apart("held", options.rows)["bytes"])}
    found |= {f"ledger: {name} per row": round(value) for name, value in apart("ledger", options.rows).items()}
    for name, value in found.items():
        print(f"{name}: {value:g}")
    print(json.dumps({name: figure(value) for name, value in found.items()}))


if __name__ == "__main__":
    main()
