"""`summary.json`: the figures of one pipeline run, each with what it takes to judge it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cascade.errors import DataError
from cascade.scoring.statistics import Score, mcnemar_exact, paired_bootstrap
from cascade.tasks import Verdict

MODELS = ("base", "modifier", "compressed")
"""What is compared on the test tasks, in the order of every table and figure."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelScore(_Record):
    """How one model did on the test tasks."""

    n: int
    passed: int
    accuracy: float
    low: float = Field(description="lower end of the 95 % Wilson interval")
    high: float
    unparsed: int = Field(description="answers in which nothing could be read; they count as not passed")
    errors: int = Field(description="verdicts that say nothing of the answer; they count as not passed")

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> ModelScore:
        """Count verdicts of one model."""
        s = Score.of(verdicts)
        return cls(
            n=s.n, passed=s.passed, accuracy=s.accuracy, low=s.low, high=s.high, unparsed=s.unparsed, errors=s.errors
        )

    @property
    def parsed_accuracy(self) -> float:
        """Passed among the answers that could be read: what is left of a gain once form is set aside."""
        readable = self.n - self.unparsed - self.errors
        return self.passed / readable if readable else 0.0


@dataclass(frozen=True, slots=True)
class TierRow:
    """What one teacher tier did.

    Attributes:
        tasks_in: failures that the tier was asked.
        verified: answers that passed the task's own scorer, and so became examples.
        escalated: tasks left to the next tier (not verified, or still failed by the probe); for the last tier
            those that nobody solved.
        requests: answered requests: those that missed, repairs and judges included.
        cost_usd: of all requests of the tier.
        skipped: tasks that were sent past this tier, since it was expected to fail them.
        repairs: requests in which a failed answer went back to the teacher.
        judge_requests: requests to the judge about this tier's answers.
        judge_usd: what those cost, part of `cost_usd`.
        by_repair: verified answers that had been sent back at least once.
        by_judge: verified answers that a judge accepted, for want of an exact scorer.
    """

    tier: int
    teacher: str
    answer_key: bool
    tasks_in: int
    verified: int
    escalated: int
    requests: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    skipped: int = 0
    repairs: int = 0
    judge_requests: int = 0
    judge_usd: float = 0.0
    by_repair: int = 0
    by_judge: int = 0

    @property
    def settled(self) -> int:
        """Tasks that went no further."""
        return self.tasks_in - self.escalated


class TeacherName(_Record):
    """A tier's teacher, and whether it only replays known answers."""

    tier: int
    name: str
    answer_key: bool


