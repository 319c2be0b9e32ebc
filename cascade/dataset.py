"""The verified examples as a data set for others: Parquet, and a folder that Hugging Face `datasets` loads.

    <folder>/README.md                                  the card, with YAML in front
    <folder>/data/train-00000-of-00001.parquet          one row per example

`datasets.load_dataset("<folder>")` reads it as it is; the package itself is not needed to write it. What the card says
is counted from the rows, and `check_dataset` counts it again, with every answer scored anew.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cascade import benchmarks
from cascade.errors import DataError
from cascade.store import Store
from cascade.tasks import Completion, Example, Form, Json, Message, Task, from_table, to_table

PARQUET = "data/train-00000-of-00001.parquet"
CARD = "README.md"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One example with all that it takes to check it.

    Attributes:
        messages: the whole conversation, the verified answer last.
        answer_from: index of the first message of the answer.
        kind: number of the kind of task that the base failed, -1 if it is in none.
        tier: 1, 2 or 3; 0 for a replayed answer of the student itself.
        answer_key: whether the teacher only replays known answers.
        verdict: "pass", of the task's own scorer or of a judge.
        verified_by: "scorer" (the benchmark's own, exact) or "judge" (a model's opinion).
        judge: the judge's model, "" for the scorer.
        cost_usd: of all requests that this tier needed for the task.
        prompt_hash: SHA-256 of the messages that the teacher was sent.
        reference: what the scorer compares with, as JSON.
        form: how the task is put to a model.
    """

    task_id: str
    benchmark: str
    domain: str
    category: str
    difficulty: int
    messages: tuple[Message, ...]
    answer_from: int
    kind: int
    kind_label: str
    teacher: str
    tier: int
    answer_key: bool
    verdict: str
    verified_by: str
    judge: str
    repairs: int
    cost_usd: float
    prompt_hash: str
    reference: Json
    form: Form


@dataclass(frozen=True)
class Provenance:
    """What the card says beyond what can be counted in the rows.

    Attributes:
        teachers: one mapping per tier: name, model prices, endpoints, where the prices are from, answer_key.
        protected: test tasks that no example overlaps: what they are of -> how many.
        not_protected: benchmark -> why its test tasks were not compared.
        left_out: reason -> examples left out of the set for it.
        runs: job -> name of its run.
        cascade: failures, cost, the single teacher's cost, saving, tier shares.
        licence: of the whole, as the user has to judge it.
    """

    domain: str
    base: str
    teachers: Sequence[Mapping[str, Any]]
    statement: str
    protected: Mapping[str, int]
    not_protected: Mapping[str, str]
    left_out: Mapping[str, int]
    runs: Mapping[str, str]
    cascade: Mapping[str, float]
    licence: str = "other"


def dataset_rows(
    examples: Sequence[Example],
    tasks: Mapping[str, Task],
    kinds: Mapping[str, int],
    labels: Sequence[str],
    answer_keys: frozenset[str],
) -> list[DatasetRow]:
    """Examples with their tasks' references and kinds.

    Args:
        tasks: training tasks by id.
        kinds: task id -> kind, an index into `labels`.
        answer_keys: names of the teachers that only replay known answers.
    """
    return [
        DatasetRow(
            task_id=e.task_id,
            benchmark=e.benchmark,
            domain=e.domain,
            category=e.category,
            difficulty=e.difficulty,
            messages=e.messages,
            answer_from=len(tasks[e.task_id].messages),
            kind=(kind := kinds.get(e.task_id, -1)),
            kind_label=labels[kind] if kind >= 0 else "",
            teacher=e.teacher,
            tier=e.tier,
            answer_key=e.teacher in answer_keys,
            verdict="pass",
            verified_by="judge" if e.judge else "scorer",
            judge=e.judge,
            repairs=e.repairs,
            cost_usd=e.cost_usd,
            prompt_hash=e.prompt_hash,
            reference=tasks[e.task_id].reference,
            form=tasks[e.task_id].form,
        )
        for e in examples
    ]


def write_dataset(store: Store, folder: str, rows: Sequence[DatasetRow], about: Provenance) -> None:
    """Write the Parquet file and the card into a folder of the store.

    Raises:
        DataError: there is no example.
    """
    if not rows:
        raise DataError("there is no verified example to export: run the pipeline up to train_modifier first")
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(DatasetRow, rows), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    store.write_bytes(f"{folder}/{PARQUET}", data)
    store.write_bytes(f"{folder}/{CARD}", card(rows, about, hashlib.sha256(data).hexdigest()).encode())


