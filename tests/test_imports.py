"""The three rules of the architecture, as far as they can be read off the code.

1. Imports run one way: ray_jobs -> cascade <- serve.
2. A test-split task never becomes an example: the only way to make one from an answer checks it.
3. Reports show figures, they do not invent them: numbers come from tables (see tests/cascade/reports/test_html.py).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cascade", "ray_jobs", "serve")


def modules(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def nodes(path):
    """All of a module's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(path):
    """The packages that a module names in its imports, lazy ones included."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_the_contracts_of_import_linter_are_kept():
    script = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([script, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("cascade", {"ray", "ray_jobs", "serve"}),
        ("ray_jobs", {"serve"}),
        ("serve", {"ray_jobs"}),
    ],
)
def test_imports_run_one_way(package, forbidden):
    wrong = {str(p.relative_to(ROOT)): sorted(set(imported(p)) & forbidden) for p in modules(package)}
    assert {path: names for path, names in wrong.items() if names} == {}


def _calls(path, name):
    """Line numbers where `name(...)` is called directly."""
    return [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_examples_are_made_only_by_the_function_that_refuses_test_tasks():
    """`Example(...)` itself is called nowhere: `Example.from_answer` and reading stored ones are the only ways."""
    found = {str(p.relative_to(ROOT)): _calls(p, "Example") for p in modules(*PACKAGES)}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_every_file_is_short_enough_to_be_read():
    long = {str(p.relative_to(ROOT)): n for p in modules(*PACKAGES) if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_no_function_needs_scrolling():
    long = {}
    for path in modules(*PACKAGES):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}
