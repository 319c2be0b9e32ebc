"""The measurements of `teachers.py`, each a function of the mock server that returns its figures."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from own_environment import python_with
from teachers_lab import ROOT, Figures, Lab, Server, mean_in_flight, rate, storage
from teachers_rivals import PACKAGES
from teachers_tasks import config_for, questions

from cascade.store import Store
from cascade.teachers.ledger import Ledger
from ray_jobs._generate import generate_answers

CONCURRENCY = 32


def throughput(server: Server, count: int) -> Figures:
    """Requests per second as the server sees them, one actor each, 32 at once where the tool can be told so."""
    server.set()
    with storage() as folder:
        generate_answers(Lab.of(config_for(server.url, folder), questions(count)).job, 1)
    spans = server.stats()["spans"]
    ours = rate(spans)
    share = mean_in_flight(spans) / CONCURRENCY
    figures: Figures = {
        "requests_per_second": (round(ours, 1), None, True),
        "in_flight_share": (round(share, 3), ">= 0.95", share >= 0.95),
    }
    for tool, at_least, number in (("ray", 10.0, 60), ("curator", 1.0, count), ("distilabel", 1.0, count)):
        theirs = _rival(server, tool, number)
        figures[f"{tool}_requests_per_second"] = (round(theirs, 1), None, True)
        figures[f"times_{tool}"] = (round(ours / theirs, 2), f">= {at_least:g}", ours >= at_least * theirs)
    return figures


def _rival(server: Server, tool: str, count: int) -> float:
    server.set()
    python = python_with(tool, PACKAGES[tool]) if tool in PACKAGES else Path(sys.executable)
    with storage() as folder:
        prompts = Path(folder, "prompts.json")
        prompts.write_text(json.dumps([t.prompt for t in questions(count)]))
        arguments = [str(python), str(Path(__file__).with_name("teachers_rivals.py")), tool, server.url, str(prompts)]
        environment = os.environ | {"HOME": folder, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [*arguments, str(CONCURRENCY)], env=environment, cwd=folder, capture_output=True, text=True, timeout=600
        )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr[-2000:]}")
    stats = server.stats(answered=True)
    missing = count - sum(1 for p in (t.prompt for t in questions(count)) if p in stats["answered"])
    if missing:
        raise RuntimeError(f"{tool} left {missing} of {count} prompts unasked")
    return rate(stats["spans"])


def limits(server: Server, seconds: float) -> Figures:
    """Eight actors under requests and tokens per minute, of which the tokens are what binds."""
    requests, tokens = 1800.0, 48_000.0  # a question and its answer are about 36 tokens: 1,330 a minute
    server.set(requests_per_minute=requests, tokens_per_minute=tokens)
    count = int(tokens / 36 * seconds / 60)
    allowed = {"requests_per_minute": int(requests), "tokens_per_minute": int(tokens), "max_concurrency": 64}
    with storage() as folder:
        generate_answers(Lab.of(config_for(server.url, folder, actors=8, **allowed), questions(count, "l")).job, 1)
    stats = server.stats()
    took = max(e for _, e in stats["spans"]) - min(s for s, _ in stats["spans"])
    used = (stats["prompt_tokens"] + stats["completion_tokens"]) / took * 60 / tokens
    refused = stats["outcomes"].get("over_limit", 0) / stats["arrived"]
    return {
        "limit_used": (round(used, 3), ">= 0.90", used >= 0.9),
        "limit_429s": (round(refused, 5), "< 0.005", refused < 0.005),
    }


def kills(server: Server, count: int, times: int = 10) -> Figures:
    """kill -9 at random points: what had arrived is never paid again, what was in flight is at most the concurrency."""
    server.set(latency_s=0.2, seed=2)
    chance, repaid, lost, most_lost = random.Random(3), 0, 0, 0
    with storage() as folder:
        file = Path(folder, "config.json")
        config = config_for(server.url, f"{folder}/out")
        file.write_text(config.model_dump_json())
        arrived_before: dict[str, int] = {}
        for turn in range(times + 1):
            before = server.stats()["arrived"]
            buyer = _start_buyer(file, count)
            if turn < times:
                goal = before + chance.randint(1, max(2, 2 * count // times - CONCURRENCY))
                while server.stats()["arrived"] < goal and buyer.poll() is None:
                    time.sleep(0.02)
                buyer.send_signal(signal.SIGKILL)
            buyer.communicate(timeout=600)
            time.sleep(0.5)  # what was in flight is answered to nobody
            answered = server.stats(answered=True)["answered"]
            repaid += sum(answered[p] > n for p, n in arrived_before.items())
            ledger = Ledger(Store(config.storage), "perf")
            prompts = {t.id: t.prompt for t in questions(count)}
            arrived_before = {prompts[e.task_id]: answered[prompts[e.task_id]] for e in ledger.entries() if e.responded}
            lost_now = sum(answered.values()) - len(ledger) - lost
            lost, most_lost = lost + lost_now, max(most_lost, lost_now)
        stats = server.stats()
    return {
        "kills": (times, 10, times == 10),
        "answers_at_the_end": (len(ledger), count, len(ledger) == count),
        "arrived_and_paid_again": (repaid, 0, repaid == 0),
        "most_lost_by_a_kill": (most_lost, f"<= {CONCURRENCY}", most_lost <= CONCURRENCY),
        "bill_after_kills_within_upper_bound": (
            round(stats["charged_usd"] / ledger.spent_at_most(), 4),
            "<= 1",
            stats["charged_usd"] <= ledger.spent_at_most() + 1e-9,
        ),
    }


def _start_buyer(config: Path, count: int) -> subprocess.Popen[str]:
    buyer = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("teachers_buyer.py")), str(config), str(count)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert buyer.stdout is not None
    buyer.stdout.readline()
    return buyer


def budget(server: Server, count: int) -> Figures:
    """A budget for a third of the tasks, with faults and two kills on the way: the server's bill must not pass it."""
    server.set(latency_s=0.1, faults=0.05, hang_s=3.0, seed=4)
    limit = count / 3 * 100e-6
    with storage() as folder:
        file = Path(folder, "config.json")
        file.write_text(config_for(server.url, f"{folder}/out", budget_usd=limit, timeout_s=1.0).model_dump_json())
        for kill_at in (count // 12, count // 6, None):
            buyer = _start_buyer(file, count)
            while kill_at and server.stats()["arrived"] < kill_at and buyer.poll() is None:
                time.sleep(0.02)
            if kill_at:
                buyer.send_signal(signal.SIGKILL)
            said, _ = buyer.communicate(timeout=600)
        outcomes = json.loads(said.splitlines()[-1])
    charged = server.stats()["charged_usd"]
    return {
        "budget_reached": (outcomes.get("no budget", 0), "> 0", outcomes.get("no budget", 0) > 0),
        "budget_spent_by_the_bill": (round(charged / limit, 4), "<= 1", charged <= limit),
    }


def memory(server: Server, counts: tuple[int, int]) -> Figures:
    """The driver's peak memory at few and at many tasks, without what it shares with Ray's object store.

    A job that loads its tasks from benchmarks, to know its fingerprint, has the list of them beside that.
    """
    server.set(latency_s=0.0)
    peaks = [_peak_of_driver(server, count) for count in counts]
    growth = (peaks[1] - peaks[0]) / 2**20
    return {
        f"driver_mib_at_{counts[0]}": (round(peaks[0] / 2**20), None, True),
        f"driver_mib_at_{counts[1]}": (round(peaks[1] / 2**20), None, True),
        "driver_growth_mib": (round(growth), "<= 50", growth <= 50),
    }


def _peak_of_driver(server: Server, count: int) -> int:
    with storage() as folder:
        config, file = config_for(server.url, folder, actors=2, max_concurrency=64), Path(folder, "config.json")
        Lab.of(config, questions(count, "m"))
        file.write_text(config.model_dump_json())
        command = [sys.executable, str(Path(__file__).with_name("teachers.py")), "--driver", str(file)]
        driver = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        peak, process = 0, psutil.Process(driver.pid)
        while driver.poll() is None:
            with contextlib.suppress(psutil.Error):
                used = process.memory_info()
                peak = max(peak, used.rss - used.shared)
            time.sleep(0.2)
        if driver.returncode:
            raise RuntimeError(f"the driver of {count} tasks failed")
        return peak
