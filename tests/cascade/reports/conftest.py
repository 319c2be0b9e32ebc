"""A report's data as a real run makes it, small and drawn from a fixed seed."""

from __future__ import annotations

import random

import pytest

from cascade.reports.data import CurvePoint, FailureRow, ReferenceRow, ReportData, Sample, TrialRow
from cascade.reports.summary import MODELS, Summary, TierRow
from cascade.tasks import Message, Outcome, Task, Verdict

FAMILIES = ("chain_sum", "gcd", "letter_counting", "number_sorting", "spell_backward", "word_sequence_reversal")
PASS_RATES = {"base": 0.05, "modifier": 0.45, "compressed": 0.44}


def _verdicts(tasks: list[Task], model: str, rng: random.Random) -> list[Verdict]:
    rows = []
    for task in tasks:
        miss: Outcome = "unparsed" if model == "base" and rng.random() < 0.5 else "fail"
        outcome: Outcome = "pass" if rng.random() < PASS_RATES[model] * (1.6 - 0.3 * task.difficulty) else miss
        rows.append(Verdict(task.id, "smollm2", "" if model == "base" else "v1", outcome, answer="7"))
    return rows


@pytest.fixture(scope="session")
def report_data() -> ReportData:
    rng = random.Random(5)
    tasks = [
        Task(
            id=f"reasoning_gym/{FAMILIES[i % 6]}-{i}",
            benchmark="reasoning_gym",
            domain="reasoning",
            split="test",
            messages=(Message("user", f"What is {i} + 7 <&>?"),),
            reference={"answer": str(i + 7)},
            difficulty=1 + i % 3,
            category=FAMILIES[i % 6],
        )
        for i in range(300)
    ]
    verdicts = {model: _verdicts(tasks, model, rng) for model in MODELS}
    tiers = [
        TierRow(1, "answer-key-small", True, 840, 570, 270, 860, 51_000, 5_200, 0.0029),
        TierRow(2, "answer-key-medium", True, 270, 181, 89, 275, 17_000, 1_900, 0.0054),
        TierRow(3, "answer-key-large", True, 89, 80, 9, 90, 6_000, 720, 0.0124),
    ]
    summary = Summary.of(
        domain="reasoning",
        base_model="SmolLM2-135M-Instruct",
        **verdicts,
        tiers=tiers,
        examples=831,
        cost_single_teacher_usd=0.0841,
        adapter_bytes=19_500_000,
        compressed_bytes=3_410_000,
        wall_seconds=1043,
        peak_rss_bytes=5_120_000_000,
        max_ratio=48 / 260,
        modifier_version="20260101-ab12cd34ef56",
        config="configs/quickstart.yaml",
        prompt_style="three worked examples",
    )
    curve = [
        CurvePoint(s, 2.4 * 0.985**s + 0.3 * rng.random(), 1e-3, 290.0, 2.5 * 0.987**s if s % 20 == 0 else None)
        for s in range(1, 161)
    ]
    trials = [
        TrialRow(
            f"prune {p:.0%}, rank {r}, int4",
            int(19_500_000 * (1 - p) * r / 96),
            0.5 + p**3 + 4 / r + 0.02 * rng.random(),
            0.43 if r == 64 and p == 0.75 else None,
            r == 64 and p == 0.75,
        )
        for p in (0.5, 0.65, 0.75, 0.85)
        for r in (32, 64, 96)
    ]
    bins = [
        {"lower": b / 10, "upper": b / 10 + 0.1, "n": 20, "confidence": b / 10 + 0.05, "accuracy": b / 10 + 0.08}
        for b in range(9)
    ]
    bins = [b | {"low": max(0.0, b["accuracy"] - 0.15), "high": min(1.0, b["accuracy"] + 0.15)} for b in bins]
    return ReportData(
        summary=summary,
        tasks=tasks,
        verdicts=verdicts,
        tiers=tiers,
        curve=curve,
        trials=trials,
        router={
            "reliability": {"base": bins[:3], "reasoning": bins},
            "ece": {"base": 0.031, "reasoning": 0.042},
            "policies": {
                "router": {"accuracy": 0.46, "low": 0.4, "high": 0.52, "n": 300},
                "best single": {"accuracy": 0.44, "low": 0.38, "high": 0.5, "n": 300},
                "random": 0.25,
                "oracle": {"accuracy": 0.48, "n": 300},
            },
        },
        samples=[
            Sample(
                t.id,
                t.category,
                t.prompt,
                "Sure! <b>Let me think</b> about it.",
                t.reference["answer"],
                t.reference["answer"],
                "unparsed",
                "pass",
            )
            for t in tasks[:8]
        ],
        failures=[FailureRow("number_sorting: wrong order", 61), FailureRow("gcd: a divisor, not the greatest", 22)],
        references=[ReferenceRow("bbh", "GPT-4", 83.1, "technical report", 71.0, 71 / 83.1, 300, 1.0, 1.08)],
    )
