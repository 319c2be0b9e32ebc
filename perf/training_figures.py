"""What perf/training.py makes of its contenders' seconds: the table, and figures with their targets."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from _figures import at_most, figure

FIELD_PLAIN_H100 = 59_000
"""Tokens/s of a plain loop on one H100 (16 x 1024 random tokens, rank 128), measured apart."""


REAL = "train_modifier's own worker"
"""Ray Train, DeepSpeed, checkpoints, ledger, trackers and all."""
IN_TURN = "it, in turn with the bare loop"
"""Which takes each step after it in the same process: how long one takes differs from process to process."""


def report(job: dict[str, Any], results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """The table and, as the last line, the figures with their targets."""
    speed = {name: statistics.median(rate(r, "targets") for r in found) for name, found in results.items()}
    cpu = {name: statistics.median(r["targets"] / r["cpu_seconds"] for r in found) for name, found in results.items()}
    tokens = {name: statistics.median(rate(r, "tokens") for r in found) for name, found in results.items()}
    goal = loss_to_reach(results)
    until: dict[str, float | None] = {}
    for name, found in results.items():
        reached = [taken for r in found if (taken := seconds_to(r, goal)) is not None]
        until[name] = statistics.median(reached) if reached else None
    print(f"\n{job['device']}, {job['dtype']}, rank {job['rank']}, {job['batch']} examples a step, ", end="")
    print(f"{job['threads']} threads, {options.rounds} rounds, data: {options.data or options.kind}\n")
    head = ("", "targets/s", "(rounds)", "/CPU s", "tokens/s", "peak GB", f"s to loss {goal:.3f}")
    print(f"{head[0]:34}{head[1]:>11}{head[2]:>22}{head[3]:>9}{head[4]:>11}{head[5]:>9}{head[6]:>18}")
    for name, found in results.items():
        rounds = " ".join(f"{rate(r, 'targets'):.0f}" for r in found)
        peak = max(r["peak_bytes"] for r in found) / 1e9
        there = "-" if (seconds := until[name]) is None else f"{seconds:.1f}"
        print(f"{name:34}{speed[name]:11.0f}{rounds:>22}{cpu[name]:9.1f}{tokens[name]:11.0f}{peak:9.2f}{there:>18}")
    found_figures = figures(job, results, speed, tokens, until)
    if "ours" in results:
        achieved, most = flops_per_second(job, results["ours"]), matmul_rate(job)
        print(f"\nours: {achieved / 1e12:.2f} of the {most / 1e12:.2f} TFLOP/s of a large {job['dtype']} product here")
        found_figures["share_of_matmul_rate"] = figure(achieved / most)
        for name, value in results["ours"][-1]["profile"].items():
            print(f"  {name:12}{value:9.1f}" + ("" if name == "kernels" else " ms a step"))
    print(json.dumps(found_figures))


def figures(
    job: dict[str, Any],
    results: dict[str, Any],
    speed: dict[str, float],
    tokens: dict[str, float],
    until: dict[str, float | None],
) -> dict[str, Any]:
    """Ratios with their targets; what was left out is not there."""
    found: dict[str, Any] = {}

    processor = {n: statistics.median(r["targets"] / r["cpu_seconds"] for r in found) for n, found in results.items()}

    def add(name: str, value: float, target: float, met: bool) -> None:
        found[name] = figure(value, target, met)

    ours, plain = speed.get("ours"), speed.get("plain padded PEFT loop")
    trl = max((v for n, v in speed.items() if n.startswith("TRL")), default=None)
    if ours and plain:
        add("targets_per_second_over_plain", ours / plain, 2.0, ours / plain >= 2)
        if job["device"] == "cpu":
            ratio = processor["ours"] / processor["plain padded PEFT loop"]
            add("targets_per_cpu_second_over_plain", ratio, 2.0, ratio >= 2)
        seconds = until["ours"], until["plain padded PEFT loop"]
        if seconds[0] and seconds[1]:
            add("time_to_loss_over_plain", seconds[1] / seconds[0], 2.0, seconds[1] / seconds[0] >= 2)
    if ours and trl:
        add("targets_per_second_over_trl", ours / trl, 1.0, ours >= trl)
    if ours and job["device"] == "cuda":
        add("tokens_per_second", tokens["ours"], 3 * FIELD_PLAIN_H100, tokens["ours"] >= 3 * FIELD_PLAIN_H100)
    full = results.get(REAL)
    if full and results.get("ours"):
        extra = step_seconds(full, results["ours"]) / step_seconds(results["ours"], full) - 1
        add("ray_deepspeed_overhead", extra, 0.03, extra <= 0.03)
        found["of_the_median_step"] = figure(middle_step(full) / middle_step(results["ours"]) - 1)
        beside = statistics.median(1 - r["seconds_in_steps"] / r["seconds"] for r in full)
        found["of_it_between_steps"] = figure(beside)
        paused = statistics.median(sum(r["checkpoint_seconds"]) / r["seconds"] for r in full)
        found["of_it_checkpoints"] = figure(paused)
    if in_turn := results.get(IN_TURN):
        found |= figures_in_turn(in_turn, job["checkpoint_steps"])
    return found


def rate(result: dict[str, Any], what: str) -> float:
    return float(result[what] / result["seconds"])


def step_seconds(found: list[dict[str, Any]], beside: list[dict[str, Any]]) -> float:
    """Mean seconds of a step, checkpoints included, over the steps that both took; the median of the rounds."""
    shortest = min(len(r["steps"]) for r in [*found, *beside])
    return statistics.median(statistics.mean(s for s, _ in r["steps"][:shortest]) for r in found)


def figures_in_turn(found: list[dict[str, Any]], steps_between: int) -> dict[str, Any]:
    """How much longer a step of the worker takes, from steps that the bare loop took in turn with it.

    And what that is made of, as shares of a bare step: the steps themselves with their waiting for checkpoints, and
    what is slower while a checkpoint is stored beside them. The steps between two checkpoints are drawn as one for
    the interval (95 %, bootstrap). The first of them are left out: they compile; so are the last, if they are fewer.

    Where storing takes longer than the worker's steps between two checkpoints take alone, there is no such figure: the
    next checkpoint would wait for it, which it need not where another loop takes turns.
    """
    blocks = []
    for result in found:
        pairs = np.array(result["pairs"])  # (steps, 3): seconds of the worker, of the bare loop, those beside storing
        whole = range(steps_between, len(pairs) - steps_between + 1, steps_between)
        blocks += [pairs[i : i + steps_between] for i in whole]
    to_store = statistics.mean(seconds for result in found for seconds in result["seconds_to_store"])
    stored = {"in_turn_seconds_to_store": figure(to_store)}
    between = statistics.mean(float(block[:, 1].sum()) for block in blocks)
    if to_store >= between:
        print(
            f"{IN_TURN}: no figure, a checkpoint is stored in {to_store:.2f} s, its steps take {between:.2f} s: ",
            end="",
        )
        print("more of them are needed between two")
        return stored

    def shares(drawn: list[Any]) -> tuple[float, float]:
        worker, bare, beside = np.concatenate(drawn).T
        steps, storing = float(worker.sum() / bare.sum() - 1), 0.0
        if 0 < (beside > 0).sum() < len(beside):
            slower = bare[beside > 0].sum() - (beside > 0).sum() * bare[beside == 0].mean()  # seconds
            # It would fall on the worker's steps if those were alone, beside what of the storing already does, and the
            # bare loop would be so much faster: (worker + slower) / (bare - slower) - 1, nearly.
            storing = float(2 * slower / bare.sum())
        return steps, storing

    rng = np.random.default_rng(0)
    draws = [sum(shares([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])) for _ in range(2000)]
    interval = [float(bound) for bound in np.quantile(draws, [0.025, 0.975])]
    steps, storing = shares(blocks)
    return {
        "ray_deepspeed_overhead_in_turn": at_most(steps + storing, 0.03, interval=interval, n=sum(map(len, blocks))),
        "in_turn_steps": figure(steps),
        "in_turn_storing": figure(storing),
    } | stored


def middle_step(found: list[dict[str, Any]]) -> float:
    """Median seconds of a step, which a few that waited for something do not show in; the median of the rounds."""
    return statistics.median(statistics.median(s for s, _ in r["steps"]) for r in found)


def slowest_steps(result: dict[str, Any], count: int = 6) -> dict[int, dict[str, float]]:
    """The steps that took longest, which a median does not show, by number from behind the warm-up.

    Returns:
        Of each its seconds and what happened in it of `training_plain.counters`.
    """
    found: dict[int, dict[str, float]] = {}
    counted = result["counters"]
    slowest = sorted(range(len(result["steps"])), key=lambda n: -result["steps"][n][0])[:count]
    for number in slowest:
        before, after = counted[max(0, number - 1)], counted[number]
        happened = {name: after[name] - before[name] for name in after if after[name] > before[name]}
        found[number] = {"seconds": round(result["steps"][number][0], 3)} | happened
    return found


def loss_to_reach(results: dict[str, list[dict[str, Any]]]) -> float:
    """The validation loss that every contender reached."""
    reached = [min(loss for _, loss in r["curve"]) for found in results.values() for r in found if r["curve"]]
    return max(reached, default=math.nan)


def seconds_to(result: dict[str, Any], goal: float) -> float | None:
    return next((seconds for seconds, loss in result["curve"] if loss <= goal), None)


def flops_per_second(job: dict[str, Any], found: list[dict[str, Any]]) -> float:
    """Work done per second: base forward and backward to activations, LoRA also to weights, logits at targets.

    Of the tokens that were computed: where examples of a row begin alike, that beginning is one.
    """
    if not found:
        return 0.0
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(job["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    base = sum(m.in_features * m.out_features for m in linear)
    lora = sum(job["rank"] * (m.in_features + m.out_features) for m in linear)
    head = config.vocab_size * config.hidden_size
    return statistics.median(
        (r["computed"] * (4 * base + 6 * lora) + r["targets"] * 4 * head) / r["seconds"] for r in found
    )


def matmul_rate(job: dict[str, Any]) -> float:
    """FLOP/s of a large square product in the dtype that was trained in."""
    n = 8192 if job["device"] == "cuda" else 1024
    torch.set_num_threads(job["threads"])
    a = torch.randn(n, n, dtype=getattr(torch, job["dtype"]), device=job["device"])
    times = []
    for _ in range(12):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)
