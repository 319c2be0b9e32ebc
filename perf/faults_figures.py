"""The same pipeline on one node, on several, and on several with all state in S3: the same figures?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from faults_lab import Domain, Driver, Figures, Nodes, Row, free_port

from cascade.tasks import Completion, Verdict

OWN = ("wall_seconds", "peak_rss_bytes", "config", "probe_seconds")
"""What a run of its own has, whatever it computes."""
MODELS = ("base", "modifier", "compressed")


def figures(folder: Path, unbroken: Domain, nodes: Nodes) -> list[Row]:
    """Run it twice more, with Ray on this machine alone and with a bucket; compare with the run on several nodes."""
    rows = []
    single = Domain(folder, "single", unbroken.server)
    rows.append(_compared("a single node", single, None, unbroken))
    with bucket() as uri:
        stored = Domain(folder, "stored", unbroken.server, storage=uri)
        rows.append(_compared("several nodes, storage in S3", stored, nodes.address, unbroken))
    return rows


def _compared(name: str, domain: Domain, address: str | None, unbroken: Domain) -> Row:
    began = time.monotonic()
    Driver.job(domain, "pipeline", address).finish()
    seconds = time.monotonic() - began
    mine, theirs = _summary(domain), _summary(unbroken)
    differing = sorted(key for key in theirs if mine[key] != theirs[key])
    changed = sum(_verdicts(domain)[key] != verdict for key, verdict in _verdicts(unbroken).items())
    for key in differing:
        print(f"   {domain.name}: {key} is {mine[key]}, on several nodes {theirs[key]}")
    prefix = f"figures_{domain.name}"
    found: Figures = {
        f"{prefix}_differing": (len(differing), 0, not differing),
        f"{prefix}_verdicts_changed": (changed, 0, changed == 0),
    }
    answers = f"{changed} of {len(_verdicts(unbroken))} answers to test tasks"
    lost = f"{len(differing)} of {len(theirs)} figures of summary.json differ, {answers}"
    return Row("figures", f"the pipeline on {name}, against several nodes", lost, seconds, not changed, found)


def _summary(domain: Domain) -> dict[str, Any]:
    found = json.loads(domain.runs.store.read_bytes("summary.json"))
    return {key: value for key, value in found.items() if key not in OWN}


def _verdicts(domain: Domain) -> dict[tuple[str, str], tuple[str, str]]:
    """Outcome on, and text of the answer to, each test task, by model."""
    run = domain.runs.validate_modifier
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for model in MODELS:
        outcomes = {v.task_id: v.outcome for v in run.read(f"{model}_verdicts", Verdict)}
        texts = {c.task_id: c.text for c in run.read(f"{model}_completions", Completion)}
        found |= {(model, task): (outcome, texts[task]) for task, outcome in outcomes.items()}
    return found


@contextmanager
def bucket() -> Iterator[str]:
    """A bucket's URI, on a server of its own."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(port)
        yield f"s3://cascade-faults/team?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1"
    finally:
        server.terminate()
        server.wait(30)


def _make_bucket(port: int) -> None:
    filesystem = pafs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            filesystem.create_dir("cascade-faults")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
