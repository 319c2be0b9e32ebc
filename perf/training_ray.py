"""The worker of `train_modifier` as it is, under Ray Train, as a contender of perf/training.py.

Its checkpoints, notes, trackers and questions for a notice all count: a step's time is that from the end of the one
before to its own. Given are the tokens of all contenders in place of what it would encode, and their number of steps.

How long a step takes differs from process to process, and from second to second, by more than what is looked for. So
there is a way "ray-in-turn" too, in which the bare loop takes each step after the worker, in the same process.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from training_ours import make_loop
from training_ours import run as run_bare
from training_plain import counters, read_job, wait_for

from cascade.artifacts import open_run
from cascade.config import Config, PromptStyle, check_config, load_config
from cascade.store import Store
from cascade.training.examples import EncodedExample, EncodedSet
from cascade.training.measures import StepReport
from cascade.training.memory import settle_objects
from cascade.training.trackers import Trackers
from ray_jobs import _train_worker
from ray_jobs._train import scaling
from ray_jobs._train_controller import Assigned

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def make_config(job: dict[str, Any], storage: str) -> Config:
    """The quickstart's, with what the job says of the training."""
    gpu = job["device"] == "cuda"
    raw = load_config(QUICKSTART).model_dump(mode="json") | {
        "seed": 0,
        "storage": storage,
        "base": {"model": job["model"], "dtype": job["dtype"]},
        "training": {
            "lora": {
                "rank": job["rank"],
                "learning_rate": job["learning_rate"],
                "epochs": job["epochs"],
                "tokens_per_step": job["tokens_per_step"],
                "max_length": job["longest"],
                "warmup_share": 0.0,
            },
            "zero_stage": job["zero_stage"],
            "checkpoint_steps": job["checkpoint_steps"],
            "validation": {"tasks": 0},
        },
        "execution": {
            "train_workers": 1,
            "cpus_per_worker": job["threads"],
            "use_gpu": gpu,
            "row_tokens": job["row_tokens"],
            "compile": job["compile"],
        },
    }
    return check_config(raw)


@dataclass
class Clock:
    """Seconds, and those of the CPU, without what is done while it is stopped."""

    away: float = 0.0
    cpu_away: float = 0.0

    def now(self) -> tuple[float, float]:
        return time.perf_counter() - self.away, time.process_time() - self.cpu_away

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began, cpu_began = self.now()
        yield
        ended, cpu_ended = self.now()
        self.away += ended - began
        self.cpu_away += cpu_ended - cpu_began


class Turns:
    """The bare loop, which takes each step that the worker has just taken.

    Behind a checkpoint, until it is stored beside the steps, both may be slower. So it is noted when that is.
    """

    def __init__(self, job: dict[str, Any], train: list[dict[str, Any]]) -> None:
        self.device = job["device"]
        self.steps = make_loop(job, train).steps()
        self.worker: list[float] = []
        """Seconds of its steps."""
        self.bare: list[tuple[float, float]] = []
        """When the bare loop's began and ended."""
        self.stored: list[tuple[float, float]] = []
        """When a checkpoint began to be written, and was stored."""
        self.began = self.writing = 0.0

    def step(self, clock: Clock) -> None:
        """The worker has done another step."""
        wait_for(self.device)
        now, _ = clock.now()
        self.worker.append(now - self.began)
        with clock.stopped():
            began = time.perf_counter()
            next(self.steps)
            wait_for(self.device)
            self.bare.append((began, time.perf_counter()))
            if len(self.bare) == 1:
                settle_objects()
        self.began = now

    def writes(self) -> None:
        """A checkpoint begins to be written; from another thread, as the next."""
        self.writing = time.perf_counter()

    def has_stored(self) -> None:
        if self.writing:
            self.stored.append((self.writing, time.perf_counter()))
        self.writing = 0.0

    def figures(self) -> dict[str, Any]:
        """Of each step the worker's seconds, the bare loop's, and how many of those were beside a checkpoint."""
        beside = [sum(max(0.0, min(e, end) - max(b, begin)) for begin, end in self.stored) for b, e in self.bare]
        pairs = [(w, e - b, o) for w, (b, e), o in zip(self.worker, self.bare, beside, strict=True)]
        return {"pairs": pairs, "seconds_to_store": [end - begin for begin, end in self.stored]}


