"""Probes: short LoRA trainings, cross-fitted, that tell what the student still fails after a tier's data.

The examples are dealt into k folds. For each fold a probe is trained on the others' examples and tested on the
fold's own tasks, so that no task is tested by a probe that saw its answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray

from cascade.config import PromptStyle
from cascade.tasks import Example, Task, Verdict
from ray_jobs._context import Job

VERDICTS = "probe_verdicts"
COMPLETIONS = "probe_completions"
Event = tuple[str, int, int]
"""("training" or "testing", done, total) of one fold."""


def cross_fitted_probes(
    job: Job, tasks: Sequence[Task], examples: Sequence[Example], style: PromptStyle
) -> list[Verdict]:
    """Test every task with a probe that did not see its answer.

    Args:
        tasks: tasks with a verified example.
        examples: all verified examples so far; those of a fold's tasks are left out of its probe's training.

    Returns:
        One verdict per task, in order.
    """
    found = {v.task_id: v for v in job.run.read(VERDICTS, Verdict)}
    folds = deal_folds([*tasks, *(e for e in examples)], job.config.probe.folds)
    execution = job.config.execution
    remote: Any = ray.remote(num_cpus=execution.cpus_per_actor, num_gpus=execution.gpus)(_probe_fold)
    shared = [ray.put(value) for value in (job.config, job.run, list(examples), list(tasks), folds, style)]
    missing = {fold for t in tasks if t.id not in found and (fold := folds[t.id]) is not None}
    events = [remote.options(num_returns="streaming", max_retries=3).remote(*shared, fold) for fold in sorted(missing)]
    _watch(job, events)
    found |= {v.task_id: v for v in job.run.read(VERDICTS, Verdict)}
    return [found[t.id] for t in tasks]


def deal_folds(items: Sequence[Task | Example], folds: int) -> dict[str, int]:
    """Fold of each task id; every category is spread evenly over the folds."""
    keys = {(i.id if isinstance(i, Task) else i.task_id): (i.category, i.difficulty) for i in items}
    ordered = sorted(keys, key=lambda task_id: (keys[task_id], task_id))
    return {task_id: n % folds for n, task_id in enumerate(ordered)}


def _watch(job: Job, generators: list[Any]) -> None:
    """Report the folds' progress until all are done; raises what a fold raised."""
    state: dict[Any, tuple[int, int]] = {}
    waiting: list[Any] = list(generators)
    while waiting:
        ready, _ = ray.wait(waiting, num_returns=1)
        for generator in cast(list[Any], ready):
            try:
                phase, done, total = ray.get(next(generator))
            except StopIteration:
                waiting.remove(generator)
                continue
            state[generator] = (done, total)
            done_all, total_all = (sum(s[i] for s in state.values()) for i in (0, 1))
            job.progress.update(job.run.job, done_all, total_all, f"probe steps, {phase}")


def _probe_fold(*given: Any) -> Iterator[Event]:
    """`probe_fold`, whose module, with torch and all, is imported where it works."""
    from ray_jobs._probe_fold import probe_fold

    yield from probe_fold(*given)
