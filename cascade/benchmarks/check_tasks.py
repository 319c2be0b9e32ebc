"""Whether users' own tasks can be solved: every right answer that a task file gives, scored as an answer would be."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cascade.benchmarks.jsonl import BENCHMARK, tasks_of
from cascade.benchmarks.sources import local_files
from cascade.tasks import Completion, Task, Verdict


@dataclass(frozen=True)
class Checked:
    """What became of the right answers of a file or folder.

    Attributes:
        passed: kind -> tasks whose right answer passes.
        failed: verdicts of those that do not.
        unknown: ids of tasks that have no right answer to try (code without a solution, open questions).
    """

    passed: Counter[str]
    failed: list[Verdict]
    unknown: list[str]


def check_tasks(path: str) -> Checked:
    """Load every task at a path, whatever its split, and score its right answer.

    Raises:
        DataError: a line breaks the schema; SandboxError: there is code, and it cannot be confined here.
    """
    return score_references([task for file in local_files(path) for task in tasks_of(file, None, "check")])


def score_references(tasks: Sequence[Task]) -> Checked:
    """Score the right answers of tasks of the benchmark jsonl."""
    known = [t for t in tasks if t.reference["kind"] != "open" and t.reference.get("solution", True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(_judge, known))
    kinds = {t.id: t.reference["kind"] for t in known}
    return Checked(
        passed=Counter(kinds[v.task_id] for v in verdicts if v.passed),
        failed=[v for v in verdicts if not v.passed],
        unknown=[t.id for t in tasks if t.id not in kinds],
    )


def _judge(task: Task) -> Verdict:
    return BENCHMARK.score(task, Completion(task.id, "reference", "", BENCHMARK.reference_answer(task)))
