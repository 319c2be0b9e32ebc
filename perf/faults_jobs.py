"""A worker node, or the driver, killed in the middle of a job: what was lost, and is the result the unbroken one?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from faults_lab import CHECKPOINT_STEPS, IN_FLIGHT, Domain, Driver, Figures, Nodes, Row, wait_until
from safetensors.numpy import load_file

from cascade.tasks import Verdict
from cascade.teachers.ledger import Ledger
from cascade.training.measures import StepReport
from ray_jobs._results import ADAPTER
from ray_jobs._train_ledger import PROGRESS
from ray_jobs._trial import TRIALS, Trial

PRICES = [5.0, 5.0, 20.0]
"""Of tier 1, also on the server's bill."""
LATENCY_S = 0.4
Found = tuple[str, bool, Figures]
"""What was lost, whether the result is the unbroken one, and figures."""


@dataclass(frozen=True)
class Work:
    """A job to break.

    Attributes:
        mark: in the names of its processes on the workers.
        far: how far it is; strictly more once something new is kept.
        ripe: whether, so far, it may be struck.
    """

    name: str
    job: str
    mark: str
    far: Callable[[Domain], float]
    ripe: Callable[[float], bool]
    judge: Callable[[Domain, Domain, Struck], Found]


@dataclass
class Struck:
    """How a job stood when it was struck, and where it went on.

    Attributes:
        notes: what `far` said after the kill, each change once.
    """

    who: str
    far: float
    requests: frozenset[str]
    notes: list[float] = field(default_factory=list)


def strike(work: Work, who: str, folder: Path, unbroken: Domain, nodes: Nodes) -> Row:
    """Run the job on what was there before it, kill its node or its driver, and let it end."""
    domain = Domain(folder, f"{work.name}-{who}", unbroken.server)
    domain.take_over(unbroken, work.job)
    domain.server.set(latency_s=LATENCY_S, prices=PRICES)
    driver = Driver.job(domain, work.job, nodes.address)
    try:
        wait_until(lambda: work.ripe(work.far(domain)) and bool(nodes.where(work.mark)), driver, work.name, pause=0.02)
        killed = time.monotonic()
        if who == "node":
            nodes.kill(nodes.where(work.mark)[0][0])
        else:
            _kill_driver(driver, nodes, work.mark)
        struck = Struck(who, work.far(domain), frozenset(domain.answered()))
        if who == "driver":
            driver.start()
        wait_until(lambda: _is_further(work, domain, struck), driver, f"{work.name} after the kill", pause=0.02)
        back_s = time.monotonic() - killed
        if who == "node":
            nodes.add()
        driver.finish()
    finally:
        driver.process.kill()
    lost, same, figures = work.judge(domain, unbroken, struck)
    prefix = f"{work.name}_{who}"
    figures = {f"{prefix}_{name}": found for name, found in figures.items()}
    figures |= {f"{prefix}_same": (same, True, same), f"{prefix}_back_s": (round(back_s, 1), None, True)}
    return Row(work.name, WHO[who], lost, back_s, same, figures)


WHO = {
    "node": "SIGKILL of all processes of the worker node that it ran on",
    "driver": "kill -9 of the driver, which is started again",
}


def _kill_driver(driver: Driver, nodes: Nodes, mark: str) -> None:
    """And wait until Ray has ended what it had on the workers, so that all that is seen later is the new driver's."""
    driver.kill()
    while nodes.where(mark):
        time.sleep(0.05)


def _is_further(work: Work, domain: Domain, struck: Struck) -> bool:
    now = work.far(domain)
    if not struck.notes or now != struck.notes[-1]:
        struck.notes.append(now)
    return now > struck.far


# ------------------------------------------------------------------------------------------------ generation


def _answers_kept(domain: Domain) -> float:
    return len(domain.answered())


def _outcomes(domain: Domain) -> dict[str, tuple[str, str]]:
    return {v.task_id: (v.outcome, v.answer) for v in domain.runs.generate_tier1.read("verdicts", Verdict)}


