"""train_router: learn from verdicts which requests the base answers well and which want a modifier.

`python -m ray_jobs.train_router --config configs/quickstart.yaml`

Base and every current modifier of the store answer the same validation tasks: this domain's, and those of every
other domain that has been tested with the same storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from cascade import modifiers
from cascade.artifacts import Run
from cascade.config import PromptStyle
from cascade.fingerprints import fingerprint
from cascade.store import Store
from cascade.tasks import Task
from ray_jobs._context import Job, Metrics, main
from ray_jobs._evaluate import Assignment, evaluate

BASE = "base"
AS_SERVED = "as-served"


def work(job: Job) -> Metrics:
    from cascade.routing.model import publish, query_of  # and torch with it
    from cascade.routing.train import train_router

    job.runs.validate_modifier.require()
    tasks = distinct_tasks(job.runs.validation_tasks, _tasks_of_other_domains(job))
    store = job.run.store
    verdicts = evaluate(job, assignments_as_served(store, job.runs.base_sha256, tasks))
    outcomes = {name: [v.passed for v in column] for name, column in verdicts.items()}
    model, report = train_router([query_of(t) for t in tasks], outcomes, job.config.router, job.config.seed)
    version = publish(store, model, report.as_dict())
    return {"version": version, "candidates": ", ".join(outcomes), "queries": len(tasks), "report": report.as_dict()}


def assignments_as_served(store: Store, base_sha256: str, tasks: Sequence[Task]) -> list[Assignment]:
    """Base and every current modifier that fits it, asked as when they serve.

    That is the base with the client's messages alone, a modifier under the system message that it was trained with.
    """
    assignments = [Assignment(BASE, tasks, PromptStyle(name=AS_SERVED))]
    for domain in modifiers.list_domains(store):
        modifier = modifiers.current(store, domain)
        if modifier is not None and modifier.base_sha256 == base_sha256:
            style = PromptStyle(name=AS_SERVED, system=modifier.system)
            assignments.append(Assignment(domain, tasks, style, modifier.path, modifier.version))
    return assignments


def distinct_tasks(own: Sequence[Task], others: Sequence[Task]) -> list[Task]:
    """A domain's own tasks, and those of other domains that are none of them.

    An id is unique in one domain alone (two may each have a validation.jsonl whose lines are 1 to n), and verdicts are
    known by it. So another domain's task gets one that tells what it holds: after a restart, too, no verdict is taken
    for that on anything else.
    """
    known, found = {_content(t) for t in own}, list(own)
    for task in others:
        if (content := _content(task)) not in known:
            known.add(content)
            found.append(replace(task, id=f"{task.id}@{content}"))
    return found


def _content(task: Task) -> str:
    """Fingerprint of what is asked and how it is scored, whoever asks."""
    return fingerprint(**asdict(replace(task, id="", domain="")))


def _tasks_of_other_domains(job: Job) -> list[Task]:
    """Validation tasks that other domains' latest `test_domain` runs left in the store."""
    store, found = job.run.store, []
    for domain in modifiers.list_domains(store):
        if domain == job.config.domain:
            continue
        names = [n for n in store.list(domain) if n.startswith("test_domain@")]
        runs = [Run(store, domain, job, digest) for job, digest in (name.split("@") for name in names)]
        finished = sorted((r for r in runs if r.done), key=lambda r: r.manifest["finished"])
        found += finished[-1].read("validation_tasks", Task) if finished else []
    return found


if __name__ == "__main__":
    main("train_router", work)
