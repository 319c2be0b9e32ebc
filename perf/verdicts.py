"""How far verdicts can be trusted: parity with BFCL's own code, attacks on the sandbox, answer forms, canonical
solutions, coverage of intervals, planted leaks.

    python perf/verdicts.py                      # everything; about twenty minutes on two cores
    python perf/verdicts.py parity coverage      # some parts
    python perf/verdicts.py solutions --mbpp FILE

Prints a table for people and, as its last line, one JSON object {figure: {value, target, met}}.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]

import answer_forms  # noqa: E402
import attacks  # noqa: E402
import bfcl_parity  # noqa: E402
from own_environment import python_with  # noqa: E402

from cascade import benchmarks  # noqa: E402
from cascade.scoring.decontaminate import find_overlaps, words  # noqa: E402
from cascade.scoring.extraction import read_choice, read_list, read_number, read_word  # noqa: E402
from cascade.scoring.fences import read_code, read_json  # noqa: E402
from cascade.scoring.python_tests import run_tests  # noqa: E402
from cascade.scoring.sandbox import Limits, missing_walls, run_python  # noqa: E402
from cascade.scoring.statistics import mcnemar_exact, paired_bootstrap, wilson  # noqa: E402
from cascade.tasks import Completion, Example, Message, Task  # noqa: E402

Figures = dict[str, tuple[Any, str, bool]]
"""Figure -> value, target in words, whether it is met."""


def parity(options: argparse.Namespace) -> Figures:
    """Prompts, single-turn answers and conversations, judged by us and by the leaderboard's own code."""
    python = python_with("bfcl-oracle", bfcl_parity.PACKAGES, bfcl_parity.BARE)
    prompts, other_prompts = bfcl_parity.prompts_differ(python)
    calls = bfcl_parity.compare(python, *bfcl_parity.single_turn(options.seed, options.every))
    talks = bfcl_parity.compare(python, *bfcl_parity.multi_turn(options.seed, options.conversations, options.threads))
    for name, compared in (("single turn", calls), ("conversations", talks)):
        print(f"  {name}: {compared.n} answers, {compared.passed} pass, the oracle crashes on {compared.crashed}")
        for differing in compared.differing[:5]:
            print(f"    differs: {json.dumps(differing)[:400]}")
    return {
        "bfcl prompts that differ": (f"{len(other_prompts)} of {prompts}", "0", not other_prompts),
        "bfcl single-turn verdicts that differ": (
            f"{len(calls.differing)} of {calls.n - calls.crashed}",
            "0 of at least 5000",
            not calls.differing and calls.n - calls.crashed >= 5000,
        ),
        "bfcl multi-turn verdicts that differ": (
            f"{len(talks.differing)} of {talks.n - talks.crashed}",
            "0",
            not talks.differing,
        ),
    }


def sandbox(options: argparse.Namespace) -> Figures:
    """Every attack of the corpus on the checker and on the walls."""
    if missing := missing_walls():
        print(f"  walls missing here: {missing}")
    on_checker = attacks.FORGED | attacks.HUNG | attacks.BOMBS

    def attack(code: str) -> tuple[str, float]:
        began = time.monotonic()
        return run_tests(code, attacks.TESTS, limits=attacks.FAST).outcome, time.monotonic() - began

    def escape(code: str) -> bool:
        filled = code.format(m=attacks.MARKER, home=Path.home() / ".cache") + "\nprint('ESCAPED')"
        return "ESCAPED" in run_python(filled, "", Limits(cpu_seconds=2, wall_seconds=30)).text

    with ThreadPoolExecutor(options.threads) as pool:
        judged = list(pool.map(attack, on_checker.values()))
        escaped = list(pool.map(escape, attacks.ESCAPES.values()))
    forged = [name for name, (outcome, _) in zip(on_checker, judged, strict=True) if outcome == "pass"]
    hung = [name for name, (_, seconds) in zip(on_checker, judged, strict=True) if seconds > 60]
    out = [name for name, got_out in zip(attacks.ESCAPES, escaped, strict=True) if got_out]
    n = len(on_checker) + len(attacks.ESCAPES)
    print(f"  forged: {forged}; hung: {hung}; escaped: {out}; slowest check {max(s for _, s in judged):.1f} s")
    return {
        "attacks": (n, "at least 30", n >= 30),
        "walls missing": (len(missing), "0", not missing),
        "forged passes": (len(forged), "0", not forged),
        "hung checks": (len(hung), "0", not hung),
        "escapes": (len(out) + attacks.MARKER.exists(), "0", not out and not attacks.MARKER.exists()),
    }


