"""Faults on a cluster: what happens, what is lost, and how long until it works again.

    python perf/faults.py                                   # everything
    python perf/faults.py --only training,serving           # of generation, training, search, serving, driver, figures

A pipeline of small questions on a tiny random base runs unbroken on a local Ray cluster: a head that computes nothing
and two worker nodes of one CPU, Ray's own time limits, teachers that are one mock OpenAI server with a bill of its own.
Then each job is run again from what was there before it, and in the middle of it all processes of a worker node are
killed at once (`generation`, `training`, `search`, `serving`), or the driver (`driver`: of what else is named, or of
all four). Its result is compared with the unbroken one. `figures` runs the whole pipeline twice more: on a single
node, and with all state in S3 (moto's server). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _figures import figure
from faults_figures import figures
from faults_jobs import WORKS, strike
from faults_lab import Domain, Driver, Nodes, Row, Server, nodes
from faults_serving import serving
from mock_server import mock_server
from rich.console import Console
from rich.table import Table
from stand_in import build_stand_in

PARTS = ("generation", "training", "search", "serving", "driver", "figures")


def measure(parts: set[str], folder: Path, server: Server, cluster: Nodes) -> Iterator[Row]:
    """The rows of the table, each as soon as it is known."""
    if serve_parts := _struck("serving", parts):
        stand_in = build_stand_in(folder / "served")
        for who in serve_parts:
            yield serving(stand_in, cluster, who)
    works = [(work, who) for work in WORKS for who in _struck(work.name, parts)]
    if works or "figures" in parts:
        unbroken = _unbroken(folder, server, cluster)
        for work, who in works:
            yield strike(work, who, folder, unbroken, cluster)
    if "figures" in parts:
        server.set(latency_s=0.05)
        yield from figures(folder, unbroken, cluster)


def _unbroken(folder: Path, server: Server, cluster: Nodes) -> Domain:
    """The whole pipeline as it is when nothing happens."""
    domain, began = Domain(folder, "unbroken", server), time.monotonic()
    domain.teach()
    Driver.job(domain, "pipeline", cluster.address).finish()
    print(f"the pipeline, unbroken: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return domain


def _struck(name: str, parts: set[str]) -> list[str]:
    """Whether a node is killed under something, and the driver: all of them, or those of what else is named."""
    drivers = "driver" in parts and (name in parts or parts <= {"driver", "figures"})
    return ["node"] * (name in parts) + ["driver"] * drivers


def show(rows: list[Row]) -> None:
    table = Table("what", "what happened", "what was lost", "seconds", "as unbroken", show_lines=True)
    for row in rows:
        table.add_row(row.fault, row.happened, row.lost, f"{row.back_s:.1f}", "yes" if row.same else "NO")
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parts = set(parser.parse_args().only.split(","))
    if unknown := parts - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name,
        mock_server(latency_s=0.05) as server,
        nodes() as cluster,
    ):
        for row in measure(parts, Path(name), server, cluster):
            rows.append(row)
            print(f"{row.fault}: {row.happened}: {row.lost}; {row.back_s:.1f} s", file=sys.stderr, flush=True)
    show(rows)
    found = {name: of for row in rows for name, of in row.figures.items()}
    print(json.dumps({name: figure(*of) for name, of in found.items()}))


if __name__ == "__main__":
    main()
