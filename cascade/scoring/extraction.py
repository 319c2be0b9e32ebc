r"""Reading an answer out of free text, leniently but never so that listing candidates passes.

Every reader looks for the answer where writers put it, strongest sign first: `\boxed{…}` or <answer> tags, "final
answer: …", "the answer is …" / "Answer: …", bold, a conclusion ("So …"), a value that closes a sentence, the text as a
whole. The first sign that is present decides. If it points at several different values the reading is ambiguous,
and scorers count that as a wrong answer; if nothing is found the answer is unparsed. What an answer rules out ("The
answer is not 5") is no answer (see `cascade.scoring.denials`), and candidates that are merely listed ("A. ant B. dog")
are several.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from cascade.scoring.denials import without_denials
from cascade.scoring.fences import FENCE, fenced_blocks
from cascade.scoring.labels import read_choice as read_choice
from cascade.scoring.signs import (
    HEDGE,
    MAX_CHARS,
    OR,
    clean,
    decide,
    distinct,
    first_sentence,
    plain,
    spans_as_written,
)
from cascade.scoring.signs import NOTHING as NOTHING
from cascade.scoring.signs import Reading as Reading
from cascade.scoring.signs import marked_spans as marked_spans

# ------------------------------------------------------------------------------------------------- numbers

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
NUMBER = re.compile(rf"[-+]?{_DIGITS}")
"""What is all of a text that is a number."""
_SIGNED = rf"(?:[-+−–]\s?(?=[\d$€£.]))?[$€£]?{_DIGITS}"
_NUMBER = re.compile(rf"(?<![\w.]){_SIGNED}(?![\w]*\d)")
_LIST_MARK = re.compile(r"^[ \t]*(?:[-*•–]|\d{1,2}[.)])[ \t]+(?=\S)", re.MULTILINE)
_DASH = re.compile(
    r"(?<=[^\W\d_]{2})(?<!\bis)(?<!\bare)(?<!\bbe)(?<!\bequals)(?<!\bto)[ \t]+[-–][ \t]+(?=[$€£]?\d)", re.IGNORECASE
)
"""Between words and a number: "Total - 42"."""
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,;:! ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
"""What TeX, and texts that will not break a line there, put between groups of digits."""
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d.$€£])", re.IGNORECASE)
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()  # noqa: SIM905
_NUMBER_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b", re.IGNORECASE)
_ANOTHER_NUMBER = re.compile(
    rf"(?:\s*(?:%|[^\W\d_]+)[\s,;(]*{OR}\b|[.!]\s+{OR}\b)?(?:[\s,/|&;]|\(?\s*\b(?:{HEDGE})\b)*+[-+−–$€£]*\d",
    re.IGNORECASE,
)
"""What follows a number that is one of several: "7 or maybe 8", "7 apples (or 8)", "7/8"."""
_EQUATION = re.compile(r"\b([A-Za-z]\w*)\s*=\s*")
_EQUATIONS = re.compile(
    rf"(?:\b[A-Za-z]\w*\s*=\s*{_SIGNED}(?:\s*[,;]\s*|\s+)(?:(?:{OR}|and)\b[\s,]*)*)+\b[A-Za-z]\w*\s*=\s*{_SIGNED}",
    re.IGNORECASE,
)
"""A variable's value and another's (or its own) next to it."""
_CLOSING_VALUE = re.compile(
    r"(?:(?:\bis|\bare|\bequals?|\bequal\s+to|\bbe|\bhas|\bhave|:|→|->)\s+|=\s*)(?P<span>[^\s=][^=\n]*)$"
)


def numbers(text: str) -> list[str]:
    """The numbers of a text in order, normalised: no thousands separators, currency or "+", a plain minus sign."""
    found = []
    for match in _NUMBER.finditer(text):
        value = re.sub(r"[\s,$€£+]", "", match[0]).replace("−", "-").replace("–", "-")
        found.append(value)
    return found or [str(_WORDS.index(m[0].lower())) for m in _NUMBER_WORD.finditer(text)]


def _number_in(span: str) -> list[str]:
    """The value a marked span names: right of its last "=", else its only number, else its leading one."""
    sentence = first_sentence(span)
    if alternatives := _equated_alternatives(sentence):
        return alternatives
    if "=" in sentence:
        sentence = sentence.rsplit("=", 1)[1]
    values = numbers(sentence)
    lead = _NUMBER.search(sentence)
    if lead and not re.search(r"\w", sentence[: lead.start()]):
        after = span[span.rindex(sentence) + lead.end() :]
        return values[:1] + (numbers(after)[:1] if _ANOTHER_NUMBER.match(after) else [])
    return values


def _equated_alternatives(sentence: str) -> list[str]:
    """The values of "x = 7 or x = 8", "x = 7, x = 8", "x = 7 or y = 8"; none where equations lead to one another."""
    chain = _EQUATIONS.search(sentence)
    if chain is None:
        return []
    names = {name.lower() for name in _EQUATION.findall(chain[0])}
    either = re.search(rf"\b{OR}\b", chain[0], re.IGNORECASE) is not None
    return [numbers(part)[-1] for part in _EQUATION.split(chain[0])[2::2]] if either or len(names) == 1 else []


def _closing_numbers(text: str) -> list[str]:
    """Numbers that close a sentence after "is", "=" or ":", e.g. "The LCM of 4 and 6 is 12."."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", clean(text)):
        match = _CLOSING_VALUE.search(sentence.rstrip(" .!?"))
        values = numbers(match["span"]) if match and len(match["span"].split()) <= 4 else []
        if len(set(values)) == 1:
            found.append(values[0])
    return found + _equated_alternatives(sentence)  # of the last: earlier ones may be decided between later on


