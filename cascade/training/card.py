"""The README of a trained adapter's folder: what it fits, what it learned from, how, and what it scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cascade.config import Config
from cascade.scoring.statistics import Score
from cascade.tasks import Example


def data_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) over what is trained on, whatever its order."""
    lines = sorted(json.dumps([e.task_id, [m.as_dict() for m in e.messages]], ensure_ascii=False) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def adapter_card(
    config: Config,
    base_sha256: str,
    examples: Sequence[Example],
    metrics: Mapping[str, Any],
    scores: Mapping[str, Score] | None = None,
) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        metrics: what the training reported.
        scores: on the held-out test tasks, by model; None before they were measured.
    """
    front = {"base_model": config.base.model, "library_name": "peft", "tags": ["lora", "cascade", config.domain]}
    taught = [e for e in examples if e.tier > 0]
    teachers = ", ".join(sorted({e.teacher for e in taught})) or "none"
    replays = " Teachers named answer-key only replay the tasks' known answers." if "answer-key" in teachers else ""
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# LoRA adapter for {config.domain}",
        "",
        f"- **Base**: {config.base.model}, weights SHA-256 `{base_sha256}`. It fits no other.",
        f"- **Data**: {len(examples)} examples, SHA-256 `{data_sha256(examples)}`; {len(taught)} verified answers of "
        f"{teachers}, {len(examples) - len(taught)} of the base's own.{replays} None overlaps a test task.",
        *_scores(scores),
        *_learned(metrics),
        "- **Licence**: an adapter is a change to its base, whose licence holds for it too, as do the terms of the "
        "teachers for what is trained on their answers: check both before you pass it on.",
        "",
        "## Configuration",
        "",
        "```yaml",
        yaml.safe_dump({"seed": config.seed, "training": config.training.model_dump(mode="json")}).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _scores(scores: Mapping[str, Score] | None) -> list[str]:
    if not scores:
        return ["- **Scores**: not measured on test tasks yet."]
    found = [f"{name} {s.accuracy:.1%} [{s.low:.1%}, {s.high:.1%}]" for name, s in scores.items()]
    n = next(iter(scores.values())).n
    return [f"- **Scores** on {n} held-out test tasks, with 95 % intervals: {'; '.join(found)}."]


def _learned(metrics: Mapping[str, Any]) -> list[str]:
    line = f"- **Training**: {metrics['steps']} steps, {metrics['targets']:,} learned of {metrics['tokens']:,} tokens"
    if "validation_loss" in metrics:
        line += f"; loss {metrics['validation_loss']:.3f} on validation tasks after step {metrics['kept_step']}"
    return [line + "."]
