"""reasoning-gym: procedural tasks of logic, arithmetic and text, each with a scorer of its own.

Source: package `reasoning-gym` 0.1.25 (Apache-2.0, arXiv 2505.24760). Split rule: the hash of a prompt decides which
split it may appear in, so that no prompt is ever in two splits, whatever the seeds and counts; seeds of the splits
are disjoint besides. Shots: none. Metric: reasoning-gym's own `score_answer` on the leniently read answer; only the
full score of 1.0 passes.

Options:
    generators:
      - name: aiw              # as reasoning-gym calls it
        weight: 1              # share among the generators
        difficulty: 1          # label that tasks carry; several levels are several entries
        options: {max_entities: 4}
        max_tokens: 48         # of an answer; left out, derived from the length of the right answer
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

import cascade
from cascade.benchmarks.normalise import text_hash
from cascade.benchmarks.options import parse_options
from cascade.benchmarks.procedural import unpack
from cascade.config_sections import Section
from cascade.errors import ConfigError, DataError
from cascade.scoring.extraction import NUMBER, Reading, read_list, read_number, read_text, read_word
from cascade.tasks import Completion, Message, Outcome, Split, Task, Verdict

SECONDS_AT_LEAST, SECONDS_PER_TASK = 120.0, 0.25
_EVALUATES_ANSWERS = frozenset(
    {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"}
    | {"simple_integration", "spiral_matrix", "string_insertion"}
)
"""Their scorers run the model's answer through Python's eval (sympy's parse_expr does so too)."""
_WITHOUT_ANSWERS = frozenset({"boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"})
"""Their entries come without a right answer (or, composite, without a scorer that stands alone)."""
_RELATIONS = (
    "mother father sister brother daughter son wife husband grandmother grandfather granddaughter grandson aunt "
)
_RELATIONS += "uncle niece nephew cousin mother-in-law father-in-law daughter-in-law son-in-law sister-in-law "
_RELATIONS += "brother-in-law grandchild parent child sibling spouse"
_VOCABULARIES: dict[str, tuple[str, ...]] = {"family_relationships": tuple(_RELATIONS.split())}
_YES_NO, _TRUE_FALSE = ("yes", "no"), ("true", "false")
_ONE_ANSWER = frozenset({"letter_jumble"})
"""Texts of which there is only one right one, though the scorer takes more."""
_FRACTIONS = frozenset({"coin_flip"})
"""Numbers that are as well given as a fraction."""
_FRACTION = re.compile(
    r"(?:\\[dt]?frac\{(?=\d+\}\{\d+\}))?(?<![\d./])(?P<above>\d+)(?:\}\{|\s*/\s*)(?P<below>\d+)\}?(?![\d./]*\d)"
)
_ROUNDED = 1e-3
"""Share of a number by which an answer that the package takes may be off: it may be rounded."""
_CASE_SENSITIVE = frozenset({"emoji_mystery", "letter_jumble", "word_sorting", "string_manipulation", "cryptarithm"})


class Generator(Section):
    """One generator at one difficulty."""

    name: str
    weight: float = Field(1.0, gt=0)
    difficulty: int = Field(1, ge=1)
    options: dict[str, Any] = Field({}, description="fields of the generator's own config class")
    max_tokens: int | None = Field(None, gt=0)

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        from reasoning_gym.factory import DATASETS

        if name in _EVALUATES_ANSWERS:
            raise ValueError(f"{name} is not offered: its scorer would evaluate the model's answer as Python code")
        if name in _WITHOUT_ANSWERS:
            raise ValueError(f"{name} is not offered: its entries have no reference answer")
        if name not in DATASETS:
            usable = sorted(set(DATASETS) - _EVALUATES_ANSWERS - _WITHOUT_ANSWERS)
            raise ValueError(f"there is no generator {name!r}; there are {', '.join(usable)}")
        return name


class Options(Section):
    """What the config says under `options`."""

    generators: list[Generator] = Field(min_length=1)


class ReasoningGym:
    """See the module's docstring."""

    name = "reasoning_gym"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """Up to `count` tasks; fewer if the generators have no more different prompts.

        Raises:
            ConfigError: an option is wrong, or no count is given (there is no "all" of what is generated).
        """
        generators = parse_options(Options, options, self.name).generators
        if count is None:
            raise ConfigError("reasoning_gym makes tasks to order: set tasks.<split>.count in the config")
        rows = _draw(split, generators, seed, count)
        return [_task(generators[row["generator"]], row["entry"], split, domain) for row in rows]

    def score(self, task: Task, completion: Completion) -> Verdict:
        """The package's own verdict on the answer read out of the completion."""
        expected: str = task.reference["entry"]["answer"]
        reading = _read(task.category, expected, completion.text)
        outcome, evidence = self._judge(task, expected, reading)
        return Verdict(task.id, completion.model, completion.modifier, outcome, reading.answer or "", evidence)

    def _judge(self, task: Task, expected: str, reading: Reading) -> tuple[Outcome, str]:
        if reading.ambiguous:
            return "fail", f"several different answers, none marked as final: {', '.join(reading.candidates[:6])}"
        if reading.answer is None:
            return "unparsed", f"no answer of the form of {_form(task.category, expected)} found"
        entry = unpack(task.reference["entry"]) | {"question": task.prompt}
        answer = expected if _same(task.category, reading.answer, expected) else reading.answer
        dataset = _dataset(task.category, task.reference["options"])
        try:
            reward = float(dataset.score_answer(answer, entry))
        except Exception as error:  # a scorer of the package that cannot digest a text has not accepted it
            return "fail", f"the scorer of {task.category} could not read {answer!r}: {type(error).__name__}"
        if reward >= 1.0 and _is_sound(task.category, answer, expected):
            return "pass", ""
        return "fail", f"answered {reading.answer!r}; expected {expected!r}"

    def reference_answer(self, task: Task) -> str:
        """The entry's own answer."""
        answer: str = task.reference["entry"]["answer"]
        return answer


def _task(generator: Generator, entry: dict[str, Any], split: Split, domain: str) -> Task:
    question = entry.pop("question")
    options = json.dumps(generator.options, sort_keys=True)
    return Task(
        id=f"reasoning_gym/{generator.name}/{text_hash(question)}",
        benchmark="reasoning_gym",
        domain=domain,
        split=split,
        messages=(Message("user", question.strip()),),
        reference={"options": options, "entry": entry},
        difficulty=generator.difficulty,
        category=generator.name,
        max_tokens=generator.max_tokens or _answer_tokens(entry["answer"]),
    )


def _answer_tokens(answer: str) -> int:
    """Room for the answer and a sentence around it: a token is at least one character, about four in words."""
    letters = sum(c.isalpha() for c in answer)
    return min(1024, 24 + (len(answer) // 2 if letters > len(answer) / 2 else len(answer)))


def _draw(split: Split, generators: list[Generator], seed: int, count: int) -> list[dict[str, Any]]:
    """Entries from the child process (see `cascade.benchmarks.procedural`)."""
    request: dict[str, Any] = {"seed": seed, "split": split, "count": count}
    request["generators"] = [g.model_dump(mode="json", include={"name", "weight", "options"}) for g in generators]
    root = str(Path(cascade.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    limit = SECONDS_AT_LEAST + SECONDS_PER_TASK * count
    command = [sys.executable, "-m", "cascade.benchmarks.procedural"]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": path}
    names = ", ".join(dict.fromkeys(g.name for g in generators))
    try:
        with tempfile.TemporaryDirectory(prefix="cascade-generate-") as folder:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=limit,
                env=environment,
                cwd=folder,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"drawing {count} tasks took over {limit:.0f} s; drop the slow one of the generators {names}"
        ) from None
    if done.returncode != 0:
        raise DataError(f"drawing tasks from the generators {names} failed:\n{done.stderr.strip()[-1500:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if rows and "error" in rows[0]:
        raise ConfigError(f"a generator of reasoning_gym refuses its options: {rows[0]['error']}")
    return rows


_importing = threading.Lock()


@lru_cache(maxsize=256)
def _dataset(name: str, options: str) -> Any:
    """A dataset object for scoring alone."""
    # Answers are scored in threads, and a thread that meets a half-imported package finds generators missing.
    with _importing:
        from reasoning_gym import create_dataset

    return create_dataset(name, seed=0, size=1, **json.loads(options))


# ------------------------------------------------------------------------------------------------- reading answers

_WORD_LIST = re.compile(r"[^\s,\[\]{}()]+(?:, [^\s,\[\]{}()]+)+")


def _form(category: str, expected: str) -> str:
    """The kind of answer, told from the right one."""
    if NUMBER.fullmatch(expected):
        return "a number"
    if expected.lower() in _YES_NO:
        return "yes or no"
    if expected.lower() in _TRUE_FALSE:
        return "true or false"
    if category in _VOCABULARIES:
        return "one known word"
    return "a list of words" if _WORD_LIST.fullmatch(expected) else "a short text"


def _read(category: str, expected: str, text: str) -> Reading:
    bare = text.strip().rstrip(".")
    if _same(category, bare, expected):
        return Reading(bare, "whole text", (bare,))
    readers: dict[str, Callable[[], Reading]] = {
        "a number": lambda: read_number(_FRACTION.sub(_as_decimal, text) if category in _FRACTIONS else text),
        "yes or no": lambda: read_word(text, _YES_NO),
        "true or false": lambda: read_word(text, _TRUE_FALSE),
        "one known word": lambda: read_word(text, (*_VOCABULARIES[category], expected)),
        "a list of words": lambda: read_list(text, expected.count(", ") + 1),
        "a short text": lambda: read_text(text, lambda span: _same(category, span, expected)),
    }
    return readers[_form(category, expected)]()


def _same(category: str, answer: str, expected: str) -> bool:
    """Equal as numbers, or as words whatever their case."""
    if NUMBER.fullmatch(expected) and NUMBER.fullmatch(answer):
        return float(answer.replace(",", "")) == float(expected.replace(",", "")) and len(answer) < 16
    if category in _CASE_SENSITIVE:
        return answer == expected
    return " ".join(answer.casefold().split()) == " ".join(expected.casefold().split())


def _is_sound(category: str, answer: str, expected: str) -> bool:
    """Whether an answer that the package takes for right can be: some of its scorers take more than that.

    Any prefix of a probability, a number without its sign, True for False, words behind the right ones. What is no
    number and no yes or no is left to them, for many tasks have several right answers.
    """
    form = _form(category, expected)
    if form == "a number" and NUMBER.fullmatch(answer):
        value, right = float(answer.replace(",", "")), float(expected.replace(",", ""))
        return abs(value - right) <= _ROUNDED * abs(right) + 1e-9
    exact = form in ("yes or no", "true or false") or category in _ONE_ANSWER
    return not exact or " ".join(answer.casefold().split()) == " ".join(expected.casefold().split())


def _as_decimal(fraction: re.Match[str]) -> str:
    below = int(fraction["below"])
    return f"{int(fraction['above']) / below:.10g}" if below else fraction[0]


BENCHMARK = ReasoningGym()