def solutions(options: argparse.Namespace) -> Figures:
    """The published solutions of HumanEval and MBPP's test split, through prompt, extraction and sandbox."""
    figures: Figures = {}
    for name, given in (("humaneval", {}), ("mbpp", {"path": options.mbpp} if options.mbpp else {})):
        benchmark = benchmarks.get(name)
        tasks = benchmark.load("test", domain="d", options=given, seed=0, count=None)

        def judge(task: Task, score: Any = benchmark.score, right: Any = benchmark.reference_answer) -> Any:
            return score(task, Completion(task.id, "reference", "", right(task)))

        with ThreadPoolExecutor(options.threads) as pool:
            failed = [v for v in pool.map(judge, tasks) if not v.passed]
        for verdict in failed:
            print(f"  {verdict.task_id}: {verdict.outcome}, {verdict.evidence}")
        passed = len(tasks) - len(failed)
        figures[f"{name} published solutions that pass"] = (f"{passed} of {len(tasks)}", "all", not failed)
    return figures


def forms(_: argparse.Namespace) -> Figures:
    """Answer forms of every kind, each read by the reader of its kind."""
    options = {"A": "ant", "B": "whale", "C": "dog", "D": "cat"}

    def adds(text: str) -> bool:
        space: dict[str, Any] = {}
        exec(read_code(text, "add") or "", space)  # our own corpus, not a model's
        return "add" in space and space["add"](2, 3) == 5

    def filled(corpus: str, answer: str) -> list[str]:
        return [form.format(a=answer) for form in answer_forms.forms(corpus)]

    kinds: dict[str, tuple[list[str], Callable[[str], bool]]] = {
        "number": (filled(answer_forms.NUMBERS, "-31"), lambda t: read_number(t).answer == "-31"),
        "choice": (filled(answer_forms.CHOICES, "B"), lambda t: read_choice(t, options).answer == "B"),
        "word": (filled(answer_forms.WORDS, "No"), lambda t: read_word(t, ("yes", "no")).answer == "no"),
        "list": (filled(answer_forms.LISTS, ""), lambda t: read_list(t, 3).answer == "c, b, a"),
        "code": (answer_forms.code_forms(), adds),
        "json": (answer_forms.json_forms(), lambda t: read_json(t) == {"a": [1, 2]}),
    }
    figures: Figures = {}
    for kind, (texts, reads) in kinds.items():
        right = sum(map(reads, texts))
        figures[f"{kind} forms read"] = (f"{right} of {len(texts)}", "all of at least 100", right == len(texts) >= 100)
    return figures


def coverage(options: argparse.Namespace) -> Figures:
    """How often a 95 % interval holds the truth, and how often a test at 5 % cries wolf, by simulation."""
    rng = np.random.default_rng(options.seed)
    cells = {}
    for rate in (0.005, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97):
        for n in (50, 164, 500, 2000):
            draws = rng.binomial(n, rate, size=4000)
            holds = {int(k): rate in wilson(int(k), n) for k in np.unique(draws)}
            cells[rate, n] = float(np.mean([holds[int(k)] for k in draws]))
    worst = min(cells, key=cells.__getitem__)
    print(f"  Wilson: mean {np.mean(list(cells.values())):.4f}, worst {cells[worst]:.4f} at rate, n = {worst}")
    hits, alarms, trials = 0, 0, 1000
    for trial in range(trials):
        a = rng.random(200) < 0.3
        b = a ^ (rng.random(200) < np.where(a, 0.1, 0.2))
        truth = 0.7 * 0.2 - 0.3 * 0.1
        hits += truth in paired_bootstrap(list(a), list(b), seed=trial, resamples=1000)
        c, d = rng.random(200) < 0.4, rng.random(200) < 0.4
        alarms += mcnemar_exact(list(c), list(d)) < 0.05
    never_certain = all(wilson(0, n).high > 0 and wilson(n, n).low < 1 for n in (1, 10, 164, 12_000))
    mean = float(np.mean(list(cells.values())))
    return {
        "Wilson coverage, mean of 28 cells": (round(mean, 4), "0.94 to 0.96", 0.94 <= mean <= 0.96),
        "paired bootstrap coverage": (hits / trials, "0.93 to 0.97", 0.93 <= hits / trials <= 0.97),
        "McNemar false alarms at 0.05": (alarms / trials, "at most 0.06", alarms / trials <= 0.06),
        "0 of n shows an interval": (never_certain, "true", never_certain),
    }


