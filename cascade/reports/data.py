"""What a report is made of, and the Parquet tables that lie beside it.

Every number of a report comes from these rows: `save_tables` writes them next to the page, `load_tables` reads them
back, and the page made from what was read is the same page.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cascade.compression.account import LayerShare, StageCost
from cascade.compression.pareto import front
from cascade.errors import DataError
from cascade.reports.summary import MODELS, Summary, TierRow, aligned_passes, read_summary, write_summary
from cascade.scoring.statistics import mcnemar_exact, paired_bootstrap
from cascade.tasks import Outcome, Task, Verdict, from_table, to_table


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One optimiser step of the modifier's training.

    Attributes:
        loss: mean cross-entropy (nats) of the step's trained tokens.
        tokens_per_s: trained and prompt tokens per second of the step.
        validation_loss: on held-out examples, where it was measured after this step.
        gradient_norm: before clipping.
        memory_bytes: of the first worker (`cascade.training.memory`); 0 where nobody looked.
        answered, passed: validation tasks that the student answered after this step, and answered rightly.
    """

    step: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    validation_loss: float | None = None
    gradient_norm: float | None = None
    memory_bytes: int = 0
    answered: int = 0
    passed: int = 0


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One recipe that the compression search tried.

    Attributes:
        recipe: in words.
        loss: cross-entropy (nats) on held-out examples with the compressed adapter.
        accuracy: on validation tasks, if it was a finalist.
        chosen: whether it became the compressed modifier.
        share: of those examples that the loss is over; below 1 the search gave the recipe up.
        resident_bytes: what serving would hold of it.
        fits: whether both sizes keep their limits.
        reason: why it was chosen, if it was.
        drift: mean change of a reference token's log-probability (nats, either way) against the uncompressed adapter,
            on those examples, if it was measured.
    """

    recipe: str
    bytes: int
    loss: float
    accuracy: float | None = None
    chosen: bool = False
    share: float = 1.0
    resident_bytes: int = 0
    fits: bool = True
    reason: str = ""
    drift: float | None = None


def front_of(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Of the recipes that were measured whole and keep the limits, those that no other one beats; smallest first."""
    return front([t for t in trials if t.fits and t.share == 1], lambda t: (t.bytes, t.loss))


@dataclass(frozen=True, slots=True)
class Sample:
    """One test task with the answers before and after."""

    task_id: str
    category: str
    prompt: str
    base_answer: str
    modifier_answer: str
    reference: str
    base_outcome: Outcome
    modifier_outcome: Outcome


@dataclass(frozen=True, slots=True)
class FailureRow:
    """How many of the test tasks that the compressed modifier failed are of one kind."""

    kind: str
    n: int


@dataclass(frozen=True, slots=True)
class CostRow:
    """One task that the base failed, and what its answers have cost.

    Attributes:
        tier: at which it came to rest; 0 if it is unsolved.
        paid_usd: of all requests about it.
        single_usd: what the last tier alone would have cost for it.
    """

    task_id: str
    tier: int
    paid_usd: float
    single_usd: float


@dataclass(frozen=True, slots=True)
class KindRow:
    """One kind of task that the base fails (a cluster of its failures).

    Attributes:
        label: its commonest category and most telling words.
        settled: tasks that came to rest at tier 1, 2, … with a verified answer.
        cost_usd: of all requests about tasks of this kind.
        single_usd: what the last tier alone would have cost for them.
        trained: examples of this kind in the training set.
    """

    number: int
    label: str
    failures: int
    settled: tuple[int, ...]
    unsolved: int
    cost_usd: float
    single_usd: float
    trained: int


@dataclass(frozen=True, slots=True)
class Shortcut:
    """What sending tasks past a tier has saved against the plain cascade, measured on the controls.

    Attributes:
        sent: tasks sent past the tier.
        controls: tasks that would have been, and were asked; `control_settled` of them the tier settled.
        saving_usd: estimated for the tasks sent: their number times the mean of the controls.
        low, high: with the 95 % Wilson interval of the share of controls that the tier settled.
    """

    tier: int
    sent: int
    controls: int
    control_settled: int
    saving_usd: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class KindSample:
    """A failed task of a kind with the base's answer and what repaired it.

    Attributes:
        tier: at which it came to rest; 0 if it is unsolved.
        answer: the verified answer, or the last one that was refused.
    """

    kind: int
    task_id: str
    prompt: str
    base_answer: str
    tier: int
    teacher: str
    answer: str


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """A published score beside ours.

    Attributes:
        score, ours: in percent.
        low, high: 95 % Wilson interval of `ours`, in percent.
        ratio: ours over theirs, which is taken for exact.
        n: our tasks.
    """

    benchmark: str
    model: str
    score: float
    source: str
    ours: float
    low: float
    high: float
    ratio: float
    n: int
    target_low: float
    target_high: float


