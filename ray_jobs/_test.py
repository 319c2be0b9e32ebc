"""The `test_*` jobs: what does the student fail, before and after the data of a tier?"""

from __future__ import annotations

from cascade.benchmarks import needs_judge, require_judge
from cascade.models.files import check_lengths
from cascade.scoring.statistics import Score
from cascade.tasks import Completion, Example, Task, Verdict
from ray_jobs._context import Job, Metrics
from ray_jobs._evaluate import Assignment, evaluate
from ray_jobs._probe import cross_fitted_probes
from ray_jobs._results import UNSOLVED, examples_up_to, training_style, unsolved_before


def test_student(job: Job, tier: int) -> Metrics:
    """Test the student after a tier (0: the bare base on the whole domain) and write down what it leaves unsolved."""
    verdicts, unsolved, metrics = _test_base(job) if tier == 0 else _test_probes(job, tier)
    job.run.write_table(UNSOLVED, Task, unsolved)
    score = Score.of(verdicts)
    return {
        "tested": score.n,
        "passed": score.passed,
        "unparsed": score.unparsed,
        "errors": score.errors,
        "accuracy": score.accuracy,
        "interval": [score.low, score.high],
        "unsolved": len(unsolved),
        **metrics,
    }


def _test_base(job: Job) -> tuple[list[Verdict], list[Task], Metrics]:
    """Find the base's best prompt on validation tasks, then let it answer every training task."""
    check_lengths(job.config)
    runs, student = job.runs, job.config.student
    scores = _score_styles(job) if len(student.prompts) > 1 else {}
    best = max(student.prompts, key=lambda s: scores[s.name].passed) if scores else student.prompts[0]
    tasks = runs.train_tasks
    require_judge(job.config, tasks)
    verdicts = evaluate(job, [Assignment("base", tasks, best)], tasks)["base"]
    job.run.write_table("tasks", Task, tasks)
    job.run.write_table("validation_tasks", Task, runs.validation_tasks)
    no_room = set() if best.shots else _without_room(job)
    unsolved = [t for t, v in zip(tasks, verdicts, strict=True) if not v.passed and t.id not in no_room]
    styles = {name: {"passed": s.passed, "n": s.n} for name, s in scores.items()}
    return verdicts, unsolved, {"no_room": len(no_room), "style": best.name, "styles": styles}


def _without_room(job: Job) -> set[str]:
    """Tasks for whose answer the base's context has no room: a teacher's would be paid for and not be learned.

    To be asked only of a style without worked examples, as modifiers are trained: with them there may be room.
    """
    return {c.task_id for c in job.run.read("base_completions", Completion) if c.finish_reason == "error"}


def _score_styles(job: Job) -> dict[str, Score]:
    """The bare base's score on some validation tasks with each prompt style."""
    sample = job.runs.validation_tasks[: job.config.student.selection_tasks]
    styles = {f"style_{s.name.replace('.', '_')}": s for s in job.config.student.prompts}
    verdicts = evaluate(job, [Assignment(name, sample, s) for name, s in styles.items()], job.runs.train_tasks)
    return {style.name: Score.of(verdicts[name]) for name, style in styles.items()}


def _test_probes(job: Job, tier: int) -> tuple[list[Verdict], list[Task], Metrics]:
    """What the tier's teacher got wrong, and what a probe trained on the data so far still fails."""
    asked = unsolved_before(job.runs, tier)
    solved = {e.task_id for e in job.runs.generate(tier).require().read("examples", Example)}
    wrong = [t for t in asked if t.id not in solved]
    taught = [t for t in asked if t.id in solved]
    if not job.config.probe.enabled:
        return [], wrong, {"teacher_wrong": len(wrong)}
    probed = [t for t in taught if not needs_judge(t)]  # what cannot be scored is settled by the judge's opinion
    verdicts = cross_fitted_probes(job, probed, examples_up_to(job.runs, tier), training_style(job.runs))
    failed = [t for t, v in zip(probed, verdicts, strict=True) if not v.passed]
    unsolved = sorted([*wrong, *failed], key=lambda t: t.id)
    return verdicts, unsolved, {"teacher_wrong": len(wrong), "probe_failed": len(failed)}
