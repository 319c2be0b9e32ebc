"""The console script `cascade`: the jobs, the pipeline and the plan under one name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from cascade import modifiers
from cascade.artifacts import Store
from cascade.benchmarks.check_tasks import check_tasks as score_references
from cascade.benchmarks.sources import cache_dir
from cascade.compression.adapter import fp16_bytes
from cascade.compression.convert import Values, compress_folder, export_modifier
from cascade.compression.format import disk_bytes
from cascade.compression.packed import resident_bytes
from cascade.config import ANSWER_KEY, Compression, load_config
from cascade.dataset import check_dataset as check
from cascade.errors import ConfigError, DataError
from cascade.reports import scoreboard
from cascade.routing.model import current_report, set_threshold
from cascade.system import bill
from cascade.system import bundle as pack
from cascade.tasks import Task
from cascade.teachers.ledger import Ledger
from cascade.teachers.offline import answer_key_server
from cascade.teachers.plan import Plan
from cascade.teachers.plan import plan as plan_tiers
from cascade.teachers.sample import MOST_CALLS, buy_sample
from ray_jobs._context import exit_with_message, run_one
from ray_jobs._export import export_dataset as write_dataset
from ray_jobs._runs import JOBS, Runs
from ray_jobs._test import unsolved_before
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
def plan(
    config: ConfigFile,
    sample: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_CALLS, help="calls to buy first, so that prices are measured; the run uses them again"
        ),
    ] = 0,
) -> None:
    """Show the steps, the tasks, and what the teachers should be asked and cost; spends only on --sample."""
    exit_with_message(lambda: _print_plan(config, sample))


def _print_plan(path: str, sample: int) -> None:
    config = load_config(path)
    runs = Runs(config)
    console = Console()
    rate: float | None = None
    base_known = True
    tasks = runs.train_tasks
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


def _buy_sample(runs: Runs, tasks: list[Task], calls: int) -> str:
    """Ask a few tasks; says what that cost."""
    config, ledger = runs.config, Ledger(runs.store, runs.config.domain)
    with ExitStack() as stack:
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


@app.command("export-dataset")
def export_dataset(
    config: ConfigFile,
    to: Annotated[str | None, typer.Option(help="folder or URI; by default DOMAIN/dataset in the storage")] = None,
) -> None:
    """Write the verified examples as Parquet with a card, a folder that Hugging Face `datasets` loads."""
    exit_with_message(lambda: _export(config, to))


def _export(path: str, to: str | None) -> None:
    where, rows = write_dataset(Runs(load_config(path)), to)
    Console().print(f"{rows} examples in {where}", soft_wrap=True)


@app.command("check-tasks")
def check_tasks(
    path: Annotated[str, typer.Argument(metavar="PATH", help="file or folder of your own tasks, see docs/howto")],
) -> None:
    """Score the right answers that your own tasks give, code too, and name those that do not pass."""
    exit_with_message(lambda: _check_tasks(path))


def _check_tasks(path: str) -> None:
    found = score_references(path)
    passed = ", ".join(f"{n} {kind}" for kind, n in sorted(found.passed.items()))
    print(f"right answers that pass: {passed or 'none'}; {len(found.unknown)} tasks give none that can be scored")
    if found.failed:
        problems = [f"  {v.task_id}: {v.outcome}, {v.evidence}" for v in found.failed[:20]]
        raise DataError("\n".join([f"{len(found.failed)} right answers do not pass:", *problems]))


@app.command("check-dataset")
def check_dataset(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="folder that export-dataset wrote")],
) -> None:
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


@app.command()
def system(config: ConfigFile) -> None:
    """Show what base, modifiers and router weigh on disk and in memory, with versions and hashes."""
    exit_with_message(lambda: _print_bill(config))


@app.command()
def bundle(config: ConfigFile, folder: Annotated[str, typer.Argument(metavar="FOLDER", help="new folder")]) -> None:
    """Pack base, modifiers and router into one folder; `python -m serve FOLDER` serves it."""
    exit_with_message(lambda: print(pack(load_config(config), Path(folder), cache_dir() / "router")))


@app.command()
def tune_router(
    config: ConfigFile,
    threshold: Annotated[float | None, typer.Option(help="set it; without, the curve is shown alone")] = None,
) -> None:
    """Show what each threshold of the router gives on held-out queries, and set it."""
    exit_with_message(lambda: _tune_router(config, threshold))


@app.command()
def canary(
    config: ConfigFile,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="without it, the versions are shown")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="share of the domain's requests that VERSION answers, 0 to 1; 0 ends it")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="make VERSION the current one, and end a canary")] = False,
) -> None:
    """Try a version of the domain's modifier on a share of its requests; servers follow within seconds."""
    exit_with_message(lambda: _canary(config, version, weight, promote))


def _canary(path: str, version: str | None, weight: float | None, promote: bool) -> None:
    config = load_config(path)
    store = Store(config.storage)
    if (version is not None) != (promote or weight is not None) or (promote and weight is not None):
        raise ConfigError("give VERSION with either --weight or --promote; `cascade canary CONFIG` shows the versions")
    if version is not None and promote:
        modifiers.set_current(store, config.domain, version)
        modifiers.end_canary(store, config.domain)
    elif version is not None and weight is not None:
        modifiers.set_canary(store, config.domain, version, weight)
    Console().print(_versions_table(store, config.domain))


