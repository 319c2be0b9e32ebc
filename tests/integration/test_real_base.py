"""A short run of the whole pipeline on a real base model, killed twice: what it learns shows on tasks it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import ROOT, answered, check_results, kill_when, run_cascade

from cascade.config import load_config
from cascade.reports.summary import Summary
from ray_jobs import JOBS
from ray_jobs._runs import Runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]


def write_short_quickstart(folder: Path, **compression: Any) -> Path:
    """The quickstart with one family of tasks that is quickly learned, no probe, and teachers that can be killed at
    work."""
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    words = {"name": "word_sequence_reversal", "difficulty": 1, "options": {"min_words": 3, "max_words": 3}}
    sources = [{"benchmark": "reasoning_gym", "options": {"generators": [words]}}]
    counts = {"train": 48, "validation": 16, "test": 32}
    config["tasks"] = {split: {"count": count, "sources": sources} for split, count in counts.items()}
    config["student"] |= {"max_tokens": 24, "selection_tasks": 8, "prompts": config["student"]["prompts"][:1]}
    for tier in config["tiers"]:
        tier["answer_key"] |= {"latency_ms": 150}
        tier["endpoints"][0] |= {"max_concurrency": 4}
    config["probe"]["enabled"] = False
    config["training"]["lora"]["epochs"] = 2
    config["training"]["checkpoint_steps"] = 4
    config["compression"] |= {"calibration_rows": 4, "trials": 2, "finalists": 1} | compression
    config["storage"] = str(folder / "out")
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_killed_twice_a_modifier_beats_its_base_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    config = write_short_quickstart(tmp_path)
    runs = Runs(load_config(config))
    kill_when(config, lambda: len(answered(runs)) >= 12)
    assert not runs.generate_tier1.done
    bought = answered(runs)

    trained = Path(runs.store.path(runs.train_modifier.folder)) / "train"
    kill_when(config, lambda: bool(list(trained.rglob("checkpoint*/state.safetensors"))))
    assert not runs.train_modifier.done

    finished = run_cascade(config)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert runs.train_modifier.metrics["attempts"] == 2
    assert runs.train_modifier.metrics["steps_again"] < runs.train_modifier.metrics["steps"]
    paid = answered(runs)
    assert max(paid.values()) == 1, "a request was paid twice"
    assert bought <= paid
    check_results(runs)
    summary = Summary.model_validate_json(runs.store.read_bytes("summary.json"))
    assert summary.n == 32
    assert summary.compressed_accuracy >= summary.base_accuracy + 0.2
    assert summary.mcnemar_p < 0.001
    assert summary.compressed_bytes <= 0.185 * summary.adapter_bytes

    before = {job: runs.run(job).manifest["finished"] for job in JOBS}
    again = run_cascade(config)
    assert again.returncode == 0
    assert {job: runs.run(job).manifest["finished"] for job in JOBS} == before, "a finished job was run again"

    changed = Runs(load_config(write_short_quickstart(tmp_path, trials=3)))
    assert changed.train_modifier.done
    assert not changed.compress_modifier.done
    assert not changed.validate_modifier.done
