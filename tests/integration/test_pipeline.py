"""The whole pipeline on a tiny random base: submitted job by job, killed twice and resumed, run again for nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from stand_in import free_port, save_tiny_base

from cascade import modifiers
from cascade.artifacts import Store
from cascade.config import load_config
from cascade.tasks import Example, Task
from cascade.teachers.ledger import Ledger
from ray_jobs._runs import JOBS, Runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
CASCADE = [sys.executable, "-m", "ray_jobs.cli"]


def write_config(folder: Path, **changes: object) -> Path:
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
        "storage": str(folder / "out"),
        "base": {"model": str(base), "dtype": "float32"},
        "tasks": {
            "train": {"count": 60, "sources": sources},
            "validation": {"count": 24, "sources": sources},
            "test": {"count": 30, "sources": sources},
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
        "training": {"lora": {**lora, "epochs": 6}, "checkpoint_steps": 4, "replay_share": 0.1},
        "compression": {"trials": 4, "max_ratio": 0.9},
        "router": {"epochs": 5},
    }
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    return path


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
        timeout=600,
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


def ledger_lines(store: Store) -> int:
    folder = Path(store.path("ledger"))
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob("*.jsonl")) if folder.exists() else 0


def test_killed_twice_it_finishes_and_pays_nothing_twice(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    runs = Runs(load_config(config))
    store = runs.store
    kill_when(config, lambda: ledger_lines(store) >= 12)
    assert not runs.generate_tier1.done
    bought = {e.key for e in Ledger(store, "sums").entries() if e.responded}
    assert len(bought) >= 12

    trained = Path(store.path(runs.train_modifier.folder)) / "train"
    kill_when(config, lambda: bool(list(trained.rglob("checkpoint*/state"))))
    assert not runs.train_modifier.done

    finished = run_cascade(config)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    answered = Counter(e.key for e in Ledger(store, "sums").entries() if e.responded)
    assert max(answered.values()) == 1, "a request was paid twice"
    assert bought <= set(answered)
    check_results(runs)

    before = {job: runs.run(job).manifest["finished"] for job in JOBS}
    began = time.monotonic()
    again = run_cascade(config)
    assert again.returncode == 0
    assert time.monotonic() - began < 60
    assert {job: runs.run(job).manifest["finished"] for job in JOBS} == before, "a finished job was run again"

    changed = Runs(load_config(write_config(tmp_path, compression={"trials": 2, "max_ratio": 0.9})))
    assert changed.train_modifier.done
    assert not changed.compress_modifier.done
    assert not changed.validate_modifier.done


def check_results(runs: Runs) -> None:
    """What a finished pipeline must have left."""
    store = runs.store
    assert all(runs.run(job).done for job in JOBS)
    summary = json.loads(store.read_bytes("summary.json"))
    assert summary["n"] == 30
    assert summary["compressed_bytes"] <= 0.9 * summary["adapter_bytes"]
    assert "answer key" in summary["teacher_statement"] or "answer-key" in summary["teacher_statement"]
    assert abs(sum(summary["tier_shares"].values()) + summary["unsolved_share"] - 1) < 1e-9
    modifier = modifiers.current(store, "sums")
    assert modifier is not None
    assert modifier.disk_bytes == summary["compressed_bytes"]
    assert all(name.startswith("answer-key") for name in modifier.teachers)
    report = store.read_bytes("sums/report.html").decode()
    assert "answer key" in report or "answer-key" in report

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


@pytest.fixture(scope="module")
def ray_head() -> Iterator[str]:
    """A local Ray head as a user would start it; yields the address of its job server."""
    port, dashboard = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # its default may belong to another Ray
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    head = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        trial = [RAY, "job", "submit", "--address", address, "--", "true"]  # refused until the head's agent is up
        for _ in range(30):
            if subprocess.run(trial, env=environment(), capture_output=True, check=False).returncode == 0:
                break
            assert head.poll() is None, "the Ray head did not start"
            time.sleep(2)
        yield address
    finally:
        head.terminate()  # this head alone: `ray stop` would end every Ray on the machine
        head.wait(60)


def test_every_job_submitted_to_a_cluster(tmp_path: Path, ray_head: str) -> None:
    config = write_config(tmp_path)
    runs = Runs(load_config(config))
    for job in JOBS:
        submitted = subprocess.run(
            [RAY, "job", "submit", "--address", ray_head, "--working-dir", str(source_tree(tmp_path)), "--"]
            + [sys.executable, "-m", f"ray_jobs.{job}", "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment(),
        )
        assert submitted.returncode == 0, f"{job}: {submitted.stdout[-3000:]}{submitted.stderr[-2000:]}"
        assert runs.run(job).done


def source_tree(folder: Path) -> Path:
    """The three packages alone, as a working directory to submit."""
    tree = folder / "tree"
    if not tree.exists():
        tree.mkdir()
        for package in ("cascade", "ray_jobs", "serve"):
            shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def test_job_out_of_order_says_what_is_missing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    refused = subprocess.run(
        [sys.executable, "-m", "ray_jobs.generate_tier1", "--config", str(config)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert refused.returncode == 2
    assert "cascade test-domain" in refused.stderr
