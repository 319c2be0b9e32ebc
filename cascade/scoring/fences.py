"""Code and JSON out of answers: fenced blocks first, then what stands amid prose."""

from __future__ import annotations

import ast
import itertools
import json
import re
import textwrap
from typing import Any

FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<mark>```+|~~~+)[ \t]*(?P<language>[\w+#.-]*)[^\n]*$", re.MULTILINE)
ANSWER_TAG = re.compile(r"<answer>(?P<span>.*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of every Markdown code block in order; a block that is never closed runs to the end."""
    blocks, opened = [], None
    for match in FENCE.finditer(text):
        if opened is None:
            opened = match
        elif match["mark"].startswith(opened["mark"]) and not match["language"] and _closes(match, opened):
            blocks.append((opened["language"].lower(), text[opened.end() + 1 : match.start()].rstrip("\n")))
            opened = None
    if opened is not None:
        blocks.append((opened["language"].lower(), text[opened.end() + 1 :].rstrip("\n")))
    return blocks


def _closes(fence: re.Match[str], opened: re.Match[str]) -> bool:
    """Not one that is indented as code is, in a docstring, say (CommonMark allows three blanks)."""
    return len(fence["indent"].expandtabs()) <= len(opened["indent"].expandtabs()) + 3


def read_code(text: str, defines: str | None = None) -> str | None:
    """Python source out of an answer.

    Args:
        text: prose with fenced blocks, or code alone.
        defines: name of a function or class that the code must define.

    Returns:
        The last fenced block that defines the name (all blocks before it that define what it needs are kept too);
        without fences, the code from its first to its last line that Python accepts, indented as Markdown has it or
        not; None if there is none.
    """
    languages = re.compile(r"|py|i?python[\d.]*")
    blocks = [textwrap.dedent(body) for language, body in fenced_blocks(text) if languages.fullmatch(language)]
    name = re.escape(defines or "")
    pattern = re.compile(rf"^[ \t]*(?:(?:async\s+)?(?:def|class)\s+{name}\b|{name}\s*=[^=])", re.M) if defines else None
    if blocks:
        fitting = [i for i, body in enumerate(blocks) if body.strip() and (pattern is None or pattern.search(body))]
        if not fitting:
            return None
        last = blocks[fitting[-1]]
        helpers = [b for b in blocks[: fitting[-1]] if _only_definitions(b) and not (pattern and pattern.search(b))]
        return "\n\n".join([*helpers, last])
    tagged = ANSWER_TAG.search(text)
    text = _PROGRAM_MARKS.sub("", tagged["span"] if tagged else text)
    if pattern is not None and not pattern.search(text):
        return None
    return _longest_program(text)


def read_javascript(text: str, defines: str) -> str | None:
    """JavaScript source out of an answer: the last fenced block that defines the name, after the blocks that do
    not hold it; without fences the whole text if it declares the name; None if there is none. What a module exports is
    declared alone, since a script knows no `export`."""
    blocks = [body for language, body in fenced_blocks(text) if language in {"", "javascript", "js", "node", "mjs"}]
    name = rf"(?<![\w$]){re.escape(defines)}(?![\w$])"
    defined = rf"function\s*\*?\s*{name}|{name}\s*(?:=(?![=>])|:|\([^()]*\)\s*\{{)"
    fitting = [i for i, body in enumerate(blocks) if re.search(defined, body)]
    code = None
    if fitting:
        helpers = [b for b in blocks[: fitting[-1]] if not re.search(name, b)]
        code = "\n".join([*helpers, blocks[fitting[-1]]])
    elif not blocks:
        declared = rf"^[ \t]*(?:export\s+(?:default\s+)?)?(?:(?:async\s+)?function\*?\s+|(?:const|let|var)\s+){name}"
        code = text if re.search(declared, text, re.MULTILINE) else None
    return code and re.sub(r"^([ \t]*)export\s+(?:default\s+)?", r"\1", code, flags=re.MULTILINE)


def _only_definitions(code: str) -> bool:
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return any(isinstance(node, kinds) for node in body) and all(isinstance(n, kinds) or _is_constant(n) for n in body)


def _is_constant(node: ast.stmt) -> bool:
    """A docstring, or an assignment that calls nothing."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    assigns = isinstance(node, ast.Assign | ast.AnnAssign)
    return assigns and not any(isinstance(inner, ast.Call) for inner in ast.walk(node))


_PROGRAM_MARKS = re.compile(r"^\[(?:BEGIN|DONE)\][ \t]*$", re.MULTILINE)
_CODE_LINE = re.compile(r"^(?:def|class|import|from|@|async def)\b|^@|^\w+\s*=[^=]")


def _longest_program(text: str) -> str | None:
    """The first run of lines that begins like a program, cut at the end until it parses."""
    lines = text.splitlines()[:2000]
    starts = [i for i, line in enumerate(lines) if _CODE_LINE.match(line)]
    starts = starts or [i for i, line in enumerate(lines) if _CODE_LINE.match(line.lstrip())]
    if not starts:
        return None
    start, end = starts[0], len(lines)
    margin = lines[start][: -len(lines[start].lstrip())]
    lines = [line.removeprefix(margin) for line in lines]
    while end > start:
        program = "\n".join(lines[start:end])
        try:
            ast.parse(program)
        except SyntaxError as error:
            end = min(end - 1, start + (error.lineno or 1) - 1) if error.lineno and error.lineno > 1 else end - 1
            continue
        except (ValueError, RecursionError, MemoryError):
            return None
        return program if program.strip() else None
    return None


MAX_JSON_STARTS = 200


def read_json(text: str) -> Any | None:
    """The largest JSON object or array in a text (in a fence or amid prose); None if there is none."""
    decoder, best, size, resume = json.JSONDecoder(), None, 0, 0
    for match in itertools.islice(re.finditer(r"[\[{]", text), MAX_JSON_STARTS):
        if match.start() < resume:
            continue
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        resume = end
        if end - match.start() > size:
            best, size = value, end - match.start()
    return best
