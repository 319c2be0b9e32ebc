"""A process that buys answers and can be killed: `python teachers_buyer.py CONFIG.json COUNT`, for `teachers.py`.

It prints "begin" before its first request, and at the end how many tasks have an answer, an error, or no budget left.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from teachers_tasks import questions

from cascade.config import Config, load_config
from cascade.errors import BudgetExceeded
from cascade.store import Store
from cascade.teachers.budget import LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.ledger import Ledger


async def buy(config: Config, count: int) -> Counter[str]:
    """Ask all at once, as far as the limits allow."""
    ledger = Ledger(Store(config.storage), config.domain)
    outcomes: Counter[str] = Counter()
    async with TeacherClient(config.tier(1), 1, config.domain, ledger, LocalBudget.of(config, ledger)) as client:
        print("begin", flush=True)

        async def one(number: int) -> None:
            try:
                outcomes["answered" if (await client.answer(tasks[number])).ok else "error"] += 1
            except BudgetExceeded:
                outcomes["no budget"] += 1

        tasks = questions(count)
        await asyncio.gather(*(one(n) for n in range(count)))
    return outcomes


if __name__ == "__main__":
    print(json.dumps(asyncio.run(buy(load_config(sys.argv[1]), int(sys.argv[2])))))
