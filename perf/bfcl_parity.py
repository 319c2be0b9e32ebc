"""Requests for the oracle: reference answers of BFCL and mutations of them, with our own verdicts on each."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade import benchmarks
from cascade.benchmarks.bfcl import CATEGORIES
from cascade.benchmarks.bfcl_multi_turn import CATEGORY, END_OF_TURN
from cascade.tasks import Completion, Message, Task

ORACLE = Path(__file__).parent / "bfcl_oracle.py"
PACKAGES = (
    "tree_sitter==0.21.3",
    "tree-sitter-java==0.21.0",
    "tree-sitter-javascript==0.21.4",
    "mpmath==1.3.0",
    "tenacity==9.1.2",
    "overrides==7.7.0",
    "filelock==3.20.0",
    "python-dotenv==1.1.1",
)
BARE = ("bfcl-eval==2026.3.23",)


@dataclass(frozen=True)
class Compared:
    """What ours and the oracle said.

    Attributes:
        passed: how many ours lets pass.
        crashed: requests on which the oracle's own code raises.
        differing: requests with two verdicts, as far as the oracle has one.
    """

    n: int
    passed: int
    crashed: int
    differing: list[dict[str, Any]]


def load(category: str) -> list[Task]:
    """A whole category as the leaderboard has it."""
    options = {"split_rule": "none", "categories": [category]}
    return benchmarks.get("bfcl").load("test", domain="parity", options=options, seed=0, count=None)


def ask(python: Path, requests: Sequence[dict[str, Any]]) -> list[Any]:
    """The oracle's answers, in order."""
    text = "\n".join(json.dumps(r) for r in requests)
    done = subprocess.run([str(python), str(ORACLE)], input=text, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) != len(requests):
        raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests: {done.stderr[-500:]}")
    return answers


def compare(python: Path, requests: Sequence[dict[str, Any]], ours: Sequence[bool]) -> Compared:
    """Count where the verdicts part. Where the oracle crashes, it has none."""
    theirs = ask(python, requests)
    crashed = [isinstance(t, str) for t in theirs]
    triples = zip(requests, theirs, ours, strict=True)
    differing = [{"request": r, "theirs": t, "ours": o} for r, t, o in triples if not isinstance(t, str) and t != o]
    return Compared(len(ours), sum(ours), sum(crashed), differing)


def verdict(task: Task, completion: Completion) -> bool:
    """Ours."""
    return benchmarks.get("bfcl").score(task, completion).passed


# ------------------------------------------------------------------------------------------------- single turn


def single_turn(seed: int, every: int = 1) -> tuple[list[dict[str, Any]], list[bool]]:
    """Requests and our verdicts: every `every`-th task of all single-turn categories, its answer in many forms."""
    rng, requests, ours = random.Random(seed), [], []
    for category in (c for c in CATEGORIES if c != CATEGORY):
        for task in load(category)[::every]:
            base = benchmarks.get("bfcl").reference_answer(task)
            texts = dict.fromkeys([base, *(mutate(base, rng) for mutate in MUTATIONS)])
            for text in texts:
                reference = task.reference
                requests.append(
                    {
                        "kind": "calls",
                        "category": category,
                        "functions": reference["functions"],
                        "expected": reference["expected"],
                        "text": text,
                    }
                )
                ours.append(verdict(task, Completion(task.id, "ours", "", text)))
    return requests, ours


def _swap(pattern: str, make: Callable[[re.Match[str], random.Random], str]) -> Callable[[str, random.Random], str]:
    """A mutation that changes one of the places where a pattern matches."""

    def mutate(text: str, rng: random.Random) -> str:
        found = list(re.finditer(pattern, text))
        if not found:
            return text
        chosen = rng.choice(found)
        return text[: chosen.start()] + make(chosen, rng) + text[chosen.end() :]

    return mutate


MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (
    _swap(r"\d+", lambda m, _: str(int(m[0]) + 1)),
    _swap(r"\b\d+\b(?!\.)", lambda m, _: f"{m[0]}.0"),
    _swap(r"\b\d+\b", lambda m, _: f"'{m[0]}'"),
    _swap(r"'[^']*'", lambda m, _: m[0].upper()),
    _swap(r"'[^']*'", lambda m, _: f"'{m[0][1:-1]} .'"),
    _swap(r"'[^']*'", lambda m, _: f"'{m[0][1:-1]}s'"),
    _swap(r"'[^']*'", lambda m, _: f"[{m[0]}]"),
    _swap(r"'[^']*'", lambda m, _: m[0].replace(" ", "_")),
    _swap(r"True|False|true|false", lambda m, _: {"t": "False", "f": "True"}[m[0][0].lower()]),
    _swap(r"\w+=(?:'[^']*'|[\d.]+)(?:, )?", lambda m, _: ""),
    _swap(r"\(", lambda m, _: "(not_a_parameter=1, "),
    _swap(r"\w+(?=\()", lambda m, _: m[0] + "x"),
    _swap(r"\[", lambda m, _: "("),
    _swap(r", ", lambda m, _: " , "),
    _swap(r"=", lambda m, rng: rng.choice(["= ", "=-", "=variable_", "=[1, 2], extra="])),
    _swap(r"\w+=", lambda m, _: ""),
    lambda text, _: f"```\n{text}\n```",
    lambda text, _: f"Here you are: {text}",
    lambda text, _: text.strip("[]"),
    lambda text, _: text[:-1],
    lambda text, _: f"{text}\n",
    lambda text, _: f"[{text.strip('[]')}, {text.strip('[]')}]",
    lambda text, _: "[" + ", ".join(reversed(re.findall(r"[\w.]+\([^()]*\)", text))) + "]",
    lambda text, _: "",
    lambda text, _: "[]",
)
"""Near misses of every kind that the rules tell apart, and forms that answers come in."""


