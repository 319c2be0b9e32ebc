"""BIG-Bench Hard: 27 tasks that need several steps (Suzgun et al. 2022, arXiv 2210.09261).

Source: hub `SaylorTwift/bbh` (the accepted harness's copy), or a local folder with `<task>.json` as published or the
hub's files. Split rule: all 6,511 questions are test tasks. Shots: the 3 published chain-of-thought examples of each
task, taken from the pinned wheel `lm-eval==0.4.13` (MIT), so that prompts are the accepted harness's to the
character. Metric: exact match of what follows "the answer is", mean over all questions (so weighted by task size).

With the reading `harness` scores are the accepted harness's own: its regex takes what follows the first "the answer is"
up to the last character but one of the line, and that must equal the target to the letter. The reading `cascade` is
milder on purpose: a final full stop may be there or not, "(B). " is read as "(B)", case and quotes do not count, and
an answer may be put in other words. Everything the regex accepts is accepted; "not (B)" is no "(B)" in either.

Options:
    path: folder; left out, the hub.
    tasks: list of task names; left out, all
    form: completion | chat
    reading: cascade (default) | harness
    shots: 0 to 3; 0 needs no wheel, and in chat form asks the question alone: how to answer is the prompt's to say.
        (SmolLM2-135M-Instruct passed 51 of 220 so, and 31 when told to end with "So the answer is …", words that a
        modifier trained on other answers gave as they stand: 37 and 6.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import only_split, shuffled
from cascade.benchmarks.sources import HubSource, hub_rows, local_files, read_rows, require, wheel_folder
from cascade.config_sections import Section
from cascade.errors import ConfigError
from cascade.scoring.denials import without_denials
from cascade.scoring.extraction import NOTHING, Reading, marked_spans, read_choice, read_number, read_word
from cascade.tasks import Completion, Message, Split, Task, Verdict

REPO, REVISION = "SaylorTwift/bbh", "b5306be6f827cfafbb545ff5a51f96916029b0fd"
SHOTS_WHEEL = (
    "lm-eval",
    "0.4.13",
    "lm_eval/tasks/bbh/cot_fewshot/",
    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
)
TASKS = [
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
]
HARNESS = re.compile(r"(?<=the answer is )(.*)(?=.)")
"""The accepted harness's filter, to the letter (lm-eval 0.4.13, bbh/cot_fewshot)."""
STOP = ("</s>", "Q", "\n\n")
MAX_TOKENS = 1024


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    tasks: list[str] | None = None
    form: Literal["completion", "chat"] = "completion"
    reading: Literal["cascade", "harness"] = "cascade"
    shots: int = Field(3, ge=0, le=3)


class Bbh:
    """See the module's docstring."""

    name = "bbh"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The questions of the chosen tasks."""
        chosen = parse_options(Options, options, self.name)
        only_split(self.name, split, "test")
        unknown = set(chosen.tasks or ()) - set(TASKS)
        if unknown:
            raise ConfigError(f"bbh has no tasks {sorted(unknown)}; it has {', '.join(TASKS)}")
        tasks: list[Task] = []
        for name in chosen.tasks or TASKS:
            rows = _rows(chosen.path, name)
            require(rows, {"input", "target"}, f"bbh {name}")
            head = _head(name, chosen.shots)
            tasks += [_task(name, i, row, head, domain, chosen) for i, row in enumerate(rows)]
        return shuffled(tasks, seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """Exact match with the target, as text."""
        target: str = task.reference["target"]
        strict = task.reference.get("reading") == "harness"
        answer = read_as_harness(completion.text) if strict else None
        if not strict:
            answer = read_answer(completion.text, target, task.reference["input"])
        if answer is None:
            evidence = 'no answer after "the answer is"'
            return Verdict(task.id, completion.model, completion.modifier, "unparsed", "", evidence)
        passed = answer == target if strict else _normal(answer) == _normal(target)
        evidence = "" if passed else f"answered {answer!r}; expected {target!r}"
        return Verdict(task.id, completion.model, completion.modifier, "pass" if passed else "fail", answer, evidence)

    def reference_answer(self, task: Task) -> str:
        """The target in the form that the examples end with."""
        return f"So the answer is {task.reference['target']}."


def read_as_harness(text: str) -> str | None:
    """What lm-evaluation-harness's filter takes: the first match of its regex, blanks at the ends removed."""
    found = HARNESS.search(text)
    return found[0].strip() if found else None


