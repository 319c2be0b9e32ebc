"""`cascade check-tasks` and `cascade check-dataset`: what is wrong with one's own tasks, or an exported data set."""

from __future__ import annotations

from cascade.benchmarks.check_tasks import check_tasks as score_references
from cascade.dataset import check_dataset as check
from cascade.errors import DataError


def check_tasks(path: str) -> None:
    """
    Raises:
        DataError: tasks cannot be read, or right answers do not pass.
    """
    found = score_references(path)
    passed = ", ".join(f"{n} {kind}" for kind, n in sorted(found.passed.items()))
    print(f"right answers that pass: {passed or 'none'}; {len(found.unknown)} tasks give none that can be scored")
    if found.failed:
        problems = [f"  {v.task_id}: {v.outcome}, {v.evidence}" for v in found.failed[:20]]
        raise DataError("\n".join([f"{len(found.failed)} right answers do not pass:", *problems]))


def check_dataset(folder: str) -> None:
    """
    Raises:
        DataError: the data set cannot be read, or is not what its card says.
    """
    found = check(folder)
    print(
        f"{found.rows} rows: {found.rescored} scored anew, {found.opinions} accepted by a judge, "
        f"{found.conversations} conversations not scored anew"
    )
    if found.problems:
        raise DataError("\n".join([f"{len(found.problems)} problems:", *found.problems[:20]]))
    print("all as the card says")
