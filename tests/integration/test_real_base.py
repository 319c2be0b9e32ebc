"""A short run of the whole pipeline on a real base model: what it learns must show on tasks it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pipelines import ROOT, run_cascade

from cascade.config import load_config
from cascade.reports.summary import Summary
from ray_jobs._runs import Runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def write_short_quickstart(folder: Path) -> Path:
    """The quickstart with one family of tasks that is quickly learned, and no probe."""
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    words = {"name": "word_sequence_reversal", "difficulty": 1, "options": {"min_words": 3, "max_words": 3}}
    sources = [{"benchmark": "reasoning_gym", "options": {"generators": [words]}}]
    counts = {"train": 48, "validation": 16, "test": 32}
    config["tasks"] = {split: {"count": count, "sources": sources} for split, count in counts.items()}
    config["student"] |= {"max_tokens": 24, "selection_tasks": 8, "prompts": config["student"]["prompts"][:1]}
    config["probe"]["enabled"] = False
    config["compression"] |= {"trials": 2, "finalists": 1}
    config["storage"] = str(folder / "out")
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_a_modifier_beats_its_base(tmp_path: Path) -> None:
    config = write_short_quickstart(tmp_path)
    finished = run_cascade(config)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    runs = Runs(load_config(config))
    summary = Summary.model_validate_json(runs.store.read_bytes("summary.json"))
    assert summary.n == 32
    assert summary.compressed_accuracy >= summary.base_accuracy + 0.2
    assert summary.mcnemar_p < 0.001
    assert summary.compressed_bytes <= 0.185 * summary.adapter_bytes
