"""Unit tests as they are written for pytest or unittest, as a script that runs them.

Tests run as a script here (see `cascade.scoring.python_tests`), which would only define functions and classes that
those two find and call.
"""

from __future__ import annotations

import ast

_RUN_CASE = """
import unittest as _unittest
_found = _unittest.TestResult()
_unittest.defaultTestLoader.loadTestsFromTestCase({name}).run(_found)
for _, _told in _found.errors + _found.failures:
    raise AssertionError(_told.strip().splitlines()[-1])
"""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def as_script(tests: str) -> str:
    """The tests, followed by calls of what pytest and unittest would call and they themselves do not.

    Args:
        tests: Python source.

    Raises:
        ValueError: a test wants what only pytest gives it.
    """
    tree = ast.parse(tests)
    called = names_run(tree)
    lines = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name not in called:
            lines += _class_calls(node)
        elif isinstance(node, _FUNCTIONS) and node.name.startswith("test") and node.name not in called:
            _refuse_fixtures(node, 0)
            lines.append(f"{node.name}()")
    return "\n".join([tests, *lines])


def names_run(tree: ast.Module) -> set[str]:
    """The names that a script reads when it is run, also by way of its own functions and classes that it uses."""
    defined = {node.name: node for node in tree.body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))}
    left: list[ast.AST] = [node for node in tree.body if node not in defined.values() and not _is_for_main(node)]
    left += [inner for node in defined.values() for inner in node.decorator_list]
    found: set[str] = set()
    while left:
        new = {n.id for n in ast.walk(left.pop()) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - found
        left += [defined[name] for name in new & set(defined)]
        found |= new
    return found


def _is_for_main(node: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__"`, which tests here are not."""
    names = ast.walk(node.test) if isinstance(node, ast.If) else ()
    return any(isinstance(name, ast.Name) and name.id == "__name__" for name in names)


def _class_calls(node: ast.ClassDef) -> list[str]:
    if any(ast.unparse(base).split(".")[-1].endswith("TestCase") for base in node.bases):
        return [_RUN_CASE.format(name=node.name)]
    tests = [inner for inner in node.body if isinstance(inner, _FUNCTIONS) and inner.name.startswith("test")]
    if not node.name.startswith("Test"):
        return []
    for test in tests:
        _refuse_fixtures(test, 1)
    return [f"{node.name}().{test.name}()" for test in tests]


def _refuse_fixtures(test: ast.FunctionDef | ast.AsyncFunctionDef, own: int) -> None:
    """Arguments beyond its own, marks and coroutines, which a call alone does not serve."""
    wanted = [argument.arg for argument in test.args.posonlyargs + test.args.args][own:]
    if len(wanted) > len(test.args.defaults):
        raise ValueError(
            f"{test.name} takes {', '.join(wanted)}: fixtures and parameters of pytest are not known here; write the "
            "values into the test"
        )
    if isinstance(test, ast.AsyncFunctionDef):
        raise ValueError(f"{test.name} is a coroutine, which nobody awaits here: use asyncio.run in a plain function")
