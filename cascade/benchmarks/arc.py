"""ARC: grade-school science questions (Clark et al. 2018, arXiv 1803.05457), Challenge and Easy sets.

Source: hub `allenai/ai2_arc` (CC-BY-SA-4.0), or local files in the hub's schema or the original JSON lines
(`ARC-Challenge-Test.jsonl`). Split rule: the published one. Shots: 0. Metric: accuracy of the likeliest answer text,
plain (`acc`) or per character (`acc_norm`); or of the letter that a chat model names.

Options:
    path: folder or file; left out, the hub.
    set: ARC-Challenge | ARC-Easy
    form: likelihood | chat
    normalise: divide log-likelihoods by the answer's characters (acc_norm); default true
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cascade.benchmarks.choices import judge_choice
from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import shuffled
from cascade.benchmarks.sources import HubSource, hub_rows, local_files, name_parts, read_rows, require
from cascade.config_sections import Section
from cascade.errors import DataError
from cascade.tasks import Completion, Message, Split, Task, Verdict

REPO, REVISION = "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453"


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    set_: Literal["ARC-Challenge", "ARC-Easy"] = Field("ARC-Challenge", alias="set")
    form: Literal["likelihood", "chat"] = "likelihood"
    normalise: bool = True


class Arc:
    """See the module's docstring."""

    name = "arc"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The questions of one set and split."""
        chosen = parse_options(Options, options, self.name)
        rows = _rows(chosen, split)
        return shuffled([_task(row, split, domain, chosen) for row in rows], seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """By likelihood, or by the letter named."""
        return judge_choice(task, completion, per_character=bool(task.reference["normalise"]))

    def reference_answer(self, task: Task) -> str:
        """The answer's text, or in chat form its letter."""
        field = "labels" if task.form == "chat" else "texts"
        answer: str = task.reference[field][task.reference["answer"]]
        return answer


def _rows(options: Options, split: Split) -> list[dict[str, Any]]:
    if options.path is None:
        prefixes: dict[str, str] = {split: f"{options.set_}/{split}"}
        return _checked(hub_rows(HubSource(REPO, REVISION, prefixes), split), f"{options.set_} ({split})")
    wanted = {"train": {"train"}, "validation": {"validation", "dev"}, "test": {"test"}}[split]
    other = "easy" if options.set_ == "ARC-Challenge" else "challenge"
    root = Path(options.path).expanduser()
    # CSV is published beside the JSON lines, with the choices in the question.
    given = [f for f in local_files(options.path) if f.suffix != ".csv"]
    files = [f for f in given if wanted & set(name_parts(f)) and other not in _below(f, root)]
    if not files:
        raise DataError(f"{options.path} has no {split} file of {options.set_} (e.g. {options.set_}-Test.jsonl)")
    return [row for f in files for row in _checked(read_rows(f), str(f))]


def _below(file: Path, root: Path) -> set[str]:
    """The words of the names from what the user named down to a file; where that lies says nothing."""
    folders = [f for f in file.parents if f == root or root in f.parents]
    return {part for name in (file, *folders) for part in name_parts(name)}


def _checked(rows: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Rows in the hub's schema.

    Raises:
        DataError: a row breaks the schema.
    """
    checked = [_from_original(row) for row in rows]
    require(checked, {"id", "question", "choices", "answerKey"}, where)
    for number, row in enumerate(checked, 1):
        choices = row["choices"]
        labels, texts = (choices.get("label"), choices.get("text")) if isinstance(choices, dict) else (None, None)
        columns = [
            c for c in (labels, texts) if isinstance(c, list) and len(c) > 1 and all(isinstance(t, str) for t in c)
        ]
        this = f"{where}, row {number} ({row['id']})"
        if len(columns) < 2 or len(columns[0]) != len(columns[1]) or len(set(columns[0])) < len(columns[0]):
            raise DataError(
                f'{this}: give each choice a text and a label of its own, as {{"text": "ant", "label": "A"}}'
            )
        if not isinstance(row["question"], str):
            raise DataError(f"{this}: question must be a text, or hold stem and choices")
        if row["answerKey"] not in columns[0]:
            raise DataError(f"{this}: answerKey {row['answerKey']!r} must be one of the labels {labels}")
    return checked


def _from_original(row: dict[str, Any]) -> dict[str, Any]:
    """The hub's schema from the original one, where the question holds stem and choices."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    choices = [c if isinstance(c, dict) else {} for c in question.get("choices") or ()]
    columns = {name: [c.get(name) for c in choices] for name in ("text", "label")}
    return {**row, "question": question.get("stem"), "choices": columns}


def _task(row: dict[str, Any], split: Split, domain: str, options: Options) -> Task:
    labels, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
    stem = f"Question: {row['question']}\n"
    lettered = "\n".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))
    chat = options.form == "chat"
    prompt = f"{stem}{lettered}\nAnswer with the letter of the right choice." if chat else f"{stem}Answer:"
    reference = {"answer": labels.index(row["answerKey"]), "labels": labels, "texts": texts}
    return Task(
        id=f"arc/{options.set_}/{row['id']}",
        benchmark="arc",
        domain=domain,
        split=split,
        messages=(Message("user", prompt),),
        reference={**reference, "normalise": options.normalise},
        category=options.set_,
        difficulty=2 if options.set_ == "ARC-Challenge" else 1,
        form="chat" if chat else "likelihood",
        choices=() if chat else tuple(f" {text}" for text in texts),
        max_tokens=64 if chat else 1,
    )


BENCHMARK = Arc()