def _versions_table(store: Store, domain: str) -> Table:
    """The versions of a domain's modifier, and what share of its requests each answers."""
    current, tried = modifiers.current(store, domain), modifiers.canary(store, domain)
    table = Table(title=f"{domain}: versions", title_justify="left")
    for heading in ("version", "created", "disk MB", "compressed score", "requests"):
        table.add_column(heading, justify="left" if heading in ("version", "created") else "right")
    for found in modifiers.list_modifiers(store, domain):
        share = tried.share if tried is not None and tried.version == found.version else 0.0
        if current is not None and current.version == found.version:
            share = 1.0 if tried is None or share else 1 - tried.share
        score = found.scores.get("compressed")
        created = datetime.fromtimestamp(found.created, UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        said = "" if score is None else f"{score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}]"
        table.add_row(found.version, created, f"{found.disk_bytes / 1e6:.2f}", said, f"{share:.0%}")
    table.caption = "created in UTC"
    return table


def _print_bill(path: str) -> None:
    found = bill(load_config(path), cache_dir() / "router")
    table = Table(title="The system", title_justify="left")
    for heading in ("part", "version", "sha256", "disk MB", "resident MB"):
        table.add_column(heading, justify="right" if heading.endswith("MB") else "left")
    for item in found.items:
        figures = (f"{item.disk_bytes / 1e6:.2f}", f"{item.resident_bytes / 1e6:.2f}")
        table.add_row(f"{item.kind} {item.name}", item.version, item.sha256[:12], *figures)
    table.add_section()
    table.add_row("together", "", "", f"{found.disk_bytes / 1e6:.2f}", f"{found.resident_bytes / 1e6:.2f}")
    table.caption = "resident: base, router, and the largest modifier, in the type that the base computes in"
    Console().print(table)


def _tune_router(path: str, threshold: float | None) -> None:
    store = Store(load_config(path).storage)
    report = current_report(store)
    if not report.get("curve"):
        raise ConfigError(
            f"there is no router with a curve in {store.uri}: train one with `cascade train-router {path}`"
        )
    table = Table(title="The router on held-out queries", title_justify="left")
    for heading in ("threshold", "decided", "to a modifier", "right answers", "interval", "other to base"):
        table.add_column(heading, justify="right")
    for point in report["curve"]:
        quality = point["quality"]
        shares = [f"{x:.1%}" for x in (point["coverage"], point["modifier_share"], quality["value"])]
        table.add_row(
            f"{point['threshold']:.2f}",
            *shares,
            f"[{quality['low']:.1%}, {quality['high']:.1%}]",
            f"{point['other_to_base']:.1%}",
        )
    beside = ", ".join(f"{name} {report['quality'][name]['value']:.1%}" for name in ("base", "best_single", "random"))
    table.caption = f"beside it: {beside}, oracle {report['quality']['oracle']['value']:.1%} (n = {report['queries']})"
    Console().print(table)
    if threshold is not None:
        version = set_threshold(store, cache_dir() / "router", threshold)
        print(f"the threshold is {threshold}, in version {version}")


@app.command("compress")
def compress_adapter(
    folder: Annotated[str, typer.Argument(metavar="PEFT_FOLDER", help="a LoRA made by PEFT, here or elsewhere")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="modifier file to write, e.g. modifier.safetensors")],
    share: Annotated[float, typer.Option(help="largest size, on disk and in memory, as a share of fp16")] = 48 / 260,
    values: Annotated[str | None, typer.Option(help="fp16, int8, int4 or ternary; by default what suits")] = None,
    base: Annotated[str, typer.Option(help="it is served with: in bfloat16, float16, float32 or int8")] = "bfloat16",
) -> None:
    """Compress a LoRA without a search and without data; `compress-modifier` is the job that measures."""
    exit_with_message(lambda: _compress(folder, file, share, values, base))


def _compress(folder: str, file: str, share: float, values: str | None, base: str) -> None:
    if not 0 < share <= 1 or values not in (None, *get_args(Values)):
        raise ConfigError(f"--share must be in (0, 1] and --values one of {', '.join(get_args(Values))}")
    if base not in ("bfloat16", "float16", "float32", "int8"):
        raise ConfigError(f"--base is the type of the base, bfloat16, float16, float32 or int8, not {base}")
    wanted, form = (
        Compression(max_ratio=share, max_resident_ratio=share),
        (4 if base == "float32" else 2, base == "int8"),
    )
    adapter, compressed = compress_folder(
        folder, file, wanted=wanted, values=cast(Values | None, values), bytes_per_number=form[0], int8=form[1]
    )
    full, disk = fp16_bytes(adapter), disk_bytes(compressed)
    held = resident_bytes(compressed, bytes_per_number=form[0], int8=form[1])
    print(f"{file}: {disk} bytes ({disk / full:.1%} of {full} in fp16), {held} in memory ({held / full:.1%})")


@app.command()
def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="modifier file")],
    folder: Annotated[str, typer.Argument(metavar="PEFT_FOLDER", help="new folder to write")],
    dtype: Annotated[str, typer.Option(help="float32 keeps every bit, float16 is half the size")] = "float32",
) -> None:
    """Expand a modifier file into an ordinary PEFT folder, which stock PEFT loads."""
    exit_with_message(lambda: print(f"{folder}: {len(export_modifier(file, folder, dtype=dtype).layers)} layers"))


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
