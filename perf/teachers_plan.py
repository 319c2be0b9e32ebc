"""How near `cascade plan --sample` comes to what the cascade then costs."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from teachers_lab import Server, storage
from teachers_tasks import config_for, questions

from cascade import benchmarks
from cascade.artifacts import Store
from cascade.config import Config, check_config
from cascade.tasks import Task
from cascade.teachers.budget import LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.economics import plan
from cascade.teachers.ledger import Ledger
from cascade.teachers.sample import MOST_CALLS, buy_sample

_SOLVED = (0.65, 0.225 / 0.35, 1.0)
"""Share of what a tier is asked that it solves, as the plan expects."""


def estimate(server: Server, count: int, seeds: int = 5) -> dict[str, tuple[Any, Any, bool]]:
    """A priced sample, the plan that rests on it, then the whole cascade; several times, for the luck of the sample."""
    errors, reused = [], 0.0
    for seed in range(seeds):
        error, share = _once(server, count, seed)
        errors.append(error)
        reused += share / seeds
    worst = max(errors, key=abs)
    listed = ", ".join(f"{e:+.1%}" for e in errors)
    return {
        "plan_off_cost": (f"{worst:+.1%} at worst of {seeds} ({listed})", "<= 20 %", abs(worst) <= 0.2),
        "plan_calls": (MOST_CALLS, "<= 20", True),
        "plan_calls_reused": (f"{reused:.0%}", None, True),
    }


def _once(server: Server, count: int, seed: int) -> tuple[float, float]:
    """Relative error of the expected cost, and the share of the sampled calls that the run used again."""
    chance = random.Random(seed)
    tasks = questions(count, f"p{seed}")
    server.set(latency_s=0.0)
    server.learn(_book(tasks, chance))
    with storage() as folder:
        config = _three_tiers(config_for(server.url, folder))
        ledger = Ledger(Store(folder), config.domain)
        sampled = asyncio.run(buy_sample(config, tasks, ledger, MOST_CALLS))
        expected = sum(r.cost_usd for r in plan(config, tasks, failure_rate=1.0, ledger=ledger.entries()))
        asked, cost = asyncio.run(_cascade(config, tasks, ledger))
    reused = sum((a.tier, a.task_id) in asked for a in sampled)
    return expected / cost - 1, reused / len(sampled)


def _book(tasks: list[Task], chance: random.Random) -> dict[str, str]:
    """Answers of very different lengths, longer ones from the dearer models, some of them wrong."""
    book = {}
    for task in tasks:
        for tier, solved in enumerate(_SOLVED, 1):
            filler = "so " * int(chance.lognormvariate(4.0 + 0.3 * tier, 0.5))
            right = task.reference["answers"][0] if chance.random() < solved else "no idea"
            book[f"model-{tier}|{task.prompt}"] = f"<think>{filler}</think>{right}"
    return book


def _three_tiers(config: Config) -> Config:
    raw = config.model_dump()
    for tier, (teacher, factor) in enumerate(zip(raw["tiers"], (1, 4, 20), strict=True), 1):
        teacher |= {"name": f"model-{tier}", "max_tokens": 1024}
        for price in ("input_usd_per_million", "cached_input_usd_per_million", "output_usd_per_million"):
            teacher[price] *= factor
    return check_config(raw)


async def _cascade(config: Config, tasks: list[Task], ledger: Ledger) -> tuple[set[tuple[int, str]], float]:
    """All three tiers over what the one before left; what was asked, and what it cost."""
    budget, asked, cost = LocalBudget.of(config, ledger), set(), 0.0
    for tier in (1, 2, 3):
        async with TeacherClient(config.tier(tier), tier, config.domain, ledger, budget) as client:
            answers = await asyncio.gather(*(client.answer(t) for t in tasks))
        asked |= {(tier, t.id) for t in tasks}
        cost += sum(a.cost_usd for a in answers)
        score = benchmarks.get("jsonl").score
        tasks = [t for t, a in zip(tasks, answers, strict=True) if not score(t, a.completion()).passed]
    return asked, cost
