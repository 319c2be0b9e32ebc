"""A report's data as a real run makes it, small and drawn from a fixed seed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cascade.compression.account import LayerShare, StageCost
from cascade.reports.data import (
    CostRow,
    CurvePoint,
    FailureRow,
    GeneralRow,
    KindRow,
    KindSample,
    ReferenceRow,
    ReportData,
    Sample,
    Shortcut,
    TrialRow,
)
from cascade.reports.summary import MODELS, Summary, TierRow
from cascade.routing.calibration import reliability
from cascade.routing.train import CurvePoint as ThresholdPoint
from cascade.routing.train import Figure, OutputReport, RouterReport
from cascade.tasks import Message, Outcome, Task, Verdict
from cascade.teachers.economics import saving_interval

FAMILIES = ("chain_sum", "gcd", "letter_counting", "number_sorting", "spell_backward", "word_sequence_reversal")
PASS_RATES = {"base": 0.05, "modifier": 0.45, "compressed": 0.44}


def _verdicts(tasks: list[Task], model: str, rng: random.Random) -> list[Verdict]:
    rows = []
    for task in tasks:
        miss: Outcome = "unparsed" if model == "base" and rng.random() < 0.5 else "fail"
        outcome: Outcome = "pass" if rng.random() < PASS_RATES[model] * (1.6 - 0.3 * task.difficulty) else miss
        rows.append(Verdict(task.id, "smollm2", "" if model == "base" else "v1", outcome, answer="7"))
    return rows


def _router() -> RouterReport:
    """A report of the shape that training a router gives, with plausible figures."""
    rng = np.random.default_rng(3)

    def output(rate: float) -> OutputReport:
        p = np.clip(rng.beta(2, 2 / rate - 2, 120), 0, 1)
        y = rng.random(120) < p
        return OutputReport("platt", 120, 0.12, 0.03, {"platt": 0.5, "isotonic": 0.6}, reliability(p, y))

    def share(passed: int) -> Figure:
        return Figure.share([True] * passed + [False] * (120 - passed))

    return RouterReport(
        seed=17,
        threshold=0.5,
        queries=120,
        others=40,
        other_source="built-in general chat",
        outputs={"base": output(0.2), "reasoning": output(0.5)},
        ece_before=0.12,
        ece_after=0.03,
        accuracy=share(110),
        coverage=share(100),
        quality={
            n: share(k) for n, k in {"routed": 56, "base": 7, "best_single": 55, "random": 30, "oracle": 58}.items()
        },
        best_single="reasoning",
        gain={"base": Figure(0.41, 120, 0.33, 0.49), "best_single": Figure(0.008, 120, -0.01, 0.03)},
        other_to_base=share(115),
        follow_ups=share(110),
        no_follow_ups=share(118),
        curve=[ThresholdPoint(t, 0.9, 0.5, 0.45, 0.95) for t in (0.3, 0.5, 0.8)],
    )


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
    costs = [CostRow(f"t/{n}", n % 4, 0.00003 * (n % 7), 0.00001 * (n % 11 + 1)) for n in range(1000)]
    saved = saving_interval([c.paid_usd for c in costs], [c.single_usd for c in costs])
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
        probe_seconds=75.0,
        saving_interval=(saved.low, saved.high),
    )
    curve = [
        CurvePoint(
            s,
            2.4 * 0.985**s + 0.3 * rng.random(),
            1e-3 * min(1, (s + 1) / 10) * (1 - s / 170),
            290.0 + 20 * rng.random(),
            2.5 * 0.987**s if s % 20 == 19 else None,
            0.8 + rng.random(),
            1_200_000_000 + 1_000_000 * s,
            *((48, 4 + s // 5) if s % 40 == 39 else ()),
        )
        for s in range(160)
    ]
    trials = [
        TrialRow(
            f"prune {p:.0%}, rank {r}, int4",
            int(19_500_000 * (1 - p) * r / 96),
            0.5 + p**3 + 4 / r + 0.02 * rng.random(),
            0.43 if r == 64 and p == 0.75 else None,
            r == 64 and p == 0.75,
            resident_bytes=3_000_000,
            drift=None if p == 0.5 else p / 8,
            reason="the smallest within 2.0% of the modifier's accuracy" if r == 64 and p == 0.75 else "",
        )
        for p in (0.5, 0.65, 0.75, 0.85)
        for r in (32, 64, 96)
    ]
    return ReportData(
        summary=summary,
        tasks=tasks,
        verdicts=verdicts,
        tiers=tiers,
        costs=costs,
        curve=curve,
        trials=trials,
        router=_router().as_dict(),
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
        kinds=[
            KindRow(0, "chain_sum: add, minus, plus <&>", 500, (380, 80, 35), 5, 0.012, 0.05, 480),
            KindRow(1, "62% gcd: divisor, greatest", 340, (190, 101, 45), 4, 0.0087, 0.0341, 330),
        ],
        shortcuts=[Shortcut(1, 40, 10, 1, 0.0011, -0.0002, 0.002)],
        kind_samples=[
            KindSample(0, "reasoning_gym/a-1", "What is 3 + 4?", "It is 8, <b>I think</b>", 1, "answer-key-small", "7"),
            KindSample(0, "reasoning_gym/a-2", "What is 3 + 9?", "13", 0, "answer-key-large", "refused one"),
            KindSample(1, "reasoning_gym/b-1", "gcd of 4 and 6?", "4", 2, "answer-key-medium", "2"),
        ],
        stages=[
            StageCost("trained", 19_500_000, 19_490_000, 0.512),
            StageCost("truncated", 9_700_000, 9_800_000, 0.5171),
            StageCost("pruned", 5_100_000, 9_800_000, 0.5402),
            StageCost("quantised", 3_400_123, 9_800_000, 0.5288),
        ],
        layers=[
            LayerShare(block, module, 96, 8 + 5 * block, 0.1 + 0.02 * block, 0.4 - 0.03 * place)
            for block in range(6)
            for place, module in enumerate(("q_proj", "v_proj", "down_proj"))
        ],
        general=[
            GeneralRow("all", 500, 0.31, 0.302, -0.031, 0.015, 0.61),
            GeneralRow("arc", 200, 0.27, 0.28, -0.03, 0.05, 0.75),
            GeneralRow("mmlu", 300, 0.34, 0.317, -0.06, 0.013, 0.4),
        ],
        references=[
            ReferenceRow("bbh", "GPT-4", 83.1, "technical report", 71.0, 65.6, 75.8, 71 / 83.1, 300, 1.0, 1.08)
        ],
    )
