"""Writes docs/reference/ from the code: every key of a config, every command and its options.

`make docs` (or python docs/generate.py)
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel

from cascade import benchmarks
from cascade.config import Config
from ray_jobs import JOBS, cli
from ray_jobs._context import command_line as job_command_line
from serve import __main__ as serving
from serve import keys
from serve.arguments import Arguments

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Made from the code by `make docs`: edit the code, not this file. -->"
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Every generated page by file name."""
    return {"config.md": config_page(), "cli.md": cli_page()}


# --- the config ---------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of a domain's YAML file, section by section, and the options of the benchmarks."""
    schema = Config.model_json_schema()
    definitions = {"Config": schema, **schema["$defs"]}
    where = _paths("Config", "", definitions)
    parts = [
        NOTE,
        "# Every key of a config",
        "A config is one YAML file for one domain. Unknown keys and wrong values are refused before anything runs. "
        "What is not required may be left out. `[]` marks an entry of a list. Every file in `configs/` is an example.",
        *(_section(name, where[name], definitions) for name in where),
        "## Options of the benchmarks",
        "What `options` of an entry of `sources` or `protect` may hold, by its `benchmark`.",
        *(_benchmark(name) for name in sorted(benchmarks._MODULES)),
    ]
    return "\n\n".join(parts) + "\n"


def _paths(name: str, path: str, definitions: Schema) -> dict[str, list[str]]:
    """The places in the file where each section may stand, in the order of the file."""
    found: dict[str, list[str]] = {name: [path]}
    for key, field in definitions[name]["properties"].items():
        for inner, is_entry in _sections_in(field):
            below = f"{path}.{key}".lstrip(".") + ("[]" if is_entry else "")
            for section, paths in _paths(inner, below, definitions).items():
                found.setdefault(section, []).extend(paths)
    return found


def _sections_in(field: Schema, is_entry: bool = False) -> Iterator[tuple[str, bool]]:
    """Names of the sections that a field holds, and whether it holds a list of them."""
    if "$ref" in field:
        yield field["$ref"].rsplit("/", 1)[1], is_entry
    for option in field.get("anyOf", ()):
        yield from _sections_in(option, is_entry)
    if isinstance(field.get("items"), dict):
        yield from _sections_in(field["items"], True)


def _section(name: str, paths: list[str], definitions: Schema) -> str:
    title = ", ".join(f"`{path}`" for path in paths) if paths != [""] else "The file"
    about = definitions[name].get("description", "").split("\n\n")[0].replace("\n", " ")
    return f'<a id="{name.lower()}"></a>\n\n## {title}\n\n{about}\n\n{_keys(name, definitions)}'


def _keys(name: str, definitions: Schema) -> str:
    section = definitions[name]
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        about = field.get("description") or _about_section(field, definitions)
        default = "required" if key in section.get("required", ()) else _default(field, definitions)
        anchor = f'<a id="{name.lower()}.{key}"></a>'
        rows.append(f"| {anchor}`{key}` | {_type(field)} | {default} | {_cell(about)} |")
    return "\n".join(rows)


def _about_section(field: Schema, definitions: Schema) -> str:
    """What a field is that only says which section it holds."""
    name = next((section for section, _ in _sections_in(field)), None)
    return definitions[name]["description"].split("\n")[0].rstrip(".") if name else ""


def _type(field: Schema) -> str:
    """A field's type and the values it may have, in words."""
    if "$ref" in field:
        return f"[section](#{field['$ref'].rsplit('/', 1)[1].lower()})"
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: " + ", ".join(map(_type, field["prefixItems"]))
        least, most = field.get("minItems"), field.get("maxItems")
        count = f" {least}" if least and least == most else f" {least} or more" if least else ""
        return f"list of{count} {_type(field['items'])}"
    named = {"null": "null", "boolean": "`true`, `false`", "string": "text", "object": "mapping", "integer": "integer"}
    return f"{named.get(field.get('type', ''), 'number')}{_bounds(field)}"


def _bounds(field: Schema) -> str:
    if "pattern" in field:
        return f" like `{field['pattern']}`"
    least, most = field.get("minimum"), field.get("maximum")
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {field[key]:g}" for key, sign in signs.items() if key in field)


