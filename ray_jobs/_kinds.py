"""What the report says of the kinds of tasks that the base fails: who repaired them, at what cost, to read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from cascade.reports.data import KindRow, KindSample
from cascade.tasks import Completion, Example, Task
from cascade.teachers.client import Answer
from cascade.teachers.economics import CascadeReport
from ray_jobs._failures import Kinds, failure_kinds
from ray_jobs._results import UNSOLVED, by_id, examples_up_to
from ray_jobs._runs import Runs

TIERS = (1, 2, 3)
SAMPLES_EACH = 1
"""Tasks to read of every kind that came to rest at the same tier."""


def with_provenance(report: CascadeReport, runs: Runs) -> CascadeReport:
    """The tiers' rows with how many of their examples a repair or a judge was needed for."""
    rows = []
    for row in report.tiers:
        examples = runs.generate(row.tier).read("examples", Example)
        repaired, judged = sum(e.repairs > 0 for e in examples), sum(bool(e.judge) for e in examples)
        rows.append(replace(row, by_repair=repaired, by_judge=judged))
    return replace(report, tiers=tuple(rows))


def probe_seconds(runs: Runs) -> float:
    """Compute of the tests between the tiers, which a single teacher would not need."""
    return sum(float(runs.test(tier).manifest.get("seconds", 0.0)) for tier in (1, 2))


def kinds_of_failures(runs: Runs, report: CascadeReport) -> tuple[list[KindRow], list[KindSample]]:
    """A row for every kind, and tasks of each to read; nothing if failures were not clustered."""
    kinds = failure_kinds(runs)
    members: dict[int, list[str]] = defaultdict(list)
    for task_id in sorted(report.settled):
        if task_id in kinds.of:
            members[kinds.of[task_id]].append(task_id)
    trained = {e.task_id for e in runs.train_modifier.read("examples", Example) if e.tier}
    rows = [
        KindRow(
            number=kind.number,
            label=kind.label,
            failures=len(ids := members[kind.number]),
            settled=tuple(sum(report.settled[i] == tier for i in ids) for tier in TIERS),
            unsolved=sum(report.settled[i] is None for i in ids),
            cost_usd=sum(report.paid.get(i, 0.0) for i in ids),
            single_usd=sum(report.single[i] for i in ids),
            trained=sum(i in trained for i in ids),
        )
        for kind in kinds.kinds
    ]
    return rows, _samples(runs, report, kinds, members)


def _samples(runs: Runs, report: CascadeReport, kinds: Kinds, members: dict[int, list[str]]) -> list[KindSample]:
    """Of every kind, tasks that each tier repaired, and one that none did."""
    chosen: list[tuple[int, str]] = []
    for kind in kinds.kinds:
        by_tier: dict[int | None, list[str]] = defaultdict(list)
        for task_id in members[kind.number]:
            by_tier[report.settled[task_id]].append(task_id)
        chosen += [(kind.number, i) for tier in (*TIERS, None) for i in by_tier[tier][:SAMPLES_EACH]]
    tasks = by_id(runs.test_domain.read(UNSOLVED, Task))
    said = {c.task_id: c.text for c in runs.test_domain.read("base_completions", Completion)}
    examples = {e.task_id: e for e in examples_up_to(runs, 3)}
    refused = {a.task_id: a for tier in TIERS for a in runs.generate(tier).read("answers", Answer)}
    samples = []
    for number, i in chosen:
        tier, example = report.settled[i], examples.get(i)
        solved = tier is not None and example is not None
        last = refused[i]
        samples.append(
            KindSample(
                kind=number,
                task_id=i,
                prompt=tasks[i].prompt,
                base_answer=said.get(i, ""),
                tier=tier or 0,
                teacher=example.teacher if solved and example else last.teacher,
                answer=example.messages[-1].content if solved and example else last.text or last.error,
            )
        )
    return samples
