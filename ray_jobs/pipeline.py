"""All jobs of a domain in order, resuming where it stopped, with the report at the end.

`python -m ray_jobs.pipeline --config configs/quickstart.yaml`
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from rich.console import Console

from cascade import modifiers
from cascade.benchmarks import require_judge
from cascade.config import Config, load_config
from cascade.errors import CascadeError, ConfigError
from cascade.models import bits
from cascade.reports.console import print_summary
from cascade.reports.data import tables_folder
from cascade.reports.html import write_report
from cascade.reports.summary import Summary
from cascade.training import trackers
from ray_jobs import (
    JOBS,
    compress_modifier,
    generate_tier1,
    generate_tier2,
    generate_tier3,
    test_domain,
    test_tier1,
    test_tier2,
    train_modifier,
    train_router,
    validate_modifier,
)
from ray_jobs._context import Work, clear_scratch, connect_ray, parse_config, run_job
from ray_jobs._exit import exit_with_code
from ray_jobs._generate import check_keys
from ray_jobs._live_page import showing
from ray_jobs._memory import PeakMemory
from ray_jobs._report import report_data
from ray_jobs._runs import Runs

WORK: dict[str, Work] = {
    "test_domain": test_domain.work,
    "generate_tier1": generate_tier1.work,
    "test_tier1": test_tier1.work,
    "generate_tier2": generate_tier2.work,
    "test_tier2": test_tier2.work,
    "generate_tier3": generate_tier3.work,
    "train_modifier": train_modifier.work,
    "compress_modifier": compress_modifier.work,
    "validate_modifier": validate_modifier.work,
    "train_router": train_router.work,
}


def run_pipeline(config: Config, config_path: str) -> Summary:
    """Run what has not been run, write the report, and say where it is.

    Args:
        config_path: where the config was read from, as the report names it.

    Raises:
        ConfigError: the modifier would be one that can be neither compressed nor served, a package that the training
            needs is missing, or there are tasks that only a judge could score, and none is named.
        TeacherError: the API key of a teacher that is still to be asked is not set.
    """
    began = time.perf_counter()
    runs = Runs(config)
    if runs.config.training.lora.dora:
        raise ConfigError(
            "training.lora.dora: a DoRA modifier is more than B A, which is all that compression and serving hold: "
            "leave it out, or run the jobs up to `cascade train-modifier` one by one and load the folder with PEFT"
        )
    require_judge(runs.config, runs.train_tasks)
    if not runs.train_modifier.done:
        trackers.check_installed(runs.config)
        bits.check_installed(runs.config.training.base_bits)
    check_keys(config, (tier for tier in range(1, len(config.tiers) + 1) if not runs.generate(tier).done))
    with PeakMemory() as memory:
        account = _Account(runs, memory, began)
        with showing(runs, f"cascade: {runs.config.domain}", JOBS) as progress:
            for name in JOBS:
                if not runs.run(name).done:
                    connect_ray(runs.config, progress)
                    run_job(name, WORK[name], runs, progress)
                    account.note()
                else:
                    clear_scratch(runs.run(name))
                    progress.reused(name)
            summary = _write_report(runs, config_path, account)
            current, made = _versions(runs)
            progress.in_use(current, made)
    if runs.config.execution.logs == "text":
        print_summary(summary)
        _say_what_next(runs, config_path, current, made)
    return summary


class _Account:
    """Time and memory of a pipeline over all the processes that worked on it, kept beside its runs."""

    def __init__(self, runs: Runs, memory: PeakMemory, began: float) -> None:
        self.runs, self.memory, self.began = runs, memory, began
        self.path = f"{runs.config.domain}/pipeline.json"
        fingerprints = {name: runs.run(name).fingerprint for name in JOBS}
        kept = runs.store.read_json(self.path) if runs.store.exists(self.path) else {}
        if kept.get("runs") != fingerprints:
            kept = {"runs": fingerprints, "wall_seconds": 0.0, "peak_rss_bytes": 0}
        self.before = kept
        self.now = kept

    def note(self) -> None:
        """After each job: a process that is killed later has been counted up to here."""
        self.now = self.before | {
            "wall_seconds": self.before["wall_seconds"] + time.perf_counter() - self.began,
            "peak_rss_bytes": max(self.before["peak_rss_bytes"], self.memory.peak_bytes),
        }
        self.runs.store.write_json(self.path, self.now)


def _write_report(runs: Runs, config_path: str, account: _Account) -> Summary:
    """`report.html`, its tables and `summary.json` in the domain's folder; `summary.json` at the storage's root too."""
    domain, store = runs.config.domain, runs.store
    data = report_data(
        runs,
        config_path,
        wall_seconds=account.now["wall_seconds"],
        peak_rss_bytes=account.now["peak_rss_bytes"],
    )
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(data, Path(folder) / "report.html")
        store.write_bytes(f"{domain}/{page.name}", page.read_bytes())
        tables = tables_folder(page)
        store.upload_folder(tables, f"{domain}/{tables.name}")
    text = data.summary.model_dump_json(indent=2).encode() + b"\n"
    for path in ("summary.json", f"{domain}/summary.json"):
        store.write_bytes(path, text)
    return data.summary


def _versions(runs: Runs) -> tuple[str, str]:
    """Which version of the domain's modifier is CURRENT, "" for none that can be read, and which one this config made.

    A config that is done makes nothing CURRENT again: somebody may have chosen another version since.
    """
    try:
        found = modifiers.current(runs.store, runs.config.domain)
    except CascadeError:  # damaged, or the version is gone; the command that is named mends it
        found = None
    return "" if found is None else found.version, str(runs.validate_modifier.metrics["version"])


def _say_what_next(runs: Runs, config_path: str, current: str, made: str) -> None:
    console = Console()
    console.print(f"\nReport:  {runs.store.uri_of(f'{runs.config.domain}/report.html')}", soft_wrap=True)
    console.print(f"Figures: {runs.store.uri_of('summary.json')}", soft_wrap=True)
    console.print(f"Current: {_in_use(runs.config.domain, config_path, current, made)}", soft_wrap=True, markup=False)
    quickstart = config_path == "configs/quickstart.yaml"
    command = "make serve" if quickstart else f"python -m serve {config_path}"
    console.print(f"Serve:   {command}   (then http://127.0.0.1:8000)", soft_wrap=True)


def _in_use(domain: str, config_path: str, current: str, made: str) -> str:
    """Which version is CURRENT and, where this config made another, what makes that one so."""
    there = f"{domain}/{current}" if current else "no version"
    if current == made:
        return there
    return f"{there}; this config made {domain}/{made}, and `cascade canary {config_path} {made} --promote` sets it"


def main() -> None:
    path = parse_config("pipeline")
    exit_with_code(lambda: run_pipeline(load_config(path), path))


if __name__ == "__main__":
    main()
