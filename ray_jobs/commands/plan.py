"""`cascade plan`: the steps, the tasks, and what the teachers should be asked and cost."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table

from cascade.benchmarks import require_judge
from cascade.config import ANSWER_KEY, Config
from cascade.errors import ConfigError
from cascade.models import bits
from cascade.tasks import Task
from cascade.teachers import MOST_CALLS
from cascade.teachers.ledger import Ledger
from cascade.teachers.plan import Plan
from cascade.teachers.plan import plan as plan_tiers
from cascade.training import trackers
from ray_jobs import JOBS
from ray_jobs._lease import Purchases
from ray_jobs._results import unsolved_before
from ray_jobs._runs import Runs

ASSUMED_FAILURES = 0.9
"""Share of the tasks that a base is taken to fail as long as it has not been tested."""


def print_plan(config: Config, sample: int) -> None:
    """Print the steps, the tasks and the expected cost of a config.

    Args:
        sample: calls to buy first.

    Raises:
        CascadeError: the tasks or, where calls are bought, a teacher cannot be used; or no judge is named for tasks
            that only one could score.
    """
    runs = Runs(config)
    console = Console()
    rate: float | None = None
    base_known = True
    tasks = runs.train_tasks
    require_judge(config, tasks)
    _note_missing_packages(config, console)
    try:
        if runs.test_domain.done:
            tested = runs.test_domain.metrics
            rate = tested["unsolved"] / tested["tested"]
            tasks = unsolved_before(runs, 1)
    except ConfigError as error:
        base_known = False
        console.print(f"note: {error}", style="yellow")
    spent = _buy_sample(runs, tasks, sample) if sample else None
    console.print(_steps_table(runs, base_known=base_known))
    counts = {s: len(getattr(runs, f"{s}_tasks")) for s in ("train", "validation", "test")}
    console.print(", ".join(f"{n} {split} tasks" for split, n in counts.items()))
    settled = _settled(runs) if base_known else {}
    console.print(_cost_table(runs, rate, settled, spent))


def _note_missing_packages(config: Config, console: Console) -> None:
    """Say what is not installed here. No error: the machine that trains may be another."""
    checks = (lambda: trackers.check_installed(config), lambda: bits.check_installed(config.training.base_bits))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            console.print(f"note: {error}", style="yellow", markup=False)


def _buy_sample(runs: Runs, tasks: list[Task], calls: int) -> str:
    """Ask a few tasks; says what that cost."""
    from cascade.teachers.offline import answer_key_server
    from cascade.teachers.sample import buy_sample
    from ray_jobs._context import sole_driver

    config = runs.config
    with ExitStack() as stack:
        stack.enter_context(sole_driver(Purchases(runs.store, config.domain)))
        ledger = Ledger(runs.store, config.domain)  # now: with all that who asked before has paid
        resolve: dict[str, str] = {}
        if any(t.is_answer_key for t in config.tiers):
            server = answer_key_server(runs.train_tasks, config.tiers, config.seed)
            resolve[ANSWER_KEY] = stack.enter_context(server)
        answers = asyncio.run(buy_sample(config, tasks, ledger, calls, resolve=resolve))
    ledger.close()
    usd = sum(a.cost_usd for a in answers if not a.from_ledger)
    return f"{len(answers)} sampled calls cost ${usd:.4f}; the run uses their answers again"


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


def _settled(runs: Runs) -> dict[int, tuple[int, int]]:
    """Tier -> how many tasks it was asked and how many of them need no other, of the tiers that are done."""
    done = [t for t in range(1, len(runs.config.tiers)) if runs.test(t).done]
    asked = {t: runs.generate(t).metrics["asked"] for t in done}
    return {t: (asked[t], asked[t] - runs.test(t).metrics["unsolved"]) for t in done}


def _cost_table(runs: Runs, rate: float | None, settled: dict[int, tuple[int, int]], spent: str | None) -> Table:
    """What the teachers are expected to be asked; `rate` is the measured share of tasks that the base fails."""
    config = runs.config
    source, failed = ("assumed", ASSUMED_FAILURES) if rate is None else ("measured", rate)
    ledger = Ledger(runs.store, config.domain).entries()
    found = plan_tiers(config, runs.train_tasks, failure_rate=failed, ledger=ledger, settled=settled)
    title = f"Teachers ({failed:.0%} of the tasks failed by the base, {source})"
    table = Table(title=title, title_justify="left")
    for heading in ("tier", "teacher", "tasks", "calls", "tokens in", "tokens out", "cost", "known from"):
        text = heading in ("teacher", "known from")
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
    for row in found.rows:
        table.add_row(
            str(row.tier),
            row.teacher,
            f"{row.tasks:.0f}",
            f"{row.calls:.0f}",
            f"{row.prompt_tokens:.0f}",
            f"{row.completion_tokens:.0f}",
            f"${row.cost_usd:.4f}",
            f"{row.measured} answers" if row.measured else "a guess",
        )
    paid = spent or "nothing was spent for this plan"
    table.caption = f"together {_expected(found)} of the budget of ${config.budget_usd:.2f}; {paid}"
    return table


def _expected(found: Plan) -> str:
    """The expected cost and how sure it is."""
    if found.interval is None:
        return f"${found.cost_usd:.4f} (a guess as long as no answer was measured: --sample {MOST_CALLS} buys some)"
    return f"${found.cost_usd:.4f} (95 % interval ${found.interval.low:.4f} to ${found.interval.high:.4f})"
