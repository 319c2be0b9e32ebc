# ruff: noqa: E501
"""Verdicts on function calls against BFCL's own AST checker, on its reference answers and mutations of them.

The oracle is the checker's source out of the pinned wheel, run in a process of its own with stand-ins for the vendor
SDKs that the package imports beside it. Skipped where the wheel cannot be had.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade import benchmarks
from cascade.benchmarks.bfcl import language_of
from cascade.benchmarks.bfcl_multi_turn import WHEEL
from cascade.benchmarks.sources import wheel_folder
from cascade.errors import DataError
from cascade.scoring.calls import Call, match_calls, parse_calls
from cascade.scoring.foreign_calls import converter, parse_foreign_calls

ORACLE = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
config = types.ModuleType("bfcl_eval.constants.model_config")
class Any_(dict):
    def __missing__(self, key):
        return types.SimpleNamespace(underscore_to_dot=False)
config.MODEL_CONFIG_MAPPING = Any_()
sys.modules["bfcl_eval.constants.model_config"] = config
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
LANGUAGES = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}
def revive(v):
    if isinstance(v, dict):
        return tuple(revive(x) for x in v["$t"]) if set(v) == {"$t"} else {k: revive(x) for k, x in v.items()}
    return [revive(x) for x in v] if isinstance(v, list) else v
for line in sys.stdin:
    f, calls, accepted, category = json.loads(line)
    try:
        print(int(ast_checker(f, revive(calls), accepted, LANGUAGES.get(category, Language.PYTHON), category, "m")["valid"]))
    except Exception as error:
        print("crash", type(error).__name__)
"""


def wheel_root() -> Path:
    find_links = os.environ.get("PIP_FIND_LINKS")
    try:
        code = wheel_folder(*WHEEL)
    except DataError as error:
        pytest.skip(f"the wheel {WHEEL[0]} cannot be had ({find_links=}): {str(error)[:80]}")
    return code.parent


def mutations(calls: list[Call], rng: random.Random) -> list[list[Call]]:
    """The calls themselves and near misses of every kind that the rules tell apart."""
    made = [calls, calls[::-1], calls[1:], [*calls, calls[0]]]
    for _ in range(3):
        changed = [Call(c.name, copy.deepcopy(c.arguments)) for c in calls]
        arguments = rng.choice(changed).arguments
        if arguments:
            key = rng.choice(list(arguments))
            arguments[key] = rng.choice(variants(arguments[key]))
        made.append(changed)
    without = [Call(c.name, dict(list(c.arguments.items())[:-1])) for c in calls]
    extra = [Call(c.name, {**c.arguments, "not_a_parameter": 1}) for c in calls]
    renamed = [Call(c.name + "x", c.arguments) for c in calls]
    return [*made, without, extra, renamed]


def variants(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, int(value), str(value)]
    if isinstance(value, int | float):
        return [float(value), int(value), value + 1, str(value), [value], None]
    if isinstance(value, str):
        return [value.upper(), value + " .", value.replace(" ", "_"), value + "s", [value], 3, ""]
    if isinstance(value, list):
        return [tuple(value), value[::-1], value[1:], [str(v) for v in value], [*value, 1], "variable", {}]
    if isinstance(value, dict):
        return [{}, {**value, "odd": 1}, dict(list(value.items())[1:]), [value], "variable"]
    return ["x", 0]


def tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"$t": [tagged(v) for v in value]}
    if isinstance(value, dict):
        return {k: tagged(v) for k, v in value.items()}
    return [tagged(v) for v in value] if isinstance(value, list) else value


def test_verdicts_are_those_of_the_leaderboards_own_checker() -> None:
    root = wheel_root()
    bfcl, rng = benchmarks.get("bfcl"), random.Random(11)
    tasks = bfcl.load("test", domain="a", options={"split_rule": "none"}, seed=1, count=None)
    requests, ours = [], []
    for task in [t for t in tasks if language_of(t.category) == "python" and t.max_turns == 1][::3]:
        accepted, functions = task.reference["expected"], task.reference["functions"]
        if not accepted:
            continue
        for calls in mutations(parse_calls(bfcl.reference_answer(task), lenient=False), rng):
            requests.append(
                json.dumps([functions, [{c.name: tagged(c.arguments)} for c in calls], accepted, task.category])
            )
            ours.append(match_calls(calls, accepted, functions).valid)
    differing, crashed = compare(root, requests, ours)
    assert len(ours) > 5000
    assert differing == []
    print(f"{len(ours)} lists of calls, {sum(ours)} valid, {crashed} on which the oracle breaks, 0 differ")


def compare(root: Path, requests: list[str], ours: list[bool]) -> tuple[list[str], int]:
    """Requests on which the oracle's verdict is another, and on how many it breaks (there ours must be "fail")."""
    done = subprocess.run(
        [sys.executable, "-c", ORACLE, str(root)],
        input="\n".join(requests), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    theirs = [line for line in done.stdout.split("\n") if line in {"0", "1"} or line.startswith("crash")]
    assert len(theirs) == len(ours)
    crashed = [i for i, t in enumerate(theirs) if t.startswith("crash")]
    assert not any(ours[i] for i in crashed)
    return [r for r, t, o in zip(requests, theirs, ours, strict=True) if t in {"0", "1"} and bool(int(t)) != o], len(
        crashed
    )


@pytest.mark.parametrize("language", ["java", "javascript"])
def test_verdicts_on_java_and_javascript_calls(language: Any) -> None:
    root = wheel_root()
    bfcl, rng = benchmarks.get("bfcl"), random.Random(5)
    category = f"simple_{language}"
    options = {"split_rule": "none", "categories": [category]}
    tasks = bfcl.load("test", domain="a", options=options, seed=1, count=None)
    requests, ours = [], []
    for task in tasks:
        accepted, functions = task.reference["expected"], task.reference["functions"]
        for calls in mutations(parse_foreign_calls(bfcl.reference_answer(task)), rng):
            requests.append(json.dumps([functions, [{c.name: tagged(c.arguments)} for c in calls], accepted, category]))
            ours.append(
                all(isinstance(v, str) for c in calls for v in c.arguments.values())
                and match_calls(calls, accepted, functions, converter(language)).valid
            )
    differing, _ = compare(root, requests, ours)
    assert differing == []
    assert sum(ours) > len(tasks) / 2
