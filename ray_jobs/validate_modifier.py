"""validate_modifier: base, modifier and compressed modifier on the held-out test tasks; publishes the modifier.

On `tasks.general`, if the config has it, base and compressed modifier are asked alike, as the modifier was trained to
be asked: what differs is what it forgot (or learned by the way).

`python -m ray_jobs.validate_modifier --config configs/quickstart.yaml`
"""

from __future__ import annotations

from cascade import modifiers
from cascade.compression.format import load_modifier
from cascade.reports.summary import MODELS
from cascade.scoring.statistics import Score, mcnemar_exact
from cascade.tasks import Example, Task, Verdict
from ray_jobs._context import Job, Metrics, main
from ray_jobs._evaluate import Assignment, evaluate
from ray_jobs._results import ADAPTER, base_style, local_copy, training_style
from ray_jobs._train import write_card
from ray_jobs.compress_modifier import FILE

BEFORE, AFTER = "general_base", "general_compressed"
"""Models on the general tasks: the bare base, and with the compressed modifier."""


def work(job: Job) -> Metrics:
    runs, tasks = job.runs, job.runs.test_tasks
    trained, compressed = runs.train_modifier.require(), runs.compress_modifier.require()
    file = f"{compressed.folder}/{FILE}"
    style = training_style(runs)
    job.run.write_table("tasks", Task, tasks)
    assignments = [
        Assignment("base", tasks, base_style(runs)),
        Assignment("modifier", tasks, style, f"{trained.folder}/{ADAPTER}", "modifier"),
        Assignment("compressed", tasks, style, file, "compressed"),
    ]
    general = runs.general_tasks
    job.run.write_table("general_tasks", Task, general)
    if general:
        assignments += [
            Assignment(BEFORE, general, style),
            Assignment(AFTER, general, style, file, "compressed"),
        ]
    verdicts = evaluate(job, assignments, runs.train_tasks)
    version = _publish(job, file, {name: verdicts[name] for name in MODELS})
    base, final = ([v.passed for v in verdicts[name]] for name in ("base", "compressed"))
    scores = {name: Score.of(verdicts[name]) for name in MODELS}
    write_card(runs, trained.metrics, {name: scores[name] for name in ("base", "modifier")})
    return {
        "n": len(tasks),
        **{f"{name}_accuracy": score.accuracy for name, score in scores.items()},
        "mcnemar_p": mcnemar_exact(base, final),
        "version": version,
        **{f"{name}_interval": [score.low, score.high] for name, score in scores.items()},
        **{f"{name}_accuracy": Score.of(verdicts[name]).accuracy for name in (BEFORE, AFTER) if general},
    }


def _publish(job: Job, file: str, verdicts: dict[str, list[Verdict]]) -> str:
    """Add the compressed modifier with its scores to the registry and make it the current one."""
    local = local_copy(job.run.store, file)
    trained = job.runs.train_modifier
    teachers = tuple(sorted({e.teacher for e in trained.read("examples", Example) if e.tier > 0}))
    scores = {name: Score.of(v) for name, v in verdicts.items()}
    modifier = modifiers.publish(
        job.run.store,
        job.config.domain,
        load_modifier(local),
        fp16_size=job.runs.compress_modifier.metrics["fp16_bytes"],
        resident_size=job.runs.compress_modifier.metrics["resident_bytes"],
        scores=scores,
        teachers=teachers,
        system=training_style(job.runs).system,
    )
    return modifier.version


if __name__ == "__main__":
    main("validate_modifier", work)