def counts(rows: Sequence[DatasetRow]) -> dict[str, dict[str, int]]:
    """What the card tabulates: heading -> value -> number of rows."""
    keys = {
        "tier": lambda r: str(r.tier),
        "teacher": lambda r: r.teacher,
        "verified_by": lambda r: f"judge {r.judge}" if r.judge else "scorer",
        "benchmark": lambda r: r.benchmark,
        "kind": lambda r: r.kind_label or "(none)",
        "repairs": lambda r: str(r.repairs),
    }
    return {name: dict(sorted(Counter(map(key, rows)).items())) for name, key in keys.items()}


def card(rows: Sequence[DatasetRow], about: Provenance, sha256: str) -> str:
    """The card: YAML that the hub and `datasets` read, then what a sceptic would ask."""
    front = {
        "license": about.licence,
        "language": ["en"],
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in _SIZES if len(rows) < limit), "n>1M")],
        "tags": ["cascade", "verified", *(["answer-key"] if any(r.answer_key for r in rows) else [])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": PARQUET}]}],
        "cascade": {"rows": len(rows), "sha256": sha256, "counts": counts(rows)},
    }
    environment = Environment(
        loader=PackageLoader("cascade.reports"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    body = environment.get_template("dataset_card.md").render(
        about=about,
        rows=len(rows),
        tasks=len({r.task_id for r in rows}),
        counts=counts(rows),
        judged=sum(r.verified_by == "judge" for r in rows),
        replayed=sum(r.tier == 0 for r in rows),
        cost=sum(r.cost_usd for r in rows),
        sha256=sha256,
        parquet=PARQUET,
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


@dataclass(frozen=True)
class DatasetCheck:
    """What checking a data set found.

    Attributes:
        rescored: answers that were scored anew.
        opinions: rows that a judge accepted; nothing can be scored anew there.
        conversations: rows of several turns, whose tools would have to be run again; not scored anew.
        problems: in words; none if all is as the card says.
    """

    rows: int
    rescored: int = 0
    opinions: int = 0
    conversations: int = 0
    problems: list[str] = field(default_factory=list)


def check_dataset(folder: str | Path) -> DatasetCheck:
    """Compare the rows with the card, and score every answer anew with its benchmark's scorer.

    Raises:
        DataError: the folder holds no such data set.
    """
    root = Path(folder)
    try:
        front = yaml.safe_load((root / CARD).read_text(encoding="utf-8").split("---\n")[1])["cascade"]
        data = (root / PARQUET).read_bytes()
        rows = from_table(DatasetRow, pq.read_table(pa.BufferReader(data)))
        sha256, count, counted = front["sha256"], front["rows"], front["counts"]
    except (OSError, KeyError, IndexError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder} holds no data set that `cascade export-dataset` wrote: {error}") from error
    problems = []
    if hashlib.sha256(data).hexdigest() != sha256:
        problems.append("the Parquet file is not the one that the card was written for (SHA-256)")
    if count != len(rows) or counted != json.loads(json.dumps(counts(rows))):
        problems.append("the card's counts are not those of the rows")
    seen = Counter(json.dumps([m.as_dict() for m in r.messages]) for r in rows)
    problems += [f"{n} rows hold the same conversation" for n in [sum(c - 1 for c in seen.values())] if n]
    exact = [r for r in rows if r.verified_by == "scorer"]
    single = [r for r in exact if len(r.messages) == r.answer_from + 1]
    problems += [p for row in single if (p := _score_again(row))]
    return DatasetCheck(len(rows), len(single), len(rows) - len(exact), len(exact) - len(single), problems)


def _score_again(row: DatasetRow) -> str:
    """Why an answer does not pass its scorer, "" if it does."""
    task = Task(
        id=row.task_id,
        benchmark=row.benchmark,
        domain=row.domain,
        split="train",
        messages=row.messages[: row.answer_from],
        reference=row.reference,
        difficulty=row.difficulty,
        category=row.category,
        form=row.form,
    )
    text = row.messages[row.answer_from].content
    verdict = benchmarks.score(task, Completion(row.task_id, row.teacher, "", text))
    return "" if verdict.passed else f"{row.task_id}: {verdict.outcome}: {verdict.evidence[:200]}"
