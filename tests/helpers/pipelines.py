"""The whole pipeline on a tiny random base, run as its user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml
from stand_in import save_tiny_base

from cascade import modifiers
from cascade.dataset import check_dataset
from cascade.tasks import Example, Task, Verdict
from cascade.teachers.ledger import Ledger
from ray_jobs import JOBS
from ray_jobs._export import export_dataset
from ray_jobs._failures import failure_kinds
from ray_jobs._runs import Runs

ROOT = Path(__file__).parents[2]
CASCADE = [sys.executable, "-m", "ray_jobs.cli"]


def write_config(folder: Path, storage: str | None = None, **changes: object) -> Path:
    """A domain of a few sums for a tiny base; its teachers are slow enough to be killed at work."""
    base = folder / "base"
    if not base.exists():
        save_tiny_base(base)
    generators = [
        {"name": "chain_sum", "difficulty": n, "options": {"min_terms": n + 1, "max_terms": n + 1, "max_digits": 1}}
        for n in (1, 2, 3)
    ]
    sources = [{"benchmark": "reasoning_gym", "options": {"generators": generators}}]
    endpoint = {"base_url": "answer-key", "requests_per_minute": 100_000, "max_concurrency": 4}
    prices = {"input_usd_per_million": 1.0, "output_usd_per_million": 2.0}
    ability = {"slip_rate": 0.1, "latency_ms": 150}
    lora = {"rank": 4, "epochs": 2, "tokens_per_step": 256, "max_length": 256}
    config = {
        "domain": "sums",
        "storage": storage or str(folder / "out"),
        "base": {"model": str(base), "dtype": "float32"},
        "tasks": {
            "train": {"count": 60, "sources": sources},
            "validation": {"count": 24, "sources": sources},
            "test": {"count": 30, "sources": sources},
            "general": {
                "count": 8,
                "sources": [{"benchmark": "reasoning_gym", "options": {"generators": [{"name": "gcd"}]}}],
            },
        },
        "student": {
            "max_tokens": 8,
            "selection_tasks": 8,
            "prompts": [{"name": "direct"}, {"name": "shots", "shots": 1}],
        },
        "tiers": [
            {
                "name": f"answer-key-{n}",
                "endpoints": [endpoint],
                "answer_key": {"max_difficulty": n, **ability},
                **{key: value * 5**n for key, value in prices.items()},
            }
            for n in (1, 2, 3)
        ],
        "budget_usd": 1.0,
        "probe": {"lora": lora},
        "training": {"lora": {**lora, "epochs": 6}, "checkpoint_steps": 20, "replay_share": 0.1},
        "compression": {"trials": 4, "max_ratio": 0.9, "max_resident_ratio": 0.9},
        "router": {"epochs": 5},
    }
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    return path


def undrawn(runs: Runs) -> Runs:
    """Without their tasks, which take seconds to draw: for what only names or shows the runs."""
    runs.__dict__.update(train_tasks=[], validation_tasks=[], test_tasks=[], general_tasks=[])
    return runs


def environment() -> dict[str, str]:
    """Of every process that a test starts. The clusters are on loopback and need no tokens."""
    return os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "RAY_AUTH_MODE": "disabled"}


def run_cascade(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CASCADE, "run", str(config)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def kill_when(config: Path, reached: Callable[[], bool]) -> None:
    """Start the pipeline and kill -9 its driver as soon as a condition holds."""
    driver = subprocess.Popen(
        [*CASCADE, "run", str(config)], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not reached():
        assert driver.poll() is None, driver.stderr.read().decode()[-3000:] if driver.stderr else ""
        assert time.monotonic() < deadline, "the pipeline did not get that far"
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # Ray's processes notice that their driver is gone


def answered(runs: Runs) -> Counter[str]:
    """How often each request of the domain's ledger was answered."""
    return Counter(e.key for e in Ledger(runs.store, runs.config.domain).entries() if e.responded)


def check_results(runs: Runs) -> None:
    """What a finished pipeline must have left."""
    store, config = runs.store, runs.config
    assert all(runs.run(job).done for job in JOBS)
    summary = json.loads(store.read_bytes("summary.json"))
    assert summary["n"] == config.tasks.test.count
    assert summary["compressed_bytes"] <= config.compression.max_ratio * summary["adapter_bytes"]
    assert "answer key" in summary["teacher_statement"] or "answer-key" in summary["teacher_statement"]
    assert abs(sum(summary["tier_shares"].values()) + summary["unsolved_share"] - 1) < 1e-9
    modifier = modifiers.current(store, config.domain)
    assert modifier is not None
    assert modifier.disk_bytes == summary["compressed_bytes"]
    assert all(name.startswith("answer-key") for name in modifier.teachers)
    report = store.read_bytes(f"{config.domain}/report.html").decode()
    assert "answer key" in report or "answer-key" in report
    general = config.tasks.general
    assert ("What was forgotten elsewhere" in report) == (general is not None)
    for name in ("general_base", "general_compressed"):
        judged = {v.task_id for v in runs.validate_modifier.read(f"{name}_verdicts", Verdict)}
        assert judged == {t.id for t in runs.general_tasks}
        assert len(judged) == (general.count if general else 0)
    assert set(modifier.scores) == {"base", "modifier", "compressed"}

    train = {t.id for t in runs.test_domain.read("tasks", Task)}
    examples = runs.train_modifier.read("examples", Example)
    assert examples
    assert {e.task_id for e in examples} <= train
    prompts = {t.prompt for t in runs.test_tasks}
    assert not any(m.content in prompts for e in examples for m in e.messages)
    curve = runs.train_modifier.read_arrow("curve")
    assert curve is not None
    steps = curve.column("step").to_pylist()
    assert steps == list(range(runs.train_modifier.metrics["steps"]))

    asked = [{t.id for t in runs.test(tier).read("unsolved", Task)} for tier in (0, 1, 2)]
    assert asked[0] >= asked[1] >= asked[2], "a tier saw what the tier before had solved"
    check_kinds_and_export(runs)


def check_kinds_and_export(runs: Runs) -> None:
    """Every failure has a kind, the report shows them, and what was trained on can be exported and checked."""
    failed = {t.id for t in runs.test_domain.read("unsolved", Task)}
    kinds = failure_kinds(runs)
    assert set(kinds.of) == failed
    assert set(kinds.of.values()) == {k.number for k in kinds.kinds}
    assert "What the base fails, by kind" in runs.store.read_bytes(f"{runs.config.domain}/report.html").decode()
    where, rows = export_dataset(runs, None)
    assert rows == len(runs.train_modifier.read("examples", Example))
    if runs.store.is_local:
        assert check_dataset(where).problems == []
