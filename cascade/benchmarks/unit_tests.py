"""What can be told of unit tests without running them: which names an answer must define, and what cannot work.

The tests run beside the answer, not in its process (see `cascade.scoring.python_tests`): names that they neither define
nor import are taken from the answer, and only plain values pass between the two. So a helper that the tests forgot to
import could be forged by an answer, an object's methods cannot be called, and a list that a function changes in place
is a copy. All of that is refused before anything is spent on such a task.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence

from cascade.benchmarks.mbpp import SETUP
from cascade.benchmarks.unit_test_scripts import names_run
from cascade.scoring.checker_role import free_names

_BUILTINS = frozenset(dir(builtins))


def names_under_test(tests: str, setup: str = "", solution: str = "", defines: Sequence[str] = ()) -> list[str]:
    """The names that an answer must define.

    Args:
        tests: Python source, run beside the answer.
        setup: trusted source that is executed before them.
        solution: a right answer, "" if there is none; what it defines may be tested.
        defines: the names, where neither one name alone nor the solution tells.

    Raises:
        ValueError: a text is no Python; the tests use a name that nobody is known to define, or none of the answer's;
            they look at an object of the answer's, or at what it changes in place; or when they are run they use
            nothing of its.
    """
    for what, source in (("tests", tests), ("setup", setup), ("solution", solution)):
        require_python(what, source)
    given = _bound(f"{SETUP}\n{setup}")
    free = free_names(tests, set(_BUILTINS | given))
    defined = set(defines) or _defined(solution)
    if not defined and len(free) == 1:
        defined = set(free)
    if unknown := sorted(free - defined):
        raise ValueError(
            f"the tests use {', '.join(unknown)}, which neither they nor the setup define or import: import what is no "
            "part of the answer by name, and list what the answer must define under `defines` (or add a solution)"
        )
    shadowing = {n for n in defined if n in _BUILTINS - given and _reads(tests, n)}
    found = sorted(free | shadowing | set(defines))
    if not found:
        raise ValueError("the tests use nothing that an answer defines")
    if not names_run(ast.parse(tests)) & set(found):
        raise ValueError(
            f"the tests never use {', '.join(found)}: what does so stands in functions that nobody calls; call them, "
            "or name them test_…"
        )
    _refuse_objects(ast.parse(tests), set(found), _classes(solution, found))
    _refuse_changed_arguments(ast.parse(tests), set(found))
    return found


def require_python(what: str, source: str) -> None:
    """
    Raises:
        ValueError: it is none.
    """
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the {what} are no Python that can be read: {error}") from None


def _bound(source: str) -> set[str]:
    """Names that a program binds at its top or below."""
    return {name for node in ast.walk(ast.parse(source)) for name in _binds(node)}


def _binds(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).split(".")[0]


def _defined(source: str) -> set[str]:
    """Functions, classes and variables of a program's own, imports apart."""
    statements = [s for s in ast.parse(source).body if not isinstance(s, ast.Import | ast.ImportFrom)]
    return {name for s in statements for node in [s, *_targets(s)] for name in _binds(node)}


def _targets(statement: ast.stmt) -> list[ast.AST]:
    if isinstance(statement, ast.Assign):
        return [node for target in statement.targets for node in ast.walk(target)]
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


def _reads(source: str, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(ast.parse(source)))


def _classes(solution: str, names: Sequence[str]) -> set[str]:
    """Those of the names that are classes: the solution tells, else a capital does."""
    if not solution:
        return {name for name in names if name[:1].isupper()}
    return {node.name for node in ast.walk(ast.parse(solution)) if isinstance(node, ast.ClassDef)} & set(names)


def _calls(node: ast.AST | None, names: set[str]) -> str | None:
    """The name that a node calls, if it is one of these."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    return node.func.id if called else None  # type: ignore[union-attr]


def _refuse_objects(tests: ast.Module, names: set[str], classes: set[str]) -> None:
    """Attributes of the answer's functions, and of objects of its classes."""
    objects = {
        target.id
        for node in ast.walk(tests)
        if isinstance(node, ast.Assign) and _calls(node.value, classes)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tests):
        if not isinstance(node, ast.Attribute):
            continue
        named = isinstance(node.value, ast.Name) and node.value.id in objects | names
        if named or _calls(node.value, classes):
            raise ValueError(
                f"the tests read {ast.unparse(node)}: objects stay in the answer's sandbox, plain values alone come "
                "out of it; let the answer define a function that makes the object, uses it and returns what is tested"
            )


def _refuse_changed_arguments(tests: ast.Module, names: set[str]) -> None:
    """Calls for their effect alone, on a variable that the tests look at again."""
    excused = {id(s) for node in ast.walk(tests) if isinstance(node, ast.Try) and node.handlers for s in node.body}
    plain = _plain_variables(tests)
    for node in ast.walk(tests):
        if not isinstance(node, ast.Expr) or id(node) in excused or not (called := _calls(node.value, names)):
            continue
        given = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - names - plain
        inside = {id(n) for n in ast.walk(node)}
        again = (n for n in ast.walk(tests) if isinstance(n, ast.Name) and id(n) not in inside)
        if seen := sorted({n.id for n in again if isinstance(n.ctx, ast.Load)} & given):
            raise ValueError(
                f"the tests call {called} for what it does to {seen[0]}: the answer gets a copy, so that a change in "
                "place is never seen; ask for a function that returns the result"
            )


def _plain_variables(tests: ast.Module) -> set[str]:
    """Variables of numbers and texts, which nobody can change in place."""
    assigned = [n for n in ast.walk(tests) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
    return {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
