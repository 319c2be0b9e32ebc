"""Runs inside a sandbox: stateful tools, and the calls that a model makes of them, turn by turn.

Loaded by `sandbox_launcher` after `literals` in one namespace; standard library alone (the tools' own imports come
from the installed packages). Calls are evaluated here and nowhere else, without any builtin function but constructors
of plain values, as the Berkeley Function-Calling Leaderboard evaluates them.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import sys
import types
from typing import Any

if __name__ != "sandboxed_role":
    from cascade.scoring.literals import encode, to_line

_FORBIDDEN = ("kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run")
_CONSTRUCTORS = {k: __builtins__[k] if isinstance(__builtins__, dict) else getattr(__builtins__, k) for k in (
    "bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple",
)}  # fmt: skip
_CALLED = re.compile(r"\b([a-zA-Z_]\w*)\s*(?=\()")


def load_classes(modules: dict[str, str], classes: dict[str, str]) -> dict[str, Any]:
    """Class name -> class, out of modules given as source (those that others import come first)."""
    for name, source in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return {name: getattr(sys.modules[module], name) for name, module in classes.items()}


class _World:
    """One instance of each class, in its initial state, under a name of its own."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.instances: dict[str, Any] = {}
        self.names: dict[str, Any] = {}
        self.owners: dict[str, str] = {}
        for name, kind in load_classes(payload["modules"], payload["classes"]).items():
            instance = kind()
            if hasattr(instance, "_load_scenario"):
                instance._load_scenario(copy.deepcopy(payload["initial"].get(name, {})), long_context=False)
            own = re.sub(r"[-./:]", "_", f"{payload['label']}_{name}_instance")
            self.instances[name] = self.names[own] = instance
            for method, _ in inspect.getmembers(instance, predicate=inspect.ismethod):
                if not method.startswith("_"):
                    self.owners[method] = own

    def call(self, source: str) -> str:
        """What one call gives, as text; an exception too is a result."""
        source = _CALLED.sub(lambda m: f"{self.owners[m[1]]}.{m[1]}" if m[1] in self.owners else m[1], source)
        head = source.split("(")[0] if "(" in source else source
        head = head.split(".")[1] if "." in head else head
        try:
            if head in _FORBIDDEN:
                raise ValueError(f"Function call {head} is not allowed.")
            value = eval(source, {"__builtins__": _CONSTRUCTORS, **self.names})
        except Exception as error:
            return f"Error during execution: {error}"
        if type(value) is str:
            return value
        try:
            return json.dumps(value) if type(value) is dict else str(value)
        except (TypeError, ValueError):
            return str(value)

    def state(self) -> dict[str, Any]:
        """Public attributes of every instance, as literals."""
        return {
            name: {k: encode(v, _keep) for k, v in vars(instance).items() if not k.startswith("_")}
            for name, instance in self.instances.items()
        }


def _keep(value: Any) -> Any:
    """The file system's objects, by what makes two of them equal: class, name and contents."""
    inside = getattr(value, "contents", getattr(value, "content", None))
    if type(value).__name__ not in ("Directory", "File"):
        raise TypeError(f"a tool's state holds a {type(value).__name__}")
    return encode((f"<{type(value).__name__}>", value.name, inside), _keep)


def main(payload: dict[str, Any]) -> None:
    """Play the turns and write one line: per turn the results of its steps and the state after it.

    Args:
        payload: {"modules": name -> source, "classes": name -> module, "initial": class -> its initial state, "label":
            what instances are called, "turns": per turn, per step, calls as source}.
    """
    sys.setrecursionlimit(20_000)
    world, played = _World(payload), []
    for steps in payload["turns"]:
        results = [[world.call(source) for source in step] for step in steps]
        played.append({"steps": results, "state": world.state()})
    line = memoryview(to_line({"turns": played}))
    while line:
        line = line[os.write(1, line) :]
    os._exit(0)
