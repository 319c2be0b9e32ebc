"""From the runs of a trained domain to a data set that others can load and check."""

from __future__ import annotations

from pathlib import Path

from cascade.dataset import Provenance, dataset_rows, write_dataset
from cascade.reports.summary import teacher_statement
from cascade.store import Store
from cascade.tasks import Example, Task
from ray_jobs import JOBS
from ray_jobs._failures import failure_kinds
from ray_jobs._report import cascade_report
from ray_jobs._results import by_id
from ray_jobs._runs import Runs

FOLDER = "dataset"
_LEFT_OUT = {
    "left_out_overlapping_test": "overlapping a test task",
    "left_out_near_duplicates": "near-duplicates of another example",
    "left_out_by_cap": "beyond the most of one kind of task",
}


def export_dataset(runs: Runs, to: str | None) -> tuple[str, int]:
    """Write what the modifier was trained on as a data set.

    Args:
        to: a local folder or URI; None: `dataset` in the domain's folder of the storage.

    Returns:
        Where it is, and its number of rows.

    Raises:
        DataError: the modifier has not been trained yet.
    """
    trained = runs.train_modifier.require()
    tasks = by_id(runs.test_domain.require().read("tasks", Task))
    kinds = failure_kinds(runs)
    keys = frozenset(t.name for t in runs.config.tiers if t.is_answer_key)
    labels = [k.label for k in kinds.kinds]
    rows = dataset_rows(trained.read("examples", Example), tasks, kinds.of, labels, keys)
    target = runs.store.child(runs.config.domain) if to is None else Store(to if "://" in to else str(Path(to).parent))
    folder = FOLDER if to is None else Path(to).name if "://" not in to else FOLDER
    write_dataset(target, folder, rows, _provenance(runs))
    return target.uri_of(folder), len(rows)


def _provenance(runs: Runs) -> Provenance:
    trained, report = runs.train_modifier.metrics, cascade_report(runs)
    return Provenance(
        domain=runs.config.domain,
        base=runs.config.base.model,
        teachers=[
            {
                "tier": number,
                "name": t.name,
                "answer_key": t.is_answer_key,
                "input": t.input_usd_per_million,
                "output": t.output_usd_per_million,
                "price_source": t.price_source,
                "endpoints": [e.base_url for e in t.endpoints],
            }
            for number, t in enumerate(runs.config.tiers, 1)
        ],
        statement=teacher_statement(report.tiers),
        protected=trained.get("checked_against_tests_of", {}),
        not_protected=trained.get("not_checked_against", {}),
        left_out={reason: trained[key] for key, reason in _LEFT_OUT.items() if key in trained},
        runs={job: runs.run(job).name for job in JOBS[: JOBS.index("train_modifier") + 1]},
        cascade={
            "failures": report.failures,
            "cost_usd": report.cost_usd,
            "single_usd": report.cost_single_teacher_usd,
            "saving": report.saving,
        },
    )
