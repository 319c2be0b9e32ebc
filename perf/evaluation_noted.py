"""`test_domain` with actors that note each batch before they begin it: by that evaluation_killed.py counts.

python -m perf.evaluation_noted --config FILE
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa

from cascade.store import Store
from ray_jobs import _evaluate
from ray_jobs._context import main
from ray_jobs.test_domain import work

JOURNAL = "begun.jsonl"


def noted(store: Store) -> list[dict[str, Any]]:
    """What the actors wrote into a local storage, a row per batch that they began.

    Its keys are `actor` (another one after each start), ids of `tasks`, and of the actor's process until then `cpu_s`
    and `mib`, its CPU time and largest memory.
    """
    return [json.loads(line) for line in store.read_bytes(JOURNAL).splitlines()] if store.exists(JOURNAL) else []


def largest_mib() -> float:
    """This process's largest memory; getrusage would count that of the process which it was forked from."""
    (line,) = (li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class NotingStudent(_evaluate.StudentActor):
    """Otherwise the actor of every job."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.name = uuid.uuid4().hex

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = {
            "actor": self.name,
            "tasks": batch.column("id").to_pylist(),
            "cpu_s": time.process_time(),
            "mib": largest_mib(),
        }
        journal = os.open(self.student.run.store.path(JOURNAL), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(journal, f"{json.dumps(row)}\n".encode())
        os.close(journal)
        return super().__call__(batch)


if __name__ == "__main__":
    _evaluate.StudentActor = NotingStudent  # type: ignore[misc, assignment]
    main("test_domain", work)
