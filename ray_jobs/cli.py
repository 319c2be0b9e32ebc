"""The console script `cascade`: the jobs, the pipeline and the plan under one name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cascade.config import load_config
from cascade.dataset import check_dataset as check
from cascade.errors import ConfigError, DataError
from cascade.reports import scoreboard
from cascade.teachers.economics import plan as plan_tiers
from cascade.teachers.ledger import Ledger
from ray_jobs._context import exit_with_message, run_one
from ray_jobs._export import export_dataset as export
from ray_jobs._runs import JOBS, Runs
from ray_jobs.pipeline import WORK, run_pipeline

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a domain")]
ASSUMED_FAILURES = 0.9
"""Share of the tasks that a base is taken to fail as long as it has not been tested."""
app = typer.Typer(
    help="Make a small language model strong where it is weak, for little money, and serve the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(config: ConfigFile) -> None:
    """Run all jobs of a domain in order; what was done before is reused."""
    exit_with_message(lambda: run_pipeline(config))


@app.command()
def plan(config: ConfigFile) -> None:
    """Show the steps, the tasks, and what the teachers are expected to be asked and to cost. Spends nothing."""
    exit_with_message(lambda: _print_plan(config))


def _print_plan(path: str) -> None:
    config = load_config(path)
    runs = Runs(config)
    console = Console()
    rate: float | None = None
    base_known = True
    try:
        if runs.test_domain.done:
            tested = runs.test_domain.metrics
            rate = tested["unsolved"] / tested["tested"]
    except ConfigError as error:
        base_known = False
        console.print(f"note: {error}", style="yellow")
    console.print(_steps_table(runs, base_known=base_known))
    counts = {s: len(getattr(runs, f"{s}_tasks")) for s in ("train", "validation", "test")}
    console.print(", ".join(f"{n} {split} tasks" for split, n in counts.items()))
    console.print(_cost_table(runs, rate))


def _steps_table(runs: Runs, *, base_known: bool) -> Table:
    """Every job and whether it has been run."""
    table = Table(title=f"{runs.config.domain}: steps", title_justify="left")
    for heading in ("step", "state", "fingerprint"):
        table.add_column(heading)
    for job in JOBS:
        if base_known:
            found = runs.run(job)
            table.add_row(job, "done" if found.done else found.manifest.get("state", "to do"), found.fingerprint)
        else:
            table.add_row(job, "unknown without the base")
    return table


def _cost_table(runs: Runs, rate: float | None) -> Table:
    """What the teachers are expected to be asked; `rate` is the measured share of tasks that the base fails."""
    config = runs.config
    source, failed = ("assumed", ASSUMED_FAILURES) if rate is None else ("measured", rate)
    ledger = Ledger(runs.store, config.domain).entries()
    rows = plan_tiers(config, runs.train_tasks, failure_rate=failed, ledger=ledger)
    title = f"Teachers ({failed:.0%} of the tasks failed by the base, {source})"
    table = Table(title=title, title_justify="left")
    for heading in ("tier", "teacher", "tasks", "calls", "tokens in", "tokens out", "cost", "tokens"):
        table.add_column(heading, justify="left" if heading in ("teacher", "tokens") else "right")
    for row in rows:
        table.add_row(
            str(row.tier),
            row.teacher,
            f"{row.tasks:.0f}",
            f"{row.calls:.0f}",
            f"{row.prompt_tokens:.0f}",
            f"{row.completion_tokens:.0f}",
            f"${row.cost_usd:.4f}",
            row.tokens_from,
        )
    total = sum(row.cost_usd for row in rows)
    table.caption = f"together ${total:.4f} of the budget of ${config.budget_usd:.2f}; nothing was spent for this plan"
    return table


@app.command("export-dataset")
def export_dataset(
    config: ConfigFile,
    to: Annotated[str | None, typer.Option(help="folder or URI; by default DOMAIN/dataset in the storage")] = None,
) -> None:
    """Write the verified examples as Parquet with a card, a folder that Hugging Face `datasets` loads."""
    exit_with_message(lambda: _export(config, to))


def _export(path: str, to: str | None) -> None:
    where, rows = export(Runs(load_config(path)), to)
    Console().print(f"{rows} examples in {where}", soft_wrap=True)


@app.command("check-dataset")
def check_dataset(folder: Annotated[str, typer.Argument(metavar="FOLDER")]) -> None:
    """Compare an exported data set with its card, and score every answer anew."""
    exit_with_message(lambda: _check(folder))


def _check(folder: str) -> None:
    found = check(folder)
    print(
        f"{found.rows} rows: {found.rescored} scored anew, {found.opinions} accepted by a judge, "
        f"{found.conversations} conversations not scored anew"
    )
    if found.problems:
        raise DataError("\n".join([f"{len(found.problems)} problems:", *found.problems[:20]]))
    print("all as the card says")


def _job_command(name: str) -> Callable[[str], None]:
    def command(config: ConfigFile) -> None:
        exit_with_message(lambda: run_one(name, WORK[name], config))

    command.__doc__ = f"Run the job {name} alone (the jobs before it must be done)."
    return command


app.command("benchmarks")(scoreboard.run)
for _job in JOBS:
    app.command(_job.replace("_", "-"))(_job_command(_job))


def main() -> None:
    exit_with_message(app)


if __name__ == "__main__":
    main()