def leaks(options: argparse.Namespace) -> Figures:
    """Runs of 13 words of real test questions, disguised and planted in examples; and examples without any."""
    rng = random.Random(options.seed)

    def load(name: str, split: Any, **given: Any) -> list[Task]:
        return benchmarks.get(name).load(split, domain="d", options=given, seed=0, count=None)

    tasks = [*load("humaneval", "test"), *load("bfcl", "test")]
    real = [*load("bfcl", "train")]
    if options.mbpp:
        tasks += load("mbpp", "test", path=options.mbpp, shots=0)
        real += load("mbpp", "train", path=options.mbpp, shots=0)
    vocabulary = sorted({w for t in tasks for w in words(t.prompt)})

    def noise(n: int) -> str:
        return " ".join(rng.choices(vocabulary, k=n))

    def example(text: str) -> Example:
        return Example("x/1", "x", "d", "c", 1, (Message("user", text), Message("assistant", noise(30))), "t", 1)

    planted, clean = [], [example(noise(60)) for _ in range(1000)]
    while len(planted) < 1000:
        task = rng.choice(tasks)
        text = words(_question(task))
        if len(text) >= 13:
            start = rng.randrange(len(text) - 12)
            run = " ".join(w.upper() if rng.random() < 0.3 else f"{w}, " for w in text[start : start + 13])
            planted.append(example(f"{noise(20)} {run} {noise(20)}"))
        elif task.benchmark == "bfcl":
            planted.append(example(f" {task.prompt.upper()} "))
    found = {o.example for o in find_overlaps(planted + clean, tasks)}
    shared = {o.example for o in find_overlaps([example(t.prompt) for t in real], tasks)}
    print(f"  of {len(real)} real training questions {len(shared)} overlap a test question")
    right, wrong = len([i for i in found if i < 1000]), len([i for i in found if i >= 1000])
    return {
        "planted leaks found": (f"{right} of 1000", "all", right == 1000),
        "clean examples suspected": (f"{wrong} of 1000", "0", wrong == 0),
    }


def _question(task: Task) -> str:
    """A task's own words, without what all of its benchmark say."""
    return task.prompt.split("here is your task: ")[-1].split(" Your code should pass")[0]


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "forms": forms,
    "coverage": coverage,
    "leaks": leaks,
    "sandbox": sandbox,
    "parity": parity,
    "solutions": solutions,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    data = ROOT.parent / "shared" / "data" / "mbpp.jsonl"
    parser.add_argument("--mbpp", default=str(data) if data.exists() else None, help="MBPP file; left out, the hub")
    parser.add_argument("--every", type=int, default=10, help="every n-th single-turn task of BFCL")
    parser.add_argument("--conversations", type=int, default=200, help="multi-turn tasks, nine conversations each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}")
    figures: Figures = {}
    for name in options.parts or PARTS:
        began = time.monotonic()
        print(f"{name}:", flush=True)
        measured = PARTS[name](options)
        for figure, (value, target, met) in measured.items():
            print(f"  {figure:45} {value!s:>16}   (target: {target}){'' if met else '  NOT MET'}")
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        figures |= measured
    print(json.dumps({k: {"value": v, "target": t, "met": bool(m)} for k, (v, t, m) in figures.items()}))


if __name__ == "__main__":
    main()