def _last_equation(text: str) -> list[str]:
    """The right side of an equation that is all of the last line, e.g. "38 - 69 = -31"."""
    last = clean(text).rpartition("\n")[2].rstrip(" .")
    values = numbers(last.rsplit("=", 1)[1]) if re.fullmatch(r"[\d\s+\-*/×÷^().,−–=]+", last) and "=" in last else []
    return values if len(values) == 1 else []


def read_number(text: str) -> Reading:
    """A number, from "5", "Mary has 5 sisters.", "The answer is **5**", "12 + 3 = 15", "$1,250.00"."""
    text = _DASH.sub(": ", _LIST_MARK.sub("", text[-MAX_CHARS:]))  # neither is a minus
    text = _MINUS.sub("-", _THOUSANDS.sub(",", text))
    text = without_denials(text, _NUMBER.pattern)
    resorts = [("equation", _last_equation), ("whole text", _only_number), ("closing", _closing_numbers)]
    return decide(text, _number_in, [*resorts, ("whole text", lambda t: numbers(clean(t)))])


def _only_number(text: str) -> list[str]:
    values = distinct(numbers(clean(text)))
    return list(values) if len(values) == 1 else []


# ------------------------------------------------------------------------------------------- words


def read_word(text: str, vocabulary: Sequence[str]) -> Reading:
    """One of a few known words (yes/no, a relation), lower-cased, e.g. from "Yes, because no dog is a cat."."""
    words = sorted((w.lower() for w in vocabulary), key=len, reverse=True)
    known = "|".join(map(re.escape, words))
    pattern = re.compile(rf"(?<![\w-])({known})(?![\w-])", re.IGNORECASE)
    text = without_denials(text[-MAX_CHARS:], rf"(?<![\w-])(?:{known})(?![\w-])")

    def find(span: str) -> list[str]:
        return [m.lower() for m in pattern.findall(first_sentence(span))]

    def leading(whole: str) -> list[str]:
        opening = pattern.match(whole.lstrip("*_`\"' \n"))
        rest = re.sub(rf"[\W_]+|\b(?:{HEDGE})\b", " ", whole.lstrip("*_`\"' \n")[opening.end() :]) if opening else ""
        only_words = bool(rest.strip()) and not pattern.sub("", rest).strip()
        return [opening[0].lower()] if opening and not only_words else []

    return decide(text, find, [("leading", leading), ("whole text", lambda t: [m.lower() for m in pattern.findall(t)])])


# ------------------------------------------------------------------------------------------------ lists and text