@dataclass(frozen=True, slots=True)
class GeneralRow:
    """A benchmark of other things than the domain, with and without the compressed modifier.

    Attributes:
        benchmark: its name, or "all".
        before, after: accuracy of the base, and of base and modifier, asked alike.
        low, high: 95 % paired bootstrap interval of `after - before`.
        p: of McNemar's exact test.
    """

    benchmark: str
    n: int
    before: float
    after: float
    low: float
    high: float
    p: float


def general_rows(tasks: Sequence[Task], before: Sequence[Verdict], after: Sequence[Verdict]) -> list[GeneralRow]:
    """What a modifier changed elsewhere: all tasks together, then each benchmark.

    Raises:
        DataError: the verdicts are not on the same tasks, once each.
    """
    if not tasks:
        return []
    names = sorted({t.benchmark for t in tasks})
    groups = {"all": {t.id for t in tasks}, **{name: {t.id for t in tasks if t.benchmark == name} for name in names}}
    rows = []
    for name, ids in groups.items() if len(names) > 1 else [(names[0], groups["all"])]:
        both = {"base": [v for v in before if v.task_id in ids], "compressed": [v for v in after if v.task_id in ids]}
        first, second = aligned_passes(both).values()
        change, n = paired_bootstrap(first, second), len(first)
        means = sum(first) / n, sum(second) / n
        rows.append(GeneralRow(name, n, *means, change.low, change.high, mcnemar_exact(first, second)))
    return rows


@dataclass(frozen=True)
class ReportData:
    """All that one report shows.

    Attributes:
        tasks: the test tasks.
        verdicts: of "base", "modifier" and "compressed" on them.
        router: `cascade.routing.train.RouterReport.as_dict()`, or nothing.
        stages: what each stage of the chosen recipe saved and cost; layers: what is left of every layer.
        costs: of every task that the base failed; the saving's interval is drawn from them.
        general: what the modifier changed on other benchmarks, if it was measured.
        shortcuts: what sending tasks past a tier has saved, per tier.
        kinds: of the tasks that the base failed, the largest first; nothing if they were not clustered.
    """

    summary: Summary
    tasks: Sequence[Task]
    verdicts: Mapping[str, Sequence[Verdict]]
    tiers: Sequence[TierRow]
    costs: Sequence[CostRow] = ()
    curve: Sequence[CurvePoint] = ()
    trials: Sequence[TrialRow] = ()
    stages: Sequence[StageCost] = ()
    layers: Sequence[LayerShare] = ()
    router: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    failures: Sequence[FailureRow] = ()
    references: Sequence[ReferenceRow] = ()
    general: Sequence[GeneralRow] = ()
    kinds: Sequence[KindRow] = ()
    kind_samples: Sequence[KindSample] = ()
    shortcuts: Sequence[Shortcut] = ()

    def __post_init__(self) -> None:
        if set(self.verdicts) != set(MODELS):
            raise DataError(f"a report needs the verdicts of {', '.join(MODELS)}, got {', '.join(self.verdicts)}")


_ROWS: dict[str, type] = {
    "tasks": Task,
    "tiers": TierRow,
    "costs": CostRow,
    "curve": CurvePoint,
    "trials": TrialRow,
    "stages": StageCost,
    "layers": LayerShare,
    "samples": Sample,
    "failures": FailureRow,
    "references": ReferenceRow,
    "general": GeneralRow,
    "kinds": KindRow,
    "shortcuts": Shortcut,
    "kind_samples": KindSample,
}


def tables_folder(report: Path) -> Path:
    """Where the tables of a report lie: `report.html` -> `report.tables/`."""
    return report.with_name(f"{report.stem}.tables")


def save_tables(data: ReportData, report: Path) -> None:
    """Write every row that the report shows as Parquet beside it."""
    folder = tables_folder(report)
    folder.mkdir(parents=True, exist_ok=True)
    for name, record in _ROWS.items():
        pq.write_table(to_table(record, list(getattr(data, name))), folder / f"{name}.parquet")
    for model, verdicts in data.verdicts.items():
        pq.write_table(to_table(Verdict, list(verdicts)), folder / f"verdicts-{model}.parquet")
    (folder / "router.json").write_text(json.dumps(plain(data.router), indent=2) + "\n", encoding="utf-8")
    write_summary(data.summary, folder / "summary.json")


def load_tables(report: Path) -> ReportData:
    """What `save_tables` wrote.

    Raises:
        DataError: a table is missing or of another schema.
    """
    folder = tables_folder(report)
    try:
        rows: dict[str, Any] = {n: from_table(r, pq.read_table(folder / f"{n}.parquet")) for n, r in _ROWS.items()}
        verdicts = {m: from_table(Verdict, pq.read_table(folder / f"verdicts-{m}.parquet")) for m in MODELS}
        router = json.loads((folder / "router.json").read_text(encoding="utf-8"))
        return ReportData(summary=read_summary(folder / "summary.json"), verdicts=verdicts, router=router, **rows)
    except FileNotFoundError as error:
        raise DataError(f"the tables of {report.name} are not complete: {error}") from error


def plain(value: Any) -> Any:
    """Dataclasses inside a router report as plain dictionaries, so that JSON takes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