def _judge_generation(domain: Domain, unbroken: Domain, struck: Struck) -> Found:
    """The server's own count tells what was answered, and charged, twice."""
    bill = domain.server.stats(answered=True)
    prompts = {task.id: task.prompt for task in domain.runs.train_tasks}
    ledger = Ledger(domain.runs.store, "sums")
    entries = [e for e in ledger.entries() if e.responded]
    arrived = {prompts[e.task_id] for e in entries if e.key in struck.requests}
    twice = {prompt for prompt, times in bill["answered"].items() if times > 1}
    again = len(twice & arrived)
    in_flight = sum(bill["answered"].values()) - len(bill["answered"])
    within = bill["charged_usd"] <= ledger.spent_at_most() + 1e-9
    outcomes = _outcomes(domain)
    same = outcomes == _outcomes(unbroken) and {e.key for e in entries} == set(domain.answered())
    lost = (
        f"none of {len(arrived)} answers that had arrived was asked again; {in_flight} of {IN_FLIGHT} in flight were"
        if not again
        else f"{again} of {len(arrived)} answers that had arrived were paid again"
    )
    return (
        lost,
        same,
        {
            "paid_again": (again, 0, again == 0),
            "in_flight_paid_again": (in_flight, f"<= {IN_FLIGHT}", in_flight <= IN_FLIGHT),
            "bill_within_ledgers_upper_bound": (within, True, within),
        },
    )


# -------------------------------------------------------------------------------------------------- training


def _steps_noted(domain: Domain) -> float:
    """The workers note their step once a second, and at once when they begin."""
    path = f"{domain.runs.train_modifier.folder}/{PROGRESS}"
    store = domain.runs.store
    return float(store.read_json(path)["step"]) if store.exists(path) else 0.0


def _judge_training(domain: Domain, unbroken: Domain, struck: Struck) -> Found:
    fell = [step for step in struck.notes if step < struck.far]
    lost = max(0, round(struck.far - fell[0] + 1)) if fell else 0
    curves = [d.runs.train_modifier.read("curve", StepReport) for d in (domain, unbroken)]
    same_steps = [p.sample_ids for p in curves[0]] == [p.sample_ids for p in curves[1]]
    gap = max(abs(a.loss - b.loss) for a, b in zip(*curves, strict=True)) if same_steps else float("inf")
    weights = max(abs(a - b).max() for a, b in _adapters(domain, unbroken))
    same = same_steps and gap <= 1e-4
    said = f"{lost} steps of {len(curves[1])} (a checkpoint every {CHECKPOINT_STEPS}); loss off by {gap:.0e} at most"
    return (
        said,
        same,
        {
            "steps_lost": (lost, f"<= {CHECKPOINT_STEPS}", lost <= CHECKPOINT_STEPS),
            "loss_off": (gap, "<= 1e-4", gap <= 1e-4),
            "adapter_off": (float(weights), None, True),
        },
    )


def _adapters(*domains: Domain) -> list[tuple[Any, Any]]:
    """Weights of the two trained adapters, in pairs."""
    runs = [d.runs.train_modifier for d in domains]
    a, b = (load_file(f"{run.store.path(run.folder)}/{ADAPTER}/adapter_model.safetensors") for run in runs)
    return [(a[name].astype("float32"), b[name].astype("float32")) for name in b]


# ---------------------------------------------------------------------------------------------------- search


def _trials_measured(domain: Domain) -> float:
    return len(domain.runs.compress_modifier.read(TRIALS, Trial))


def _judge_search(domain: Domain, unbroken: Domain, struck: Struck) -> Found:
    runs = [d.runs.compress_modifier for d in (domain, unbroken)]
    mine, theirs = ({t.params: t for t in run.read(TRIALS, Trial)} for run in runs)
    path = Path(domain.runs.store.path(runs[0].folder)) / f"{TRIALS}.parquet"
    measured = len(json.loads((pq.read_schema(path).metadata or {})[b"cascade.parts"]))
    again, missing = measured - len(mine), len(theirs) - len(mine)
    proposed = mine.keys() == theirs.keys()
    same = runs[0].metrics["recipe"] == runs[1].metrics["recipe"] and missing == 0
    said = f"{missing} of {len(theirs)} trials; {again} measured again; "
    said += "the same trials and choice" if proposed and same else "the same choice" if same else "another choice"
    return (
        said,
        same,
        {
            "trials_lost": (missing, 0, missing == 0),
            "trials_measured_again": (again, "<= 1", again <= 1),
            "same_trials": (proposed, None, True),
        },
    )


WORKS = (
    Work(
        "generation", "generate_tier1", "TeacherActor", _answers_kept, lambda answers: answers >= 24, _judge_generation
    ),
    Work(
        "training",
        "train_modifier",
        "RayTrainWorker",
        _steps_noted,
        lambda step: step > 2.5 * CHECKPOINT_STEPS,
        _judge_training,
    ),
    Work("search", "compress_modifier", "ImplicitFunc", _trials_measured, lambda trials: trials >= 4, _judge_search),
)
