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
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _figures import figure

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]

import answer_forms  # noqa: E402
import attacks  # noqa: E402
import bfcl_parity  # noqa: E402
import text_forms  # noqa: E402
from own_environment import python_with  # noqa: E402

from cascade import benchmarks  # noqa: E402
from cascade.benchmarks.bbh import read_answer  # noqa: E402
from cascade.benchmarks.questions import questions  # noqa: E402
from cascade.reports.scoreboard_rows import REASONING_GYM  # noqa: E402
from cascade.scoring.decontaminate import NGRAM, WHOLE, find_overlaps, words  # noqa: E402
from cascade.scoring.extraction import read_choice, read_list, read_number, read_text, read_word  # noqa: E402
from cascade.scoring.fences import read_code, read_json  # noqa: E402
from cascade.scoring.sandbox import Limits, missing_walls  # noqa: E402
from cascade.scoring.sandbox_programs import run_python  # noqa: E402
from cascade.scoring.statistics import mcnemar_exact, paired_bootstrap, wilson  # noqa: E402
from cascade.tasks import Completion, Example, Message, Task  # noqa: E402

Figures = dict[str, tuple[Any, str, bool]]
"""Figure -> value, target in words, whether it is met."""


def parity(options: argparse.Namespace) -> Figures:
    """Prompts, single-turn answers and conversations, judged by us and by the leaderboard's own code."""
    python = python_with("bfcl-eval", bfcl_parity.PACKAGES, bfcl_parity.BARE)
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
    """Every attack of the corpus on the checker, in Python and JavaScript, and on the walls."""
    if missing := missing_walls():
        print(f"  walls missing here: {missing}")
    on_checker = [*attacks.FORGED, *attacks.HUNG, *attacks.BOMBS, *attacks.JAVASCRIPT]

    def attack(name: str) -> tuple[str, float]:
        began = time.monotonic()
        return attacks.judge(name).outcome, time.monotonic() - began

    def escape(code: str) -> bool:
        filled = code.format(m=attacks.MARKER, home=Path.home() / ".cache") + "\nprint('ESCAPED')"
        return "ESCAPED" in run_python(filled, "", Limits(cpu_seconds=2, wall_seconds=30)).text

    with ThreadPoolExecutor(options.threads) as pool:
        judged = list(pool.map(attack, on_checker))
        escaped = list(pool.map(escape, attacks.ESCAPES.values()))
    forged = [name for name, (outcome, _) in zip(on_checker, judged, strict=True) if outcome == "pass"]
    hung = [name for name, (_, seconds) in zip(on_checker, judged, strict=True) if seconds > 60]
    errors = [name for name, (outcome, _) in zip(on_checker, judged, strict=True) if outcome == "error"]
    out = [name for name, got_out in zip(attacks.ESCAPES, escaped, strict=True) if got_out]
    n = len(on_checker) + len(attacks.ESCAPES)
    print(f"  forged: {forged}; hung: {hung}; errors: {errors}; escaped: {out}")
    print(f"  slowest check {max(s for _, s in judged):.1f} s")
    return {
        "attacks": (n, "at least 30", n >= 30),
        "walls missing": (len(missing), "0", not missing),
        "forged passes": (len(forged), "0", not forged),
        "hung checks": (len(hung), "0", not hung),
        "attacks that end as an error of ours": (len(errors), "0", not errors),
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

    def bbh(text: str) -> bool:
        return read_answer(text, "(B)", "Q?\nOptions:\n(A) ant\n(B) whale\n(C) dog\n(D) cat") == "(B)"

    kinds: dict[str, tuple[list[str], Callable[[str], bool]]] = {
        "number": (filled(answer_forms.NUMBERS, "-31"), lambda t: read_number(t).answer == "-31"),
        "choice": (filled(answer_forms.CHOICES, "B"), lambda t: read_choice(t, options).answer == "B"),
        "word": (filled(answer_forms.WORDS, "No"), lambda t: read_word(t, ("yes", "no")).answer == "no"),
        "list": (filled(answer_forms.LISTS, ""), lambda t: read_list(t, 3).answer == "c, b, a"),
        "code": (answer_forms.code_forms(), adds),
        "text": (filled(text_forms.TEXTS, "New York"), lambda t: read_text(t).answer == "New York"),
        "bbh": ([f.format(a="B") for f in text_forms.bbh_forms(answer_forms.CHOICES)], bbh),
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
    never_certain &= all(paired_bootstrap([0] * n, [0] * n).high > 0 for n in (1, 10, 164, 12_000))
    mean = float(np.mean(list(cells.values())))
    return {
        "Wilson coverage, mean of 28 cells": (round(mean, 4), "0.94 to 0.96", 0.94 <= mean <= 0.96),
        "paired bootstrap coverage": (hits / trials, "0.93 to 0.97", 0.93 <= hits / trials <= 0.97),
        "McNemar false alarms at 0.05": (alarms / trials, "at most 0.06", alarms / trials <= 0.06),
        "0 of n shows an interval": (never_certain, "true", never_certain),
    }


def leaks(options: argparse.Namespace) -> Figures:
    """The bare question of every test task as somebody's message, its words amid others, and runs of 13 words; and how
    many examples without a planted one are suspected, by which rule."""
    rng = random.Random(options.seed)
    tasks, real = _test_tasks(options), _training_tasks(options)
    vocabulary = sorted({w for t in tasks for w in words(t.prompt)})

    def noise(n: int) -> str:
        return " ".join(rng.choices(vocabulary, k=n))

    def example(text: str) -> Example:
        return Example("x/1", "x", "d", "c", 1, (Message("user", text), Message("assistant", noise(30))), "t", 1)

    def disguised(text: Sequence[str]) -> str:
        return f"{noise(20)} {' '.join(w.upper() if rng.random() < 0.3 else f'{w}, ' for w in text)} {noise(20)}"

    asked = [(task.benchmark, questions(task)[0]) for task in tasks]
    long = [(name, own) for name, text in asked if len(own := words(text)) >= NGRAM]
    starts = [rng.randrange(len(own) - NGRAM + 1) for _, own in long]
    runs = [own[start : start + NGRAM] for (_, own), start in zip(long, starts, strict=True)]
    planted = {
        "bare questions": [(name, example(f"  {text.upper()} ")) for name, text in asked],
        f"whole questions of {WHOLE} words or more": [
            (name, example(f"{noise(20)}\n{text}\n{noise(20)}")) for name, text in asked if len(words(text)) >= WHOLE
        ],
        "runs of 13 words": [(name, example(disguised(run))) for (name, _), run in zip(long, runs, strict=True)],
    }
    clean = {"made-up examples": [example(noise(60)) for _ in range(1000)]}
    clean |= {f"training tasks of {name}": examples for name, examples in real.items()}
    groups = {kind: [e for _, e in examples] for kind, examples in planted.items()} | clean
    kinds: dict[int, set[str]] = defaultdict(set)
    for overlap in find_overlaps([e for examples in groups.values() for e in examples], tasks):
        kinds[overlap.example].add(overlap.kind)
    figures: Figures = {}
    start = 0
    for group, examples in groups.items():
        n = len(examples)
        found = {i: kinds[start + i] for i in range(n) if start + i in kinds}
        start += n
        if group in clean:
            first = Counter(next(k for k in ("exact", "question", "ngram") if k in by) for by in found.values())
            made_up = group == "made-up examples"
            figures[f"{group} left out"] = (
                f"{len(found)} of {n} {dict(first)}",
                "0" if made_up else "real repeats",
                not (made_up and found),
            )
            continue
        missed = Counter(name for i, (name, _) in enumerate(planted[group]) if i not in found)
        print(f"  {group}: missed {dict(missed) or 'none'}")
        runs_only = group.startswith("runs")
        target = "none: runs that templates and instructions share tell nothing" if runs_only else "all"
        figures[f"planted {group} found"] = (
            f"{len(found)} of {n}",
            target,
            runs_only or len(found) == n,
        )
    return figures


def _load(name: str, split: Any, count: int | None = None, **given: Any) -> list[Task]:
    return benchmarks.get(name).load(split, domain="d", options=given, seed=0, count=count)


_GENERATORS = [{"name": name} for name in REASONING_GYM]


def _test_tasks(options: argparse.Namespace) -> list[Task]:
    """Every test task that can be had here, and 1,000 of reasoning-gym."""
    tasks = [*_load("humaneval", "test"), *_load("bfcl", "test")]
    tasks += _load("reasoning_gym", "test", 1000, generators=_GENERATORS)
    if options.mbpp:
        tasks += _load("mbpp", "test", path=options.mbpp, shots=0)
    for name, given in (("arc", {}), ("mmlu", {"shots": 0}), ("bbh", {"shots": 0})):
        if options.data and (options.data / name).exists():
            tasks += _load(name, "test", path=str(options.data / name), **given)
    return tasks


def _training_tasks(options: argparse.Namespace) -> dict[str, list[Example]]:
    """The pools that modifiers are trained on, with their right answers."""
    pools = {"bfcl": _load("bfcl", "train")}
    pools["reasoning_gym"] = _load("reasoning_gym", "train", 3000, generators=_GENERATORS)
    if options.mbpp:
        pools["mbpp"] = _load("mbpp", "train", path=options.mbpp, shots=0)

    def example(task: Task) -> Example:
        said = (*task.messages, Message("assistant", benchmarks.get(task.benchmark).reference_answer(task)))
        return Example(task.id, task.benchmark, "d", task.category, 1, said, "t", 1)

    return {name: [example(task) for task in tasks] for name, tasks in pools.items()}


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
    parser.add_argument("--data", type=Path, default=data.parent, help="folder with arc/, mmlu/ and bbh/ for leaks")
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
        for what, (value, target, met) in measured.items():
            print(f"  {what:45} {value!s:>16}   (target: {target}){'' if met else '  NOT MET'}")
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        figures |= measured
    print(json.dumps({name: figure(*of) for name, of in figures.items()}))


if __name__ == "__main__":
    main()
