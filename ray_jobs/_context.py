"""What every job is given, and the command-line front that all job modules share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray._private.ray_constants import DEFAULT_DASHBOARD_PORT
from ray.data import DataContext

from cascade.artifacts import Run
from cascade.benchmarks import RUNS_CODE
from cascade.benchmarks.protected import protected_tasks
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.reach import check_ray_address, check_storage
from cascade.scoring.sandbox import WEAK_SWITCH, require_walls
from ray_jobs import JOBS
from ray_jobs._exit import end_on_sigterm, exit_with_code
from ray_jobs._json_lines import ray_logs
from ray_jobs._lease import Lease, Sole
from ray_jobs._live_page import showing
from ray_jobs._progress import Progress
from ray_jobs._runs import Runs

Metrics = dict[str, Any]
LOCK = "driver.lock"
SCRATCH = ("train", "progress.json", LOCK)
"""What jobs have in their run's folder until they are done: Ray Train's state, notes of how far they are, a lock."""


@dataclass(frozen=True)
class Job:
    """A job at work: its config, its place in the store, and how it tells people how far it is."""

    config: Config
    runs: Runs
    run: Run
    progress: Progress = field(default_factory=Progress)

    def ray_storage(self) -> dict[str, Any]:
        """Where Ray Train and Ray Tune keep their state: in the run, through the store's own file system."""
        return {"storage_path": self.run.store.path(self.run.folder), "storage_filesystem": self.run.store.filesystem}


Work = Callable[[Job], Metrics]


def run_job(name: str, work: Work, runs: Runs, progress: Progress | None = None) -> Metrics:
    """Do a job, or nothing if it is done already; a job that was interrupted goes on where it stopped.

    Returns:
        The job's figures, also kept in its manifest.
    """
    run = runs.run(name)
    progress = progress or Progress()
    if not run.done:
        with sole_driver(run) as alone:
            if not run.done:  # nor has another process done it meanwhile
                return _do(name, work, Job(runs.config, runs, run, progress), alone)
    clear_scratch(run)
    progress.reused(name)
    return run.metrics


def _do(name: str, work: Work, job: Job, alone: Callable[[], bool]) -> Metrics:
    run = job.run
    before = run.manifest.get("seconds", 0.0)
    began = time.perf_counter()
    run.start(job.config)
    job.progress.started(name)
    try:
        metrics = work(job)
    finally:
        if alone():
            run.note(seconds=before + time.perf_counter() - began)
    run.finish(metrics)
    clear_scratch(run)
    job.progress.finished(name, metrics)
    return metrics


@contextlib.contextmanager
def sole_driver(run: Sole) -> Iterator[Callable[[], bool]]:
    """Keep others from doing the same run (or `Purchases`) meanwhile, which would pay for its answers twice.

    On a file system by a lock, of which the kernel lets go when the process ends, however it does; elsewhere by a
    `Lease`, which can be lost.

    Yields:
        Whether others are still kept from it.

    Raises:
        CascadeError: another process is at it, or has come to be at it.
    """
    with _lock(run) if run.store.is_local else Lease(run).held() as alone:
        yield alone


@contextlib.contextmanager
def _lock(run: Sole) -> Iterator[Callable[[], bool]]:
    folder = Path(run.store.path(run.folder))
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise CascadeError(
            f"another process is doing {run.name} (in {run.store.uri_of(run.folder)}): wait until it has ended, or end "
            "it; then this one goes on from what is done"
        ) from None
    except (OSError, NotImplementedError):  # no locks there, or not to be written to: whoever writes says so
        pass
    try:
        yield lambda: True
    finally:
        lock.release()


def clear_scratch(run: Run) -> None:
    """Delete what a finished job needs no more; not before it is finished, or a kill between would lose its work."""
    for name in SCRATCH:
        run.store.delete(f"{run.folder}/{name}")


