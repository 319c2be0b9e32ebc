"""MMLU: 57 subjects of multiple-choice questions (Hendrycks et al. 2021, arXiv 2009.03300).

Source: hub `cais/mmlu` (MIT), or a local folder in the hub's schema (question, subject, choices, answer) or the
original one (CSV files `<subject>_test.csv`, with or without a header). Split rule: the 14,042 test questions are
test tasks, the hub's validation questions validation tasks; there is no training split. Shots: 5 from the subject's
dev questions (0 to 5 by option). Metric: accuracy of the likeliest letter (`letter`, the convention), of the
likeliest answer text (`cloze`, which ranks small models), or of the letter that a chat model names (`chat`).

Options:
    path: folder with dev and test files; left out, the hub.
    form: letter | cloze | chat
    shots: 0 to 5, left out: 5 for letter, 0 for cloze and chat
    subjects: list of subjects; left out, all 57
    normalise: cloze alone: divide log-likelihoods by the answer's characters (acc_norm)
    topic: cloze alone: begin with "The following are questions about <subject>.", as the SmolLM2 models' published
        cloze figures do (with normalise, 0 shots); default false
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cascade.benchmarks.choices import judge_choice
from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import only_split, shuffled
from cascade.benchmarks.sources import HubSource, hub_rows, local_files, read_rows, require
from cascade.config_sections import Section
from cascade.errors import ConfigError, DataError
from cascade.tasks import Completion, Message, Split, Task, Verdict

HUB = HubSource(
    "cais/mmlu",
    "c30699e8356da336a370243923dbaf21066bb9fe",
    {"test": "all/test", "validation": "all/validation", "dev": "all/dev"},
)
LABELS = ["A", "B", "C", "D"]
_ANSWERS = {name: index for index, label in enumerate(LABELS) for name in (label, str(index))}
"""How files write the answer -> its index."""
Row = dict[str, Any]


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    form: Literal["letter", "cloze", "chat"] = "letter"
    shots: int | None = Field(None, ge=0, le=5)
    subjects: list[str] | None = None
    normalise: bool = False
    topic: bool = False


class Mmlu:
    """See the module's docstring."""

    name = "mmlu"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The questions of the chosen subjects; with a count, that many over all of them in seeded order."""
        chosen = parse_options(Options, options, self.name)
        only_split(self.name, split, "test", "validation")
        shots = chosen.shots if chosen.shots is not None else (5 if chosen.form == "letter" else 0)
        rows = _rows(chosen.path, split)
        wanted = set(chosen.subjects or ())
        unknown = wanted - {row["subject"] for row in rows}
        if unknown:
            raise ConfigError(f"mmlu has no subjects {sorted(unknown)}; it has {sorted({r['subject'] for r in rows})}")
        examples: dict[str, list[Row]] = defaultdict(list)
        for row in _rows(chosen.path, "dev") if shots else ():
            examples[row["subject"]].append(row)
        numbers: dict[str, int] = defaultdict(int)
        tasks = []
        for row in rows:
            number = numbers[row["subject"]]
            numbers[row["subject"]] += 1
            if not wanted or row["subject"] in wanted:
                tasks.append(_task(row, number, split, domain, chosen, examples[row["subject"]][:shots]))
        return shuffled(tasks, seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """By likelihood, or by the letter named."""
        return judge_choice(task, completion, per_character=bool(task.reference["normalise"]))

    def reference_answer(self, task: Task) -> str:
        """The letter, or in cloze form the answer's text."""
        index: int = task.reference["answer"]
        texts: list[str] = task.reference["texts"]
        return texts[index] if task.choices and task.choices[0] != " A" else LABELS[index]


def _question(row: Row, form: str) -> str:
    if form == "cloze":
        return f"Question: {row['question'].strip()}\nAnswer:"
    lines = [f"{label}. {choice}" for label, choice in zip(LABELS, row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _task(row: Row, number: int, split: Split, domain: str, options: Options, examples: list[Row]) -> Task:
    form, subject = options.form, row["subject"]
    choices = tuple(f" {c}" for c in (row["choices"] if form == "cloze" else LABELS))
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    shown = [
        f"{_question(e, form)} {e['choices'][e['answer']] if form == 'cloze' else LABELS[e['answer']]}\n\n"
        for e in examples
    ]
    if form == "cloze":
        head = f"The following are questions about {subject.replace('_', ' ')}.\n" if options.topic else ""
    prompt = head + "".join(shown) + _question(row, form)
    return Task(
        id=f"mmlu/{split}/{subject}/{number}",
        benchmark="mmlu",
        domain=domain,
        split=split,
        messages=(Message("user", prompt),),
        reference={"answer": row["answer"], "labels": LABELS, "texts": row["choices"], "normalise": options.normalise},
        category=subject,
        form="chat" if form == "chat" else "likelihood",
        choices=() if form == "chat" else choices,
        max_tokens=64 if form == "chat" else 1,
    )


def _rows(path: str | None, split: str) -> list[Row]:
    """Rows with subject, question, choices (4 texts) and answer (index), in the order of the files."""
    if path is None:
        return _checked(hub_rows(HUB, split), f"mmlu ({split})")
    files = [f for f in local_files(path) if _split_of(f) == split]
    if not files:
        raise DataError(f"{path} has no {split} files (<subject>_{split}.csv or {split}-*.parquet)")
    files = [f for f in files if f.parent.name == "all"] or files  # the hub has every subject beside all of them
    return [row for f in files for row in (_original_rows(f) if f.suffix == ".csv" else _checked(read_rows(f), str(f)))]


def _checked(rows: list[Row], where: str) -> list[Row]:
    """Rows of the hub's schema, the answer as an index.

    Raises:
        DataError: a row breaks the schema.
    """
    require(rows, {"question", "choices", "answer", "subject"}, where)
    checked = []
    for number, row in enumerate(rows, 1):
        answer, choices = row["answer"], row["choices"]
        texts = isinstance(choices, list) and len(choices) == len(LABELS) and all(isinstance(c, str) for c in choices)
        if not texts or not isinstance(row["question"], str) or not isinstance(row["subject"], str):
            raise DataError(f"{where}, row {number} must hold question and subject as texts and choices as four texts")
        if isinstance(answer, bool) or str(answer).strip() not in _ANSWERS:
            raise DataError(f"{where}, row {number}: the answer {answer!r} must be an index 0-3 or a letter A-D")
        checked.append({**row, "answer": _ANSWERS[str(answer).strip()]})
    return checked


def _split_of(file: Path) -> str:
    stem = file.name.split(".")[0]
    part = stem.rsplit("_", 1)[-1] if file.suffix == ".csv" else stem.split("-")[0]
    return {"val": "validation"}.get(part, part)


def _original_rows(file: Path) -> list[Row]:
    """The original CSV: question, four choices and the answer as a letter, or as an index under a header."""
    with file.open(encoding="utf-8", newline="") as f:
        lines = list(csv.reader(f))
    if lines and lines[0][:2] == ["question", "choice0"]:
        lines = lines[1:]
    subject = file.stem.rsplit("_", 1)[0]
    rows = []
    for number, line in enumerate(lines, 1):
        if len(line) != 6 or line[5].strip() not in _ANSWERS:
            raise DataError(f"{file}, row {number} must hold a question, four choices and an answer A-D or 0-3")
        index = _ANSWERS[line[5].strip()]
        rows.append({"subject": subject, "question": line[0], "choices": line[1:5], "answer": index})
    return rows


BENCHMARK = Mmlu()