class Watched(Trackers):
    """Notes when each step ended."""

    ends: list[tuple[float, float, StepReport, dict[str, int]]]
    device: str
    beside: Turns | None
    clock = Clock()

    def step(self, report: StepReport) -> None:
        now, cpu = self.clock.now()
        with self.clock.stopped():
            self.ends.append((now, cpu, report, counters(self.device)))
        super().step(report)
        if self.beside:
            self.beside.step(self.clock)


def worker(settings: dict[str, Any]) -> None:
    """Run the real worker, and write what it took."""
    job: dict[str, Any] = json.loads(Path(settings["job"]).read_text())
    train = json.loads(Path(job["data"]).read_text())["train"]
    given = [EncodedExample(e["id"], tuple(e["ids"]), tuple(e["mask"])) for e in train]
    inner: Any = _train_worker
    plan_steps, checkpoint, write_state = inner.plan_steps, inner._Session._checkpoint, inner.write_state
    storage: Any = type(ray.train.get_context().get_storage())
    persist = storage.persist_current_checkpoint
    took: list[float] = []

    def timed(session: Any, done: int, at_once: bool) -> None:
        began = time.perf_counter()
        checkpoint(session, done, at_once)
        took.append(time.perf_counter() - began)

    def written(*state: Any) -> None:
        if Watched.beside:
            Watched.beside.writes()
        write_state(*state)

    def stored(*given: Any) -> Any:
        checkpoint = persist(*given)
        if Watched.beside:
            Watched.beside.has_stored()
        return checkpoint

    inner._encode = lambda assigned, loaded: EncodedSet(tuple(given), (), ())
    inner.plan_steps = lambda *a, **more: plan_steps(*a, **more)[: job["steps"] + job["warmup_steps"]]
    inner._Session._checkpoint, inner.write_state, storage.persist_current_checkpoint = timed, written, stored
    inner.Trackers, Watched.ends, Watched.device = Watched, [], job["device"]
    Watched.clock = Clock()
    Watched.beside = Turns(job, train) if job["way"] == "ray-in-turn" else None
    inner.train_worker({"assigned": settings["assigned"]})
    found = figures(job, Watched.ends, took)
    if Watched.beside:
        found |= Watched.beside.figures()
    Path(settings["out"]).write_text(json.dumps(found))


def bare(settings: dict[str, Any]) -> None:
    """The bare loop in the same place: what is slower here is Ray's process, not what the worker does in it."""
    Path(settings["out"]).write_text(json.dumps(run_bare(*read_job(settings["job"])).figures()))


def figures(
    job: dict[str, Any], ends: list[tuple[float, float, StepReport, dict[str, int]]], took: list[float]
) -> dict[str, Any]:
    """In the form of `training_plain.Stopwatch.report`; the first steps are warm-up."""
    ends = ends[job["warmup_steps"] - 1 :]
    reports = [report for _, _, report, _ in ends[1:]]
    seconds = [after[0] - before[0] for before, after in itertools.pairwise(ends)]
    return {
        "seconds": sum(seconds),
        "seconds_in_steps": sum(r.seconds for r in reports),
        "cpu_seconds": ends[-1][1] - ends[0][1],
        "targets": sum(r.targets for r in reports),
        "tokens": sum(r.tokens for r in reports),
        "steps": [[s, r.targets] for s, r in zip(seconds, reports, strict=True)],
        "counters": [found for _, _, _, found in ends[1:]],
        "curve": [],
        "peak_bytes": max(r.memory_bytes for r in reports),
        "checkpoint_seconds": [round(s, 3) for s in took],
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # as the jobs have it
    variables = {"DS_ACCELERATOR": job["device"], "TOKENIZERS_PARALLELISM": "false"}
    ray.init(address="local", num_cpus=max(2, job["threads"]), log_to_driver=False, runtime_env={"env_vars": variables})
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(job, folder)
        run = open_run(Store(folder), config.domain, "train_modifier", perf=job)
        assigned = Assigned(config, run, PromptStyle(name="plain"), (), ())
        out = Path(folder) / "report.json"
        TorchTrainer(
            bare if job["way"] == "ray-bare" else worker,
            train_loop_config={"job": sys.argv[1], "assigned": assigned, "out": str(out)},
            scaling_config=scaling(config.execution),
            run_config=RunConfig(
                name="train",
                storage_path=f"{folder}/{run.folder}",
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        ).fit()
        print(out.read_text())
    ray.shutdown()


if __name__ == "__main__":
    main()