def _default(field: Schema, definitions: Schema) -> str:
    """A default as YAML; of a section only what is not that section's own default."""
    if "default" not in field:
        return ""
    value = field["default"]
    section = next((name for name, _ in _sections_in(field)), None)
    if section and value is not None:
        own = definitions[section]["properties"]
        entries = value if isinstance(value, list) else [value]
        kept = [{k: v for k, v in entry.items() if own[k].get("default", ...) != v} for entry in entries]
        value = kept if isinstance(value, list) else kept[0]
        if value == {}:
            return "as there"
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return f"`{_cell(shown.removesuffix('...' + chr(10)).strip())}`"


def _benchmark(name: str) -> str:
    about = inspect.getdoc(importlib.import_module(f"cascade.benchmarks.{name}")) or ""
    return f"### `{name}`\n\n```text\n{about.strip()}\n```"


# --- the commands -------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every subcommand of `cascade`, the job modules, and both commands of the server."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    jobs = [name.replace("_", "-") for name in JOBS]
    parts = [
        NOTE,
        "# Every command",
        "Each prints this with `--help`; `cascade --version` shows the version. Exit codes: 0 done; 1 an error, with "
        "its traceback; 2 what you can mend: a config, a key, a budget, a full disk, an option; 130 Ctrl-C. CONFIG is "
        "the YAML file of a domain ([its keys](config.md)).",
        *(_typer_command(name, command) for name, command in commands.items() if name not in jobs),
        "## cascade JOB CONFIG",
        f"Run one job alone; the jobs before it must be done. JOB is {_or(jobs)}.",
        "## python -m ray_jobs.JOB",
        f"As `cascade JOB` and, with `pipeline`, as `cascade run`; the form for `ray job submit`. JOB is "
        f"{_or([*JOBS, 'pipeline'])}.",
        _argparse(job_command_line("JOB")),
        *_parser_part(serving.command_line(), "## python -m serve"),
        "### name=value",
        "Also `serve run serve.app:build name=value …`, and `args:` in a Serve config.",
        _arguments(Arguments),
        *_parser_part(keys.command_line(), "## python -m serve.keys"),
    ]
    for name, parser in _subparsers(keys.command_line()).items():
        parts += [f"### python -m serve.keys STORAGE {name}", _argparse(parser)]
    return "\n\n".join(parts) + "\n"


def _typer_command(name: str, command: Any) -> str:
    usage, rows = [f"cascade {name}"], []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        shown = parameter.metavar or parameter.name.upper()
        if parameter.param_type_name == "option":
            shown = parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {shown}"
        usage.append(shown if parameter.required or shown.startswith("[") else f"[{shown}]")
        rows.append((shown, _typer_default(parameter), parameter.help or ""))
    return f"## cascade {name}\n\n{command.help}\n\n```text\n{' '.join(usage)}\n```\n\n{_table(rows)}"


def _typer_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = parameter.default
    if shown is None or shown is False or shown == "":
        return ""
    return f"`{shown:.4g}`" if isinstance(shown, float) else f"`{shown}`"


def _parser_part(parser: argparse.ArgumentParser, heading: str) -> list[str]:
    """Its docstring, of which the usage stands below anyway, and its arguments."""
    first, *more = (parser.description or "").strip().split("\n\n")
    first = first.rsplit("`: ", 1)[-1]
    return [heading, f"{first[0].upper()}{first[1:]}", *(b for b in more if b[0] != " "), _argparse(parser)]


def _argparse(parser: argparse.ArgumentParser) -> str:
    pieces, rows = [parser.prog], []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        metavar = (
            str(action.metavar or action.dest.upper()) if action.option_strings else str(action.metavar or action.dest)
        )
        shown = " ".join([*action.option_strings, metavar])
        if isinstance(action, argparse._SubParsersAction):
            shown = "{" + ",".join(action.choices) + "}"
        pieces.append(
            shown if action.required and action.nargs != "*" else f"[{shown}{' …' if action.nargs == '*' else ''}]"
        )
        default = (
            "required" if action.required and action.nargs != "*" else f"`{action.default}`" if action.default else ""
        )
        rows.append((shown, default, action.help or ""))
    return f"```text\n{' '.join(pieces)}\n```" + (f"\n\n{_table(rows)}" if rows else "")


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _arguments(model: type[BaseModel]) -> str:
    definitions = {"Arguments": model.model_json_schema()}
    return _keys("Arguments", definitions)


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| argument | default | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{_cell(name)}` | {default} | {_cell(about)} |" for name, default, about in rows)])


def _cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _or(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:-1]) + f" or `{names[-1]}`"


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(json.dumps({"written": f"docs/reference/{name}", "lines": text.count("\n")}))


if __name__ == "__main__":
    main()