def connect_ray(config: Config, progress: Progress | None = None) -> None:
    """Join the cluster that this process was submitted to (or RAY_ADDRESS names), else start Ray on this machine."""
    if ray.is_initialized():
        return
    check_ray_address()
    check_sandbox(config)
    if config.tasks.protect is not None:
        protected_tasks(config)  # what training must not overlap is had before anything is spent, or never
    quiet = not os.environ.get("CASCADE_VERBOSE")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0" if quiet else "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # training waits that long for a checkpoint
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if quiet:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else Tune prints a box of its own whatever it is told
    local: dict[str, Any] = {}
    variables = _worker_environment(config)
    if not os.environ.get("RAY_ADDRESS"):
        # "local": a Ray that somebody else started on this machine, perhaps long dead, is not ours to join unasked.
        local = {"address": "local", "num_cpus": max(2, os.cpu_count() or 1), "object_store_memory": 512 * 2**20}
        # Nor to be asked: Ray Train wants to know from the API server whether its controller lives, and would look for
        # that of the Ray which the machine remembers. Where it is dead, every training ends twelve seconds later.
        local["dashboard_port"] = _dashboard_port()
        variables["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{local['dashboard_port']}"
    context = ray.init(
        log_to_driver=not quiet,
        logging_level=logging.ERROR if quiet else logging.INFO,
        configure_logging=True,
        runtime_env={"env_vars": variables},
        **ray_logs(config, quiet=quiet),
        **local,
    )
    end_on_sigterm()
    if not local:
        check_storage(config.storage, ray.nodes(), shared=config.execution.shared_storage)
    if progress:
        progress.connected(f"http://{context.dashboard_url}" if context.dashboard_url else "")
    data = DataContext.get_current()
    data.enable_progress_bars = not quiet
    data.execution_options.verbose_progress = not quiet
    # Nothing may be done for longer than Ray Data's half hour: nodes are still to come, a batch takes a day.
    data.execution_no_progress_timeout_s = -1
    if quiet:
        for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _dashboard_port() -> int:
    """Ray's usual one, or any that is free where it is taken."""
    for port in (DEFAULT_DASHBOARD_PORT, 0):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", port))
            return int(tried.getsockname()[1])
    return DEFAULT_DASHBOARD_PORT  # it has none: Ray does without


def _worker_environment(config: Config) -> dict[str, str]:
    """Environment variables of the actors."""
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if config.execution.use_gpu else "cpu",
        WEAK_SWITCH: os.environ.get(WEAK_SWITCH, "0"),
    }


def check_sandbox(config: Config) -> None:
    """Where tasks run what a model wrote, say or refuse before anything is spent that it cannot be confined here.

    Raises:
        SandboxError: a wall is missing on this machine, and the config does not allow that.
    """
    if config.execution.allow_weak_sandbox:
        os.environ[WEAK_SWITCH] = "1"
    if any(source.benchmark in RUNS_CODE for part in config.tasks.parts for source in part.sources):
        require_walls()


def main(name: str, work: Work) -> None:
    """`python -m ray_jobs.<job> --config FILE`: its exit codes are those of `cascade`."""
    path = parse_config(name)
    exit_with_code(lambda: run_one(name, work, load_config(path)))


def command_line(name: str) -> argparse.ArgumentParser:
    """The arguments of `python -m ray_jobs.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m ray_jobs.{name}")
    parser.add_argument("--config", required=True, help="YAML file of the domain, e.g. configs/quickstart.yaml")
    return parser


def parse_config(name: str) -> str:
    """The --config of a job module's command line."""
    path: str = command_line(name).parse_args().config
    return path


def run_one(name: str, work: Work, config: Config) -> None:
    """One job of a config, with a progress display and its figures at the end."""
    runs = Runs(config)
    with showing(runs, f"{runs.config.domain}: {name}", (name,), before=JOBS[: JOBS.index(name)]) as progress:
        connect_ray(runs.config, progress)
        metrics = run_job(name, work, runs, progress)
    for key, value in metrics.items() if runs.config.execution.logs == "text" else ():
        if isinstance(value, int | float | str):
            print(f"{key}: {value}")