def read_answer(text: str, target: str, question: str) -> str | None:
    """What an answer gives after its (first) "the answer is"; else a lone choice, number or word of the target's kind.

    Returns None if nothing, or nothing unambiguous, can be read.
    """
    stated = re.search(r"the answer is:?\s+(.*)", text, re.IGNORECASE)
    if stated and "the answer is" not in without_denials(text, r"\([A-R]\)").lower():
        stated = None  # "I do not think that the answer is (B)."
    if stated:
        line = re.sub(r"\*\*|[`$]", "", stated[1]).strip()
        named = without_denials(line, r"\([A-R]\)")
        letters = set(re.findall(r"\(([A-R])\)", named)) or set(re.findall(r"^([A-R])\)", named))
        reading = _choice_named(line, question)
        if re.fullmatch(r"\([A-R]\)", target) and len(letters) < 2 and not reading.ambiguous:
            label = letters.pop() if letters else reading.answer
            if label:
                return f"({label})"
        return line.rstrip().removesuffix(".").strip() or None
    if re.fullmatch(r"\([A-R]\)", target):
        label = _choice_named(text, question).answer
        return f"({label})" if label else None
    if re.fullmatch(r"-?\d+", target):
        return read_number(text).answer
    for words in (("yes", "no"), ("true", "false"), ("valid", "invalid")):
        if target.lower() in words:
            return read_word(text, words).answer
    spans = next((spans for _, spans in marked_spans(text)), [])
    return spans[-1] if spans else (text.strip() if "\n" not in text.strip() else None) or None


def _choice_named(text: str, question: str) -> Reading:
    """The letter of the one option of a question that a text names, by letter or in full."""
    options = dict(re.findall(r"^\(([A-R])\) (.*)$", question, re.MULTILINE))
    return read_choice(text, options) if options else NOTHING


def _normal(answer: str) -> str:
    return " ".join(answer.strip().strip("\"'").removesuffix(".").lower().split())


def _task(name: str, number: int, row: Mapping[str, Any], head: str, domain: str, options: Options) -> Task:
    form = options.form
    prompt = f"{head}Q: {row['input']}\nA: Let's think step by step.\n"
    if form == "chat":
        prompt = prompt.rstrip() if head else row["input"]
    return Task(
        id=f"bbh/{name}/{number}",
        benchmark="bbh",
        domain=domain,
        split="test",
        messages=(Message("user", prompt),),
        reference={"target": row["target"], "input": row["input"], "reading": options.reading},
        category=name,
        form=form,
        stop=STOP if form == "completion" else (),
        max_tokens=MAX_TOKENS,
    )


def _rows(path: str | None, name: str) -> list[dict[str, Any]]:
    if path is None:
        return hub_rows(HubSource(REPO, REVISION, {"test": f"{name}/"}), "test")
    files = [f for f in local_files(path) if f.name.split(".")[0] == name or f.parent.name == name]
    return [row for f in files for row in _examples(f)]


def _examples(file: Path) -> list[dict[str, Any]]:
    return read_rows(file)


@cache
def _head(name: str, shots: int) -> str:
    """Description and worked examples, as the accepted harness joins them."""
    if shots == 0:
        return ""
    folder = wheel_folder(*SHOTS_WHEEL)
    content = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    samples = content["fewshot_config"]["samples"][:shots]
    shown = [f"Q: {s['input']}\nA: Let's think step by step.\n{s['target']}\n\n" for s in samples]
    return str(content["description"]) + "".join(shown)


BENCHMARK = Bbh()
