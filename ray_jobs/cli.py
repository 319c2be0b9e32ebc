"""The console script `cascade`: the jobs, the pipeline and the plan under one name.

What a command needs is imported when it is given, and not before its config has been read: help, and what is wrong
with a config, are said at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import cascade
from cascade.reports import scoreboard
from cascade.teachers import MOST_CALLS
from ray_jobs import JOBS
from ray_jobs._exit import exit_with_code

if TYPE_CHECKING:
    from cascade.config import Config

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a domain")]


class _Commands(TyperGroup):
    """Errors that are the user's to mend, and interruptions, end a command with a message."""

    def invoke(self, ctx: Any) -> None:
        exit_with_code(lambda: super(_Commands, self).invoke(ctx))


app = typer.Typer(
    cls=_Commands,
    help="Make a small language model strong where it is weak, for little money, and serve the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _load(path: str) -> Config:
    from cascade.config import load_config

    return load_config(path)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cascade {cascade.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="show the version and end")
    ] = False,
) -> None:
    """What may stand before a command."""


@app.command()
def run(config: ConfigFile) -> None:
    """Run all jobs of a domain in order; what was done before is reused."""
    loaded = _load(config)
    from ray_jobs.pipeline import run_pipeline

    run_pipeline(loaded, config)


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
    loaded = _load(config)
    from ray_jobs.commands.plan import print_plan

    print_plan(loaded, sample)


@app.command("export-dataset")
def export_dataset(
    config: ConfigFile,
    to: Annotated[str | None, typer.Option(help="folder or URI; by default DOMAIN/dataset in the storage")] = None,
) -> None:
    """Write the verified examples as Parquet with a card, a folder that Hugging Face `datasets` loads."""
    loaded = _load(config)
    from ray_jobs._export import export_dataset
    from ray_jobs._runs import Runs

    where, rows = export_dataset(Runs(loaded), to)
    print(f"{rows} examples in {where}")


@app.command("check-tasks")
def check_tasks(
    path: Annotated[str, typer.Argument(metavar="PATH", help="file or folder of your own tasks, see docs/howto")],
) -> None:
    """Score the right answers that your own tasks give, code too, and name those that do not pass."""
    from ray_jobs.commands.checks import check_tasks

    check_tasks(path)


@app.command("check-dataset")
def check_dataset(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="folder that export-dataset wrote")],
) -> None:
    """Compare an exported data set with its card, and score every answer anew."""
    from ray_jobs.commands.checks import check_dataset

    check_dataset(folder)


@app.command()
def system(config: ConfigFile) -> None:
    """Show what base, modifiers and router weigh on disk and in memory, with versions and hashes."""
    loaded = _load(config)
    from ray_jobs.commands.system import print_bill

    print_bill(loaded)


@app.command()
def bundle(
    config: ConfigFile,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", file_okay=False, help="new folder")],
) -> None:
    """Pack base, modifiers and router into one folder; `python -m serve FOLDER` serves it."""
    loaded = _load(config)
    from cascade.benchmarks.sources import cache_dir
    from cascade.system import bundle

    print(bundle(loaded, folder, cache_dir() / "router"))


@app.command()
def tune_router(
    config: ConfigFile,
    threshold: Annotated[float | None, typer.Option(help="set it; without, the curve is shown alone")] = None,
) -> None:
    """Show what each threshold of the router gives on held-out queries, and set it."""
    loaded = _load(config)
    from ray_jobs.commands.router import tune_router

    tune_router(loaded, config, threshold)


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
    loaded = _load(config)
    from ray_jobs.commands.canary import canary

    canary(loaded, version, weight, promote)


@app.command("compress")
def compress_adapter(
    folder: Annotated[str, typer.Argument(metavar="PEFT_FOLDER", help="a LoRA made by PEFT, here or elsewhere")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="modifier file to write, e.g. modifier.safetensors")],
    share: Annotated[float, typer.Option(help="largest size, on disk and in memory, as a share of fp16")] = 48 / 260,
    values: Annotated[str | None, typer.Option(help="fp16, int8, int4 or ternary; by default what suits")] = None,
    base: Annotated[str, typer.Option(help="it is served with: in bfloat16, float16, float32 or int8")] = "bfloat16",
) -> None:
    """Compress a LoRA without a search and without data; `compress-modifier` is the job that measures."""
    from ray_jobs.commands.compress import compress_adapter

    compress_adapter(folder, file, share, values, base)


@app.command()
def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="modifier file")],
    folder: Annotated[str, typer.Argument(metavar="PEFT_FOLDER", help="new folder to write")],
    dtype: Annotated[str, typer.Option(help="float32 keeps every bit, float16 is half the size")] = "float32",
) -> None:
    """Expand a modifier file into an ordinary PEFT folder, which stock PEFT loads."""
    from cascade.compression.convert import export_modifier

    print(f"{folder}: {len(export_modifier(file, folder, dtype=dtype).layers)} layers")


def _job_command(name: str) -> Callable[[str], None]:
    def command(config: ConfigFile) -> None:
        loaded = _load(config)
        from ray_jobs._context import run_one
        from ray_jobs.pipeline import WORK

        run_one(name, WORK[name], loaded)

    command.__doc__ = f"Run the job {name} alone (the jobs before it must be done)."
    return command


app.command("benchmarks")(scoreboard.run)
for _job in JOBS:
    app.command(_job.replace("_", "-"))(_job_command(_job))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