# ------------------------------------------------------------------------------------------------- several turns


def reference_turns(task: Task) -> list[list[str]]:
    """The right answers of a conversation, per turn."""
    benchmark = benchmarks.get("bfcl")
    turns: list[list[str]] = [[]]
    said: tuple[Message, ...] = ()
    for question in range(len(task.reference["questions"])):
        for _ in range(2):
            text = benchmark.reference_answer(replace(task, messages=(*task.messages, *said)))
            if text == END_OF_TURN:
                break
            turns[-1].append(text)
            said += (Message("assistant", text),)
        said += (Message("assistant", END_OF_TURN),)
        if question + 1 < len(task.reference["questions"]):
            turns.append([])
    return turns


def conversations(turns: list[list[str]], rng: random.Random) -> Iterator[list[list[str]]]:
    """The right conversation, other ways to the same end, and ways that go wrong."""

    def changed(mutate: Callable[[str, random.Random], str]) -> list[list[str]]:
        place = rng.randrange(len(turns))
        return [[mutate(a, rng) for a in answers] if i == place else answers for i, answers in enumerate(turns)]

    yield turns
    yield [[f"[{call}]" for answer in answers for call in _calls_of(answer)] for answers in turns]
    yield changed(lambda text, _: "[" + ", ".join(_calls_of(text)[1:]) + "]")
    yield changed(lambda text, _: "[" + ", ".join(reversed(_calls_of(text))) + "]")
    yield changed(lambda text, rng: f"[{', '.join([*_calls_of(text), rng.choice(_calls_of(text) or ['ls()'])])}]")
    yield changed(lambda text, rng: rng.choice(MUTATIONS)(text, rng))
    yield [*turns[:-1], []]
    yield [[answer for answers in turns for answer in answers], *[["[pwd()]"] for _ in turns[1:]]]
    yield [[*answers, rng.choice(["[ls(a=True)]", "[get_current_time()]", "[nothing(x=1)]"])] for answers in turns]


def _calls_of(answer: str) -> list[str]:
    """The calls of a reference answer, which hold no brackets but their own in all but a few cases."""
    return re.findall(r"\w+\((?:[^()]|\([^()]*\))*\)", answer)


def multi_turn(seed: int, tasks: int, threads: int) -> tuple[list[dict[str, Any]], list[bool]]:
    """Requests and our verdicts for conversations of the first `tasks` tasks."""
    rng = random.Random(seed)
    pairs = [(t, c) for t in load(CATEGORY)[:tasks] for c in conversations(reference_turns(t), rng)]
    requests = [
        {
            "kind": "turns",
            "row": {
                "id": task.reference["id"],
                "initial_config": task.reference["initial"],
                "involved_classes": task.reference["classes"],
            },
            "expected": task.reference["expected"],
            "answers": turns,
        }
        for task, turns in pairs
    ]

    def judge(pair: tuple[Task, list[list[str]]]) -> bool:
        task, turns = pair
        ended = [[a for a in answers if _is_step(a)] + [END_OF_TURN] for answers in turns]
        said = tuple(Message("assistant", a) for answers in ended for a in answers)
        return verdict(task, Completion(task.id, "ours", "", END_OF_TURN, turns=said))

    with ThreadPoolExecutor(threads) as pool:
        return requests, list(pool.map(judge, pairs))


def _is_step(answer: str) -> bool:
    """Whether an answer holds calls: one that holds none would end its turn."""
    from cascade.benchmarks.bfcl_multi_turn import calls_in

    return bool(calls_in(answer))


def prompts_differ(python: Path) -> tuple[int, list[str]]:
    """(tasks compared, ids of those whose first messages are not the leaderboard's to the character)."""
    compared, differing = 0, []
    shown = ask(python, [{"kind": "prompts", "category": c} for c in CATEGORIES])
    for category, theirs in zip(CATEGORIES, shown, strict=True):
        for task in load(category):
            compared += 1
            if [m.as_dict() for m in task.messages] != theirs[task.id.removeprefix("bfcl/")]:
                differing.append(task.id)
    return compared, differing
