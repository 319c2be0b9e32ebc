"""Judging a function, in Python or JavaScript, by calls with plain values: arguments go in, what it returns comes out.

The candidate's process is told the arguments and nothing else; the values that it should return stay outside, where the
answers are compared as JSON. So nothing that a candidate does can tell it what to forge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from cascade.scoring.python_tests import TestResult
from cascade.scoring.sandbox import Limits
from cascade.scoring.sandbox_programs import Output, run_javascript, run_role

Language = Literal["python", "javascript"]
Case = dict[str, Any]
"""{"args": [plain values], "returns": a plain value}."""
_DRIVER = """(() => {  // a scope of its own: an answer may use any name
const vm = require("vm"), fs = require("fs");
const given = JSON.parse(fs.readFileSync(0, "utf8"));
globalThis.require = require;
globalThis.module = { exports: {} };
globalThis.exports = globalThis.module.exports;
const out = process.stdout.write.bind(process.stdout), exit = process.exit.bind(process);
process.stdout.write = process.stderr.write = () => true;
const text = JSON.stringify;
const plain = (key, value) => {
  if (typeof value === "number") return Number.isFinite(value) ? value : { $: String(value) };
  if (value instanceof Map || value instanceof Set) return { $: value.constructor.name, v: [...value] };
  return ["undefined", "function", "bigint", "symbol"].includes(typeof value) ? { $: typeof value } : value;
};
const run = async () => {
  let f;
  try {
    vm.runInThisContext(given.code, "answer.js");
    f = vm.runInThisContext("typeof " + given.name + " === 'function' ? " + given.name + " : undefined");
    f = f || globalThis.module.exports[given.name];
    if (typeof f !== "function") throw new Error(given.name + " is not defined");
  } catch (error) { return { broken: String(error) }; }
  const results = [];
  for (const args of given.args) {
    try { results.push({ value: await f(...args) }); } catch (error) { results.push({ raised: String(error) }); }
  }
  return { results };
};
run().then((report) => { out("\\n" + text(report, plain) + "\\n"); exit(0); });
})();"""


def run_cases(code: str, language: Language, name: str, cases: Sequence[Case], limits: Limits) -> TestResult:
    """Call a function of an answer once per case.

    Args:
        code: what the model wrote.
        name: the function that it must define.
        cases: calls with what they must return; compared as JSON values (1 and 1.0 are equal, 1 and true are not).

    Raises:
        SandboxError: the sandbox, or node for JavaScript, is missing here.
    """
    given = {"code": code, "name": name, "args": [case["args"] for case in cases]}
    if language == "javascript":
        output = run_javascript(_DRIVER, json.dumps(given), limits)
    else:
        output = run_role(["function_role"], given, limits)
    return _judge(output, name, cases, limits)


def _judge(output: Output, name: str, cases: Sequence[Case], limits: Limits) -> TestResult:
    seconds = output.ended.cpu_seconds
    if output.ended.ending == "setup":
        return TestResult("error", f"the sandbox could not be built: {output.ended.detail}")
    if output.ended.timed_out and not output.flooded:
        return TestResult("timeout", _limit(output, limits), seconds)
    try:
        report = json.loads(output.text.strip().split("\n")[-1])
        results = None if "broken" in report else [dict(r) for r in report["results"]]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return TestResult("fail", f"the program ended without an answer (code {output.ended.code})", seconds)
    if results is None:
        return TestResult("fail", f"the code cannot be executed: {str(report['broken'])[:400]}", seconds)
    if len(results) != len(cases):
        return TestResult("fail", f"{len(results)} answers to {len(cases)} calls", seconds)
    for case, result in zip(cases, results, strict=True):
        if "value" not in result or not same_value(result["value"], case["returns"]):
            gave = json.dumps(result["value"]) if "value" in result else str(result.get("raised", "nothing"))
            shown = ", ".join(json.dumps(a) for a in case["args"])
            wanted = json.dumps(case["returns"])
            return TestResult("fail", f"{name}({shown}) gave {gave}, should be {wanted}"[:800], seconds)
    return TestResult("pass", "", seconds)


def _limit(output: Output, limits: Limits) -> str:
    if output.ended.ending == "cpu":
        return f"over {limits.cpu_seconds:g} s of CPU time"
    return f"it slept or waited for over {limits.wall:.0f} s"


def same_value(a: Any, b: Any) -> bool:
    """Equality of JSON values: numbers by value, true and false apart from 1 and 0, objects in any order of keys."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)
