"""The `generate_*` jobs: a tier's teacher answers what is unsolved, and what passes the task's scorer is an example.

Teachers are asked by async actors over Ray Data. All actors share one limiter per endpoint and key and one budget,
which live in an actor of their own; every response is in the ledger before anything else happens to it. The driver
holds no task: what needs whole tables is done by Ray tasks (`ray_jobs._generate_tables`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from cascade.config import ANSWER_KEY, Config
from cascade.errors import BudgetExceeded, TeacherError
from cascade.teachers.client import missing_keys
from cascade.teachers.offline import answer_key_server
from cascade.teachers.predictor import first_wave
from ray_jobs._context import Job, Metrics, sole_driver
from ray_jobs._desk import open_desk
from ray_jobs._generate_tables import SoFar, Tables, elsewhere, send_blocks, settle, so_far, unsolved_ids
from ray_jobs._lease import Purchases
from ray_jobs._meter import TierGauges, TierMeter
from ray_jobs._progress import polling
from ray_jobs._shortcut import sent_past
from ray_jobs._teacher_actor import TeacherActor

Blocks = list[tuple[Any, int]]
"""References to tables of tasks, and how many tasks each holds."""
_STOPPED = {"budget": BudgetExceeded, "teacher": TeacherError}


def generate_answers(job: Job, tier: int) -> Metrics:
    """Ask a tier's teacher all that is unsolved; verified answers become examples.

    Raises:
        BudgetExceeded: a budget is reached. What was bought is kept, and used when the job runs again.
        TeacherError: the teacher cannot be asked (key refused, model unknown, nobody answering).
    """
    check_keys(job.config, [tier])
    failures, past = job.runs.test(tier - 1).require(), frozenset[str]()
    tables = Tables(failures, job.runs.test_domain, job.run, job.config, tier)
    with sole_driver(Purchases(job.run.store, job.config.domain)):
        if job.config.predictor.enabled and tier < len(job.config.tiers):
            ids = unsolved_ids(tables)
            wave = first_wave(ids, job.config.predictor, job.config.seed)
            _ask_all(job, tables, leave_out=frozenset(ids).difference(wave))
            past = frozenset(sent_past(job, tier, ids))
        _ask_all(job, tables, leave_out=past, never_asked=len(past))
    return elsewhere(settle, tables)


def check_keys(config: Config, tiers: Iterable[int]) -> None:
    """See that the API keys of tiers that will be asked, and the judge's, are set, before anything is paid.

    Raises:
        TeacherError: some are not, or hold what can be no key.
    """
    asked = {f"tier {tier}, {config.tier(tier).name}": config.tier(tier) for tier in tiers}
    if asked and config.judge is not None:
        asked[f"the judge, {config.judge.model.name}"] = config.judge.model
    missing = {who: names for who, teacher in asked.items() if (names := missing_keys(teacher))}
    if missing:
        needed = "; ".join(f"{' and '.join(names)} ({who})" for who, names in missing.items())
        raise TeacherError(
            f"API keys are not set in the environment: {needed}. For a submitted job: ray job submit "
            """--runtime-env-json '{"env_vars": {"NAME": "…"}}' …"""
        )


def _ask_all(job: Job, tables: Tables, *, leave_out: frozenset[str], never_asked: int = 0) -> None:
    """Fan out the tasks that have no verdict; raises only after all that was in flight has come back."""
    before, blocks = elsewhere(so_far, tables), send_blocks(tables, leave_out)
    if not blocks:
        return
    desk = open_desk(job.config, job.run.store, tables.tier)
    try:
        meter = _meter(tables, before, before.tasks - never_asked, ray.get(desk.left_usd.remote()))
        with _answer_key(job, tables) as resolve, _shown(job, meter, desk):
            stopped: dict[str, str] | None = None
            for row in _answers(tables, blocks, resolve, desk):
                stopped = stopped or (row if row["stopped"] else None)
    finally:
        ray.kill(desk)
    if stopped:
        raise _STOPPED[stopped["stopped"]](stopped["note"])


@contextmanager
def _shown(job: Job, meter: TierMeter, desk: Any) -> Iterator[None]:
    """Tell people and Prometheus how far it is, while the block runs and at its end."""
    gauges = TierGauges(job.config.domain)

    def look() -> None:
        with suppress(RayError):  # the desk is gone: the job is over
            for news in ray.get(desk.take_done.remote()):
                meter.add(news.passed, news.cost_usd, news.paid_usd, news.requests)
            gauges.show(meter.state())
            job.progress.tier(job.run.job, meter.state())

    with polling(look):
        yield
    look()


@contextmanager
def _answer_key(job: Job, tables: Tables) -> Iterator[dict[str, str]]:
    """Where the teacher that replays known answers is, if it is one: on loopback unless others have to reach it."""
    if not tables.teacher.is_answer_key:
        yield {}
        return
    several = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) > 1
    host = ray.util.get_node_ip_address() if several else "127.0.0.1"
    with answer_key_server(job.runs.train_tasks, job.config.tiers, job.config.seed, host=host) as url:
        yield {ANSWER_KEY: url}


def _meter(tables: Tables, before: SoFar, total: int, left_usd: float) -> TierMeter:
    """A meter that goes on where an earlier start of the job stopped."""
    return TierMeter(
        tables.tier, tables.teacher.name, total, before.done, before.verified, left_usd, spent_usd=before.spent_usd
    )


def _answers(tables: Tables, blocks: Blocks, resolve: dict[str, str], desk: Any) -> Iterator[dict[str, str]]:
    """What `TeacherActor` says of each task, as it is known."""
    rows = ray.data.from_arrow_refs([ref for ref, _ in blocks]).map_batches(
        TeacherActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=_actor_pool(tables.config, tables.tier, len(blocks), blocks[0][1]),
        num_cpus=0.25,
        fn_constructor_kwargs={
            "config": tables.config,
            "run": tables.run,
            "tier": tables.tier,
            "resolve": resolve,
            "desk": desk,
        },
    )
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from cast(pa.Table, batch).to_pylist()


def _actor_pool(config: Config, tier: int, blocks: int, block: int) -> ActorPoolStrategy:
    """Teacher actors, each at work on so many blocks at once that the end of one never leaves the endpoint idle."""
    actors = min(config.execution.teacher_actors, blocks)
    at_once = sum(e.max_concurrency for e in config.tier(tier).endpoints)
    calls = 1 + math.ceil(at_once / (actors * block))
    return ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=calls + 1)
