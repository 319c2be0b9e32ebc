"""Conversations with stateful tools, judged as the Berkeley Function-Calling Leaderboard judges them (v4, multi-turn).

A turn is what follows one question: steps of calls, each step one answer of the model. After every turn the tools'
public state must be the one that the reference calls lead to, and the results of the reference calls must be among
those that the model's calls have given so far. The tools run in a sandbox, the model's calls in another one than the
reference calls; what comes out are literals, compared here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade.errors import CascadeError
from cascade.scoring.calls import VALID, Call, CallSyntaxError, Match
from cascade.scoring.literals import decode
from cascade.scoring.sandbox import Limits
from cascade.scoring.sandbox_programs import run_role

LIMITS = Limits(cpu_seconds=20.0)
Steps = Sequence[Sequence[str]]
"""The calls of one turn as source: per step, the calls of that step."""


class ToolsBroken(CascadeError):
    """The tools could not be run to their end; the message says why. It tells nothing of the answer's quality."""


class ToolsExhausted(ToolsBroken):
    """The calls made the tools use more time or memory than they may."""


@dataclass(frozen=True)
class Tools:
    """Stateful tools: where their code is and the state they begin in.

    Attributes:
        modules: module name -> source, in an order in which each imports only earlier ones.
        classes: class name -> the module that defines it.
        initial: class name -> what its `_load_scenario` is given.
    """

    modules: Mapping[str, str]
    classes: Mapping[str, str]
    initial: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What one turn came to.

    Attributes:
        steps: results of the calls, per step.
        state: class name -> public attribute -> value.
    """

    steps: tuple[tuple[str, ...], ...]
    state: Mapping[str, Mapping[str, Any]]

    @property
    def results(self) -> list[str]:
        """The results of all steps in order."""
        return [result for step in self.steps for result in step]


def play(tools: Tools, turns: Sequence[Steps], label: str) -> tuple[Turn, ...]:
    """The turns' calls, executed in order on fresh tools.

    Args:
        tools: what may be called.
        turns: calls as source, per turn and step; see `source_of`.
        label: what the tools' instances are named after.

    Raises:
        ToolsExhausted: a limit was reached.
        ToolsBroken: the tools' code failed, or their state is nothing that can be compared.
        SandboxError: the sandbox cannot be built here.
    """
    payload = {
        "modules": dict(tools.modules),
        "classes": dict(tools.classes),
        "initial": dict(tools.initial),
        "turns": [[list(step) for step in steps] for steps in turns],
        "label": label,
    }
    output = run_role(["literals", "tools_role"], payload, LIMITS)
    lines = output.text.splitlines()
    if output.flooded or output.ended.timed_out or output.ended.ending == "killed":
        raise ToolsExhausted(f"the calls used up what the tools may use ({output.ended.ending})")
    if output.ended.code != 0 or not lines:
        raise ToolsBroken(f"the tools broke: {output.ended.detail or output.last_error}")
    try:
        return tuple(_turn(turn) for turn in json.loads(lines[-1])["turns"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ToolsBroken(f"the tools' process said something else than what came of the calls: {error!r}") from error


def _turn(played: dict[str, Any]) -> Turn:
    state = {name: {k: decode(v, _refuse) for k, v in values.items()} for name, values in played["state"].items()}
    return Turn(tuple(tuple(step) for step in played["steps"]), state)


def _refuse(key: str | int) -> Any:
    raise ToolsBroken(f"a tool's state holds no plain value: {key}")


def source_of(call: Call) -> str:
    """A parsed call as source again; where an argument is a call with named arguments, it is one again.

    Raises:
        CallSyntaxError: an argument is an empty dict, which the accepted harness cannot read.
    """
    return f"{call.name}({', '.join(f'{k}={_argument(v)}' for k, v in call.arguments.items())})"


def _argument(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    if not value:
        raise CallSyntaxError("an empty dict is no argument")
    if all(isinstance(v, dict) for v in value.values()):
        name, arguments = next(iter(value.items()))
        return f"{name}({', '.join(f'{k}={_argument(v)}' for k, v in arguments.items())})"
    return "{" + ", ".join(f"'{k}': {_argument(v)}" for k, v in value.items()) + "}"


def match_turns(played: Sequence[Turn], expected: Sequence[Turn]) -> Match:
    """Whether the turns of a model came to what the reference turns came to.

    Args:
        played: of the model, as many as expected.
        expected: of the reference calls; a turn without calls is not judged.
    """
    so_far: list[str] = []
    for number, (ours, theirs) in enumerate(zip(played, expected, strict=True), 1):
        so_far += ours.results
        if not theirs.results:
            continue
        if not ours.steps:
            return Match(False, f"turn {number}: no function was called")
        if (reason := _state_differs(ours, theirs)) or (reason := _results_missing(so_far, theirs.results)):
            return Match(False, f"turn {number}: {reason}")
    return VALID


def _state_differs(ours: Turn, theirs: Turn) -> str:
    for name, attributes in theirs.state.items():
        for attribute, value in attributes.items():
            if attribute not in ours.state[name] or ours.state[name][attribute] != value:
                found = ours.state[name].get(attribute)
                return f"{name}.{attribute} is {_short(found)}, should be {_short(value)}"
    return ""


def _results_missing(so_far: Sequence[str], wanted: Sequence[str]) -> str:
    left = list(so_far)
    for result in wanted:
        if result not in left:
            return f"no call gave {_short(result)}"
        left.remove(result)
    return ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
