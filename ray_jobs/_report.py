"""From the runs of a finished pipeline to what its report shows."""

from __future__ import annotations

import math
from collections import Counter

from cascade import modifiers
from cascade.artifacts import Run
from cascade.compression.account import LayerShare, StageCost
from cascade.compression.methods import Recipe
from cascade.reports.data import (
    CostRow,
    CurvePoint,
    FailureRow,
    GeneralRow,
    ReferenceRow,
    ReportData,
    Sample,
    TrialRow,
    general_rows,
)
from cascade.reports.summary import MODELS, Summary
from cascade.scoring.statistics import Score
from cascade.tasks import Completion, Task, Verdict
from cascade.teachers.economics import CascadeReport, tier_report
from cascade.teachers.ledger import Ledger
from cascade.training.looks import Look
from cascade.training.measures import StepReport
from ray_jobs._held_out import reference_answer
from ray_jobs._kinds import kinds_of_failures, probe_seconds, with_provenance
from ray_jobs._results import LOOKS, by_id
from ray_jobs._runs import Runs
from ray_jobs._shortcut import shortcuts
from ray_jobs._trial import TRIALS, Trial
from ray_jobs._winner import ACCOUNT, LAYERS
from ray_jobs.validate_modifier import AFTER, BEFORE

SAMPLES = 12


def report_data(runs: Runs, config_path: str, *, wall_seconds: float, peak_rss_bytes: int) -> ReportData:
    """Everything that the report of a finished pipeline shows."""
    validated = runs.validate_modifier.require()
    tasks = validated.read("tasks", Task)
    verdicts = {name: validated.read(f"{name}_verdicts", Verdict) for name in MODELS}
    cascade = cascade_report(runs)
    kinds, kind_samples = kinds_of_failures(runs, cascade)
    return ReportData(
        summary=_summary(runs, config_path, (wall_seconds, peak_rss_bytes), verdicts, cascade),
        tasks=tasks,
        verdicts=verdicts,
        tiers=cascade.tiers,
        costs=[CostRow(i, cascade.settled[i] or 0, cascade.paid.get(i, 0.0), usd) for i, usd in cascade.single.items()],
        curve=_curve(runs),
        trials=_trials(runs),
        stages=runs.compress_modifier.read(ACCOUNT, StageCost),
        layers=runs.compress_modifier.read(LAYERS, LayerShare),
        router=runs.train_router.require().metrics["report"],
        samples=_samples(runs, by_id(tasks), verdicts),
        failures=_failures(by_id(tasks), verdicts["compressed"]),
        references=_references(runs, by_id(tasks), verdicts["compressed"]),
        general=_general(validated),
        kinds=kinds,
        kind_samples=kind_samples,
        shortcuts=shortcuts(runs),
    )


def _general(validated: Run) -> list[GeneralRow]:
    tasks = validated.read("general_tasks", Task)
    before, after = (validated.read(f"{name}_verdicts", Verdict) for name in (BEFORE, AFTER))
    return general_rows(tasks, before, after)


def cascade_report(runs: Runs) -> CascadeReport:
    """What the tiers did and cost, from the ledger and the verdicts on the teachers' answers."""
    verdicts = {tier: runs.generate(tier).require().read("verdicts", Verdict) for tier in (1, 2, 3)}
    entries = Ledger(runs.store, runs.config.domain).entries()
    return with_provenance(tier_report(entries, verdicts, runs.config.tiers), runs)


def _summary(
    runs: Runs,
    config_path: str,
    time_and_memory: tuple[float, int],
    verdicts: dict[str, list[Verdict]],
    cascade: CascadeReport,
) -> Summary:
    config, compressed = runs.config, runs.compress_modifier.metrics
    version = runs.validate_modifier.metrics["version"]
    return Summary.of(
        domain=config.domain,
        base_model=config.base.model,
        base=verdicts["base"],
        modifier=verdicts["modifier"],
        compressed=verdicts["compressed"],
        tiers=cascade.tiers,
        examples=runs.train_modifier.metrics["examples"],
        cost_single_teacher_usd=cascade.cost_single_teacher_usd,
        adapter_bytes=compressed["fp16_bytes"],
        compressed_bytes=modifiers.get(runs.store, config.domain, version).disk_bytes,
        wall_seconds=time_and_memory[0],
        peak_rss_bytes=time_and_memory[1],
        max_ratio=config.compression.max_ratio,
        modifier_version=version,
        config=config_path,
        prompt_style=runs.test_domain.metrics["style"],
        probe_seconds=probe_seconds(runs),
        saving_interval=(cascade.saving_interval.low, cascade.saving_interval.high),
        seed=config.seed,
    )


