"""The predictor inside a `generate_*` job: which tasks go past its tier, and what that has saved."""

from __future__ import annotations

from cascade.reports.data import Shortcut
from cascade.tasks import Verdict
from cascade.teachers.client import Answer
from cascade.teachers.predictor import Sent, measure, send_past, task_features, tier_costs
from ray_jobs._context import Job
from ray_jobs._failures import failure_vectors
from ray_jobs._generate_tables import ANSWERS, VERDICTS
from ray_jobs._runs import Runs

SENT = "sent_past"


def sent_past(job: Job, tier: int, ids: list[str]) -> list[str]:
    """Those of the unsolved tasks that the tier is not asked, once its first wave has been.

    What was decided is kept in the run, so that a job that resumes decides nothing anew.
    """
    if SENT not in job.run.tables():
        job.run.write_table(SENT, Sent, _decide(job, tier, ids))
    return [s.task_id for s in job.run.read(SENT, Sent) if not s.control]


def _decide(job: Job, tier: int, ids: list[str]) -> list[Sent]:
    config = job.config
    known = {v.task_id: v.passed for v in job.run.read(VERDICTS, Verdict)}
    from ray_jobs._embed import embed_failures  # torch, which no other part of a generate_* job needs

    embed_failures(job)
    found = failure_vectors(job.runs)
    if found is None or not known:
        return []
    costs = tier_costs(job.run.read(ANSWERS, Answer), known, config.tiers, tier)
    others = [i for i in ids if i not in known]
    return send_past(known, others, task_features(*found), costs, config.predictor, config.seed)


def shortcuts(runs: Runs) -> list[Shortcut]:
    """What the predictor has saved at each tier that it sent tasks past."""
    found = []
    for tier in range(1, len(runs.config.tiers)):
        run = runs.generate(tier)
        sent = run.read(SENT, Sent)
        if sent:
            known = {v.task_id: v.passed for v in run.read(VERDICTS, Verdict)}
            costs = tier_costs(run.read(ANSWERS, Answer), known, runs.config.tiers, tier)
            found.append(measure(tier, sent, known, costs))
    return found