def list_items(span: str) -> list[str]:
    """The items of "a, b, c", "[a, b, c]", "'a' 'b' 'c'" or "a b c"."""
    bare = clean(span).strip(" \t\n*").rstrip(".!").strip("[](){} \t\n")
    parts = re.split(r"\s*[,;\n]\s*(?:and\s+)?|\s+and\s+" if re.search(r"[,;\n]", bare) else r"\s+", bare)
    return [p.strip(" \t\"'“”‘’.") for p in parts if p.strip(" \t\"'“”‘’.")]


def read_list(text: str, length: int) -> Reading:
    """A list of `length` single-word items, joined by ", ".

    Reads "a, b, c", brackets, quotes, a numbered or bulleted list, and such a list after "…:" or "… is".
    """

    def find(span: str) -> list[str]:
        tail = re.sub(r"^.*(?::|\bis|\bare|\bbe)\s+(?=\S)", "", span.strip(), flags=re.IGNORECASE)
        items = list_items(tail)
        fits = len(items) == length or (len(items) > 1 and "," in tail and all(len(i.split()) == 1 for i in items))
        return [", ".join(items)] if fits else []

    def lines(whole: str) -> list[str]:
        rows = [row.strip() for row in whole.splitlines() if not FENCE.match(row)]
        rows = [row for row in rows if row and not row.endswith(":")]
        items = [re.sub(r"^(?:[-*•]|\d+[.):])\s+", "", row).rstrip(",") for row in rows]
        body = [i for i, row in zip(items, rows, strict=True) if i != row or len(row.split()) == 1]
        if len(body) == length > 1 and all("," not in b for b in body):
            return [", ".join(list_items("\n".join(body)))]
        return [value for row in items for value in find(row)]

    return decide(text, find, [("whole text", lines)])


_MARKS = re.compile(r"\s*(\*\*|__|`|\*|\$\$?|\\\(|\\\[|[\"'])(?P<inside>.+?)(?:\1|\\\)|\\\])\s*", re.DOTALL)


_BOLD_LINE = re.compile(r"\n[ \t]*(?P<mark>\*\*|__)(?P<span>(?:(?!(?P=mark))[^\n])+)(?P=mark)\.?\Z")
"""All of the last of several lines."""
_PAIRS = 4
"""Pairs of marks that are taken off one after the other; nobody writes more."""


def spellings(span: str) -> Iterator[str]:
    r"""A text as it stands, then without the marks around it, pair by pair: `"$5"`, "$5", $5."""
    for _ in range(_PAIRS):
        span = span.strip()
        alone = span.strip("* \n").rstrip(".")
        yield from (span, span.removesuffix("."), alone, alone.replace("\\", ""))
        peeled = _MARKS.fullmatch(span) or _MARKS.fullmatch(span.rstrip("."))
        if peeled is None:
            return
        span = peeled["inside"]


def read_text(text: str, known: Callable[[str], bool] = lambda _: False) -> Reading:
    """A short free answer: what a sign points at (up to the end of its line), a fenced block, a last line all in bold,
    or the whole text.

    Args:
        text: the answer.
        known: whether a spelling is one that is looked for: it is read as it is written, where marks ("$5", "__init__")
            or a denial ("not guilty") belong to it.
    """
    text = text[-MAX_CHARS:].strip()
    for how, spans in spans_as_written(text):
        if how not in {"bold", "last line", "conclusion"}:
            bare = [(plain(how, span) or "").rstrip(".").strip("\"'") for span in spans]
            if values := distinct(_known(span, known) or b for span, b in zip(spans, bare, strict=True)):
                return Reading(values[0] if len(values) == 1 else None, how, values)
    if blocks := distinct(_known(body, known) or body.strip() for _, body in fenced_blocks(text)):
        return Reading(blocks[0] if len(blocks) == 1 else None, "fenced", blocks)
    if closing := _BOLD_LINE.search(text):
        value = _known(closing["span"], known) or clean(closing["span"]).rstrip(".").strip("\"'")
        return Reading(value, "bold", (value,))
    whole = _known(text, known) or clean(text).strip("\"'")
    return Reading(whole, "whole text", (whole,)) if whole else NOTHING


def _known(span: str, known: Callable[[str], bool]) -> str:
    """The first spelling of a text that is looked for, "" if none is."""
    return next(filter(known, spellings(span)), "")
