"""Reads the commands in the documentation's `sh` blocks, and runs them or checks that they would be understood."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import click
import typer
from documents import ROOT
from typer.testing import CliRunner

from cascade.config import load_config
from cascade.errors import ConfigError
from cascade.reports import scoreboard
from ray_jobs import cli
from ray_jobs._context import command_line as job_command_line
from serve import __main__ as serving
from serve import keys
from serve.arguments import checked

RUN = {"plan", "system", "tune-router", "canary"}
"""Subcommands of `cascade` that are cheap, and run where the config is one of READY."""
READY = {"configs/quickstart.yaml", "docs/examples/shop.yaml", "my.yaml"}
SHELL = {"cp", "sed"}
"""Run as they are, in the working folder."""
OTHERS = {"curl", "export", "kubectl", "optuna-dashboard", "vllm"}
"""Not this project's, nor installed with it: only files and URLs that they name are looked at."""
_FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^(?:configs|docs|deploy|perf|tests)/[\w./-]+$|^[\w-]+\.ya?ml$")
_ROUTE = re.compile(r"http://127\.0\.0\.1:8000(/[\w/]+)")
_WRITTEN = re.compile(r"[A-Z_]{3,}|…|<\w+>")


class Misunderstood(AssertionError):
    """A command that nobody would understand."""


@dataclass(frozen=True)
class Command:
    """One command: its words, and the line that it stands in."""

    words: tuple[str, ...]
    line: str


def commands(page: str) -> list[Command]:
    """The commands of a page's `sh` blocks in order; `&&` and `|` end one, comments are left out."""
    found = []
    for block in _FENCE.findall(page):
        for line in _logical_lines(block):
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "|"):
                    words.append(word)
                elif words:
                    found.append(Command(tuple(words), line))
                    words = []
    return found


def _logical_lines(block: str) -> Iterator[str]:
    """Lines put together where a backslash or an open quote says that one goes on."""
    open_line = ""
    for line in block.splitlines():
        open_line += line.removesuffix("\\") if line.endswith("\\") else f"{line}\n"
        if line.endswith("\\"):
            continue
        try:
            shlex.split(open_line, comments=True)
        except ValueError:
            continue
        yield open_line
        open_line = ""
    if open_line.strip():
        raise Misunderstood(f"a quote is never closed: {open_line}")


def check(command: Command, folder: Path) -> str:
    """Run a command in a working folder, or check that it would be understood there.

    Returns:
        "run" or "read".

    Raises:
        Misunderstood: says which part of the command is wrong.
    """
    program, *words = command.words
    name = Path(program).name
    for word in words:
        if name not in SHELL and _FILE.match(word) and not (folder / word).exists():
            raise Misunderstood(f"{word} does not exist: {command.line}")
    if name in SHELL:
        subprocess.run(command.line, shell=True, cwd=folder, check=True, timeout=30)
        return "run"
    if name in OTHERS:
        return _other(name, command)
    if name not in _PROGRAMS:
        raise Misunderstood(f"nobody knows the program {program}: {command.line}")
    return _PROGRAMS[name](words, folder)


def _other(name: str, command: Command) -> str:
    for path in _ROUTE.findall(command.line):
        source = (ROOT / "serve/http.py").read_text(encoding="utf-8")
        if f'"{path}"' not in source:
            raise Misunderstood(f"the server has no {path}: {command.line}")
    return "read"


def _cascade(words: list[str], folder: Path) -> str:
    app = typer.main.get_command(cli.app)
    known = app.commands  # type: ignore[attr-defined]
    if not words or words[0] not in known:
        raise Misunderstood(f"cascade has no command {words[:1]}")
    if words[0] in RUN and READY & set(words) and not any(_WRITTEN.fullmatch(w) for w in words):
        result = CliRunner().invoke(cli.app, words)
        if result.exit_code != 0:
            raise Misunderstood(f"cascade {shlex.join(words)} ended with {result.exit_code}: {result.output[-2000:]}")
        return "run"
    _parse_click(known[words[0]], words[1:])
    _load_configs(words, folder)
    return "read"


def _load_configs(words: list[str], folder: Path) -> None:
    for word in words:
        if word.endswith(".yaml"):
            load_config(folder / word)


def _parse_click(command: click.Command, words: list[str]) -> None:
    """Parse to the last subcommand; nothing is called."""
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            raise Misunderstood(f"{command.name} has no command {words[:1]}")
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context(command.name, list(words))
    except Exception as error:  # typer has a copy of click of its own, with exceptions of its own
        raise Misunderstood(f"{command.name} {shlex.join(words)}: {getattr(error, 'message', error)}") from error


def _parse(parse: Callable[[list[str]], object], words: list[str]) -> None:
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parse(words)
    except SystemExit as error:
        if error.code:
            raise Misunderstood(f"{shlex.join(words)}: {said.getvalue().strip().splitlines()[-1]}") from error


def _python(words: list[str], folder: Path) -> str:
    if words[0] != "-m":
        return _script(words)
    module, rest = words[1], words[2:]
    if module == "serve":
        _parse(serving.command_line().parse_intermixed_args, rest)
        given = serving.command_line().parse_intermixed_args(rest)
        try:
            checked({"config": given.config} | dict(value.split("=", 1) for value in given.values))
        except ConfigError as error:
            raise Misunderstood(str(error)) from error
    elif module == "serve.keys":
        if any(_WRITTEN.fullmatch(w) for w in rest):
            _parse(keys.command_line().parse_args, rest)
            return "read"
        with patch.object(sys, "argv", ["serve.keys", *rest]):
            _parse(lambda _: sys.exit(keys.main()), rest)
        return "run"
    elif module == "cascade.reports.scoreboard":
        single = typer.Typer(add_completion=False)
        single.command()(scoreboard.run)
        _parse_click(typer.main.get_command(single), rest)
    elif module.startswith("ray_jobs.") and importlib.util.find_spec(module):
        _parse(job_command_line(module).parse_args, rest)
    else:
        raise Misunderstood(f"there is no python -m {module}")
    _load_configs(rest, folder)
    return "read"


def _script(words: list[str]) -> str:
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for flag in (w.split("=")[0] for w in words[1:] if w.startswith("--")):
        if f'"{flag}"' not in source:
            raise Misunderstood(f"{words[0]} takes no {flag}")
    return "read"


def _make(words: list[str], folder: Path) -> str:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if unknown := set(words) - set(targets):
        raise Misunderstood(f"make has no {unknown}")
    return "read"


def _ray(words: list[str], folder: Path) -> str:
    from ray.scripts.scripts import cli as ray_cli

    before, entrypoint = (
        (words, []) if "--" not in words else (words[: words.index("--")], words[words.index("--") + 1 :])
    )
    _parse_click(ray_cli, [*before, *(["--", *entrypoint] if entrypoint else [])])
    if entrypoint:
        check(Command(tuple(entrypoint), shlex.join(entrypoint)), folder)
    return "read"


def _serve(words: list[str], folder: Path) -> str:
    from ray.serve.scripts import cli as serve_cli

    _parse_click(serve_cli, words)
    return "read"


def _tensorboard(words: list[str], folder: Path) -> str:
    from tensorboard import program

    _parse(lambda argv: program.TensorBoard().configure(argv=["tensorboard", *argv]), words)
    return "read"


_PROGRAMS: dict[str, Callable[[list[str], Path], str]] = {
    "cascade": _cascade,
    "make": _make,
    "python": _python,
    "ray": _ray,
    "serve": _serve,
    "tensorboard": _tensorboard,
}
