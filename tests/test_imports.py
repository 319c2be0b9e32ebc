"""The three rules of the architecture, as far as they can be read off the code.

1. Imports run one way: ray_jobs -> cascade <- serve.
2. A test-split task never becomes an example: the only way to make one from an answer checks it.
3. Reports show figures, they do not invent them: numbers come from tables (see tests/cascade/reports/test_html.py).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cascade", "ray_jobs", "serve")


def modules(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    """The packages that a module names in its imports, lazy ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def test_the_library_works_where_ray_is_not_installed():
    """Importing every module of the library brings no Ray with it, not even through another package."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in modules("cascade")]
    names = [n.removesuffix(".__init__") for n in names if not n.endswith("__main__")]
    program = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'ray_jobs', 'serve'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "assert not {m.split('.')[0] for m in sys.modules} & {'ray', 'ray_jobs', 'serve'}\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]


def _calls(path, name):
    """Line numbers where `name(...)` is called directly."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.lineno
        for node in ast.walk(tree)
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
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}