class Summary(_Record):
    """The figures of one pipeline run."""

    domain: str
    base_model: str
    modifier_version: str = ""
    config: str = Field("", description="the config file that was run")
    prompt_style: str = Field("", description="the style in which the base scored best and was tested")

    wall_seconds: float = Field(description="of the work itself, over all interrupted runs")
    peak_rss_bytes: int = Field(description="most resident memory of all processes together")

    n: int = Field(description="test tasks; all three models were judged on the same ones")
    base_accuracy: float
    modifier_accuracy: float
    compressed_accuracy: float
    scores: dict[str, ModelScore] = Field(description="base, modifier, compressed: counts and 95 % intervals")
    gain: float = Field(description="compressed_accuracy - base_accuracy")
    gain_interval: tuple[float, float] = Field(description="95 % paired bootstrap over tasks")
    mcnemar_p: float = Field(description="exact, two-sided: compressed against base on the same tasks")
    compression_loss: float = Field(description="modifier_accuracy - compressed_accuracy")
    compression_loss_interval: tuple[float, float] = Field(description="95 % paired bootstrap over tasks")

    adapter_bytes: int = Field(description="the uncompressed adapter in fp16")
    compressed_bytes: int
    ratio: float = Field(description="compressed_bytes / adapter_bytes")
    max_ratio: float | None = Field(None, description="the largest ratio that the config allows")

    failures: int = Field(description="training tasks that the base failed: what the teachers were asked")
    tier_shares: dict[str, float] = Field(description="tier -> share of the failures that went no further than it")
    unsolved_share: float = Field(description="share of the failures that no tier solved")
    examples: int = Field(description="verified answers that were trained on")
    cost_usd: float
    cost_single_teacher_usd: float = Field(description="all failures by the last tier alone, same tokens")
    saving: float = Field(description="1 - cost_usd / cost_single_teacher_usd")
    saving_interval: tuple[float, float] | None = Field(None, description="95 % bootstrap over the failures")
    probe_seconds: float = Field(0.0, description="compute of the probes between the tiers; one teacher needs none")
    judged: int = Field(0, description="verified answers that a judge model accepted, for want of an exact scorer")
    teachers: tuple[TeacherName, ...]
    teacher_statement: str = Field(description="says in plain words where answers came from a key, not from a model")

    @classmethod
    def of(
        cls,
        *,
        domain: str,
        base_model: str,
        base: Sequence[Verdict],
        modifier: Sequence[Verdict],
        compressed: Sequence[Verdict],
        tiers: Sequence[TierRow],
        examples: int,
        cost_single_teacher_usd: float,
        adapter_bytes: int,
        compressed_bytes: int,
        wall_seconds: float,
        peak_rss_bytes: int,
        max_ratio: float | None = None,
        modifier_version: str = "",
        config: str = "",
        prompt_style: str = "",
        probe_seconds: float = 0.0,
        saving_interval: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> Summary:
        """Every derived figure from the verdicts on the test tasks, the tiers' rows and the measured sizes.

        Raises:
            DataError: the three models were not judged on the same tasks, once each, or there are none.
        """
        return cls(
            domain=domain,
            base_model=base_model,
            modifier_version=modifier_version,
            config=config,
            prompt_style=prompt_style,
            wall_seconds=wall_seconds,
            peak_rss_bytes=peak_rss_bytes,
            adapter_bytes=adapter_bytes,
            compressed_bytes=compressed_bytes,
            ratio=compressed_bytes / adapter_bytes,
            max_ratio=max_ratio,
            examples=examples,
            probe_seconds=probe_seconds,
            saving_interval=saving_interval,
            **_comparison(dict(zip(MODELS, (base, modifier, compressed), strict=True)), seed),
            **_economy(tiers, cost_single_teacher_usd),
        )


def _comparison(verdicts: dict[str, Sequence[Verdict]], seed: int) -> dict[str, Any]:
    """The fields of `Summary` that compare the three models on the test tasks."""
    passes = aligned_passes(verdicts)
    scores = {name: ModelScore.of(v) for name, v in verdicts.items()}
    gain = paired_bootstrap(passes["base"], passes["compressed"], seed=seed)
    loss = paired_bootstrap(passes["compressed"], passes["modifier"], seed=seed)
    return {
        "n": scores["base"].n,
        **{f"{name}_accuracy": score.accuracy for name, score in scores.items()},
        "scores": scores,
        "gain": scores["compressed"].accuracy - scores["base"].accuracy,
        "gain_interval": (gain.low, gain.high),
        "mcnemar_p": mcnemar_exact(passes["base"], passes["compressed"]),
        "compression_loss": scores["modifier"].accuracy - scores["compressed"].accuracy,
        "compression_loss_interval": (loss.low, loss.high),
    }


def _economy(tiers: Sequence[TierRow], single_usd: float) -> dict[str, Any]:
    """The fields of `Summary` that say who answered what, and for how much."""
    cost = sum(t.cost_usd for t in tiers)
    failures = tiers[0].tasks_in + tiers[0].skipped if tiers else 0
    return {
        "failures": failures,
        "tier_shares": {str(t.tier): t.settled / failures if failures else 0.0 for t in tiers},
        "unsolved_share": 1 - sum(t.settled for t in tiers) / failures if failures else 0.0,
        "judged": sum(t.by_judge for t in tiers),
        "cost_usd": cost,
        "cost_single_teacher_usd": single_usd,
        "saving": saving(cost, single_usd),
        "teachers": tuple(TeacherName(tier=t.tier, name=t.teacher, answer_key=t.answer_key) for t in tiers),
        "teacher_statement": teacher_statement(tiers),
    }


def aligned_passes(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, list[bool]]:
    """Per model whether it passed each task, all in the order of the first model's tasks.

    Raises:
        DataError: the models were not judged on the same tasks, a task was judged twice, or there are none.
    """
    by_task = {name: {v.task_id: v.passed for v in rows} for name, rows in verdicts.items()}
    first, *others = by_task
    for name, rows in verdicts.items():
        if len(by_task[name]) != len(rows):
            raise DataError(f"{name}: {len(rows)} verdicts on {len(by_task[name])} tasks; one each is needed")
    for name in others:
        if by_task[name].keys() != by_task[first].keys():
            differing = len(by_task[name].keys() ^ by_task[first].keys())
            raise DataError(f"{first} and {name} were not judged on the same test tasks: {differing} differ")
    if not by_task[first]:
        raise DataError("there are no verdicts on test tasks, so there is nothing to compare")
    return {name: [passed[task] for task in by_task[first]] for name, passed in by_task.items()}


def saving(cost_usd: float, single_usd: float) -> float:
    """Share of `single_usd` that was not spent; 0 where the single teacher would have cost nothing."""
    return 1.0 - cost_usd / single_usd if single_usd else 0.0


def teacher_statement(tiers: Sequence[TierRow]) -> str:
    """One or two plain sentences on where the training answers came from."""
    replayed = [f"{t.teacher} (tier {t.tier})" for t in tiers if t.answer_key]
    real = [f"{t.teacher} (tier {t.tier})" for t in tiers if not t.answer_key]
    if not replayed:
        return f"Training answers were written by {', '.join(real)}." if real else "No teacher was asked."
    text = (
        f"{', '.join(replayed)}: no language model, but a server that replays the tasks' own answer key with a set "
        "share of mistakes. It shows that verification, escalation, accounting and training work; it says nothing "
        "of what a real teacher would have known or cost."
    )
    return text + (f" The other answers were written by {', '.join(real)}." if real else "")


def write_summary(summary: Summary, path: str | Path) -> None:
    """Write `summary.json`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_summary(path: str | Path) -> Summary:
    """Read `summary.json`."""
    return Summary.model_validate_json(Path(path).read_text(encoding="utf-8"))