def _curve(runs: Runs) -> list[CurvePoint]:
    looks = {look.step - 1: look for look in runs.train_modifier.read(LOOKS, Look)}
    points = []
    for p in runs.train_modifier.read("curve", StepReport):
        look = looks.get(p.step, Look(p.step, math.nan))
        seen = look.loss if math.isfinite(look.loss) else None
        measured = p.gradient_norm, p.memory_bytes, look.answered, look.passed
        points.append(CurvePoint(p.step, p.loss, p.learning_rate, p.tokens / p.seconds, seen, *measured))
    return points


def _trials(runs: Runs) -> list[TrialRow]:
    run = runs.compress_modifier
    accuracy = {
        recipe: Score.of(run.read(f"{name}_verdicts", Verdict)).accuracy
        for name, recipe in run.metrics["finalists"].items()
    }
    return [
        TrialRow(
            recipe=_in_words(t.recipe),
            bytes=t.disk_bytes,
            loss=t.loss,
            accuracy=accuracy.get(t.recipe),
            chosen=t.recipe == run.metrics["recipe"],
            share=t.share,
            resident_bytes=t.resident_bytes,
            fits=t.fits,
            reason=run.metrics["reason"] if t.recipe == run.metrics["recipe"] else "",
            drift=t.drift if math.isfinite(t.drift) else None,
        )
        for t in run.read(TRIALS, Trial)
    ]


def _in_words(recipe: str) -> str:
    """A recipe in a few words, e.g. "prune A to 12 %, B to 9 %, B × 3.0, int4"."""
    parsed, words = Recipe.model_validate_json(recipe), []
    if parsed.truncate is not None and (parsed.truncate.keep or 0.0) < 1:
        by = f"{parsed.truncate.keep:.0%}" if parsed.truncate.keep else f"{parsed.truncate.energy:.0%} of its energy"
        words.append(f"rank truncated to {by} ({parsed.truncate.allocation}, by {parsed.truncate.metric})")
    elif parsed.truncate is not None:
        words.append("rotated by SVD")
    if parsed.prune is not None:
        p = parsed.prune
        reach = {"layer": "a threshold per layer", "group": "a threshold per group", "global": "one threshold"}
        words.append(f"prune A to {p.density_a:.1%}, B to {p.density_b:.1%} (by {p.metric}, {reach[p.scope]})")
    return ", ".join([*words, parsed.values])


def _samples(runs: Runs, tasks: dict[str, Task], verdicts: dict[str, list[Verdict]]) -> list[Sample]:
    """Answers before and after: of every category in turn, a gain first, then whatever comes."""
    run = runs.validate_modifier
    answers = {
        name: {c.task_id: c.text for c in run.read(f"{name}_completions", Completion)}
        for name in ("base", "compressed")
    }
    outcome = {name: {v.task_id: v.outcome for v in verdicts[name]} for name in ("base", "compressed")}

    def interest(task_id: str) -> tuple[int, str]:
        before, after = (outcome[name][task_id] == "pass" for name in ("base", "compressed"))
        return (0 if after and not before else 1 if before != after else 2, task_id)

    by_category: dict[str, list[str]] = {}
    for task_id in sorted(tasks, key=interest):
        by_category.setdefault(tasks[task_id].category, []).append(task_id)
    turns = [ids[n] for n in range(SAMPLES) for ids in by_category.values() if n < len(ids)]
    return [
        Sample(
            task_id=i,
            category=tasks[i].category,
            prompt=tasks[i].prompt,
            base_answer=answers["base"][i],
            modifier_answer=answers["compressed"][i],
            reference=reference_answer(tasks[i]) or "",
            base_outcome=outcome["base"][i],
            modifier_outcome=outcome["compressed"][i],
        )
        for i in turns[:SAMPLES]
    ]


def _failures(tasks: dict[str, Task], verdicts: list[Verdict]) -> list[FailureRow]:
    """What the compressed modifier still fails, by kind, most first."""
    kinds = Counter(
        f"{tasks[v.task_id].category}, difficulty {tasks[v.task_id].difficulty}" for v in verdicts if not v.passed
    )
    return [FailureRow(kind, n) for kind, n in kinds.most_common()]


def _references(runs: Runs, tasks: dict[str, Task], verdicts: list[Verdict]) -> list[ReferenceRow]:
    """Published scores beside ours, for the benchmarks that both have."""
    reference = runs.config.reference
    if reference is None:
        return []
    rows = []
    for benchmark, published in reference.scores.items():
        score = Score.of([v for v in verdicts if tasks[v.task_id].benchmark == benchmark])
        if score.n:
            ours, low, high = (100 * share for share in (score.accuracy, score.low, score.high))
            measured = ours, low, high, ours / published, score.n
            rows.append(
                ReferenceRow(
                    benchmark, reference.model, published, reference.source, *measured, *reference.target_ratio
                )
            )
    return rows
