"""What a modifier is trained on: verified examples of all tiers and replayed passes, each once, none that overlaps a
test task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cascade.benchmarks.protected import protected_tasks
from cascade.clusters import cap
from cascade.scoring.decontaminate import clean, deduplicate
from cascade.tasks import Completion, Example, Task, Verdict, message_hash
from ray_jobs._context import Job, Metrics
from ray_jobs._embed import embed_failures
from ray_jobs._failures import failure_kinds
from ray_jobs._results import by_id, examples_up_to


def training_examples(job: Job) -> tuple[list[Example], Metrics]:
    """The training set, and how it came to be.

    Examples that overlap a test task of this domain or of a protected benchmark (13-grams or the same normalised text)
    are left out and counted, and so are those that nearly repeat an earlier one, and what a kind of task has beyond
    the cap.
    """
    taught = examples_up_to(job.runs, 3)
    replayed = _replayed(job, round(len(taught) * job.config.training.replay_share))
    everything = [*taught, *replayed]
    protected = protected_tasks(job.config)
    untested, overlaps = clean(everything, protected.tasks)
    unique = deduplicate(untested, threshold=job.config.training.near_duplicates)
    kept = _capped(job, unique)
    teachers = sorted({e.teacher for e in kept if e.tier > 0})
    about: Metrics = {
        "taught": len(taught),
        "replayed": len(replayed),
        "left_out_overlapping_test": len({o.example for o in overlaps}),
        "left_out_near_duplicates": len(untested) - len(unique),
        "left_out_by_cap": len(unique) - len(kept),
        "checked_against_tests_of": protected.checked,
        "not_checked_against": protected.missing,
        "teachers": teachers,
        "by_tier": {str(tier): sum(e.tier == tier for e in kept) for tier in (0, 1, 2, 3)},
    }
    return kept, about


def _capped(job: Job, examples: list[Example]) -> list[Example]:
    """The examples with no kind of failed task beyond the config's cap."""
    settings = job.config.clusters
    if settings.cap is None or not settings.enabled:
        return examples
    embed_failures(job)
    return cap(examples, failure_kinds(job.runs).of, settings.cap, job.config.seed)


def _replayed(job: Job, count: int) -> list[Example]:
    """Tasks that the base passed, with its own answers, so that training does not take them away."""
    if count == 0:
        return []
    run = job.runs.test_domain.require()
    tasks = by_id(run.read("tasks", Task))
    answers = {c.task_id: c for c in run.read("base_completions", Completion)}
    passed = [v for v in run.read("base_verdicts", Verdict) if v.passed and _is_whole(tasks[v.task_id], answers)]
    passed.sort(key=lambda v: hashlib.sha256(f"{job.config.seed}:{v.task_id}".encode()).digest())
    return [
        Example.from_answer(
            tasks[v.task_id],
            answers[v.task_id].turns or answers[v.task_id].text.strip(),
            v,
            teacher=job.config.base.model,
            tier=0,
            cost_usd=0.0,
            prompt_hash=message_hash(tasks[v.task_id].messages),
        )
        for v in passed[:count]
    ]


def _is_whole(task: Task, answers: Mapping[str, Completion]) -> bool:
    """Whether the answer can be learned: one that was cut off passes too, but would be learned with an end."""
    answer = answers[task.id]
    return task.form == "chat" and answer.finish_reason == "stop" and bool(answer.text.strip())
