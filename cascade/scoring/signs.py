r"""Where writers put an answer: the signs that point at it, strongest first, and the strongest that decides.

`cascade.scoring.extraction` says what the signs are and how an answer is read at them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cascade.scoring.fences import ANSWER_TAG

MAX_CHARS = 20_000
"""Longer texts are read at their end only; no answer of our benchmarks comes near."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read out of a text.

    Attributes:
        answer: None if nothing was found or several different values were.
        how: the sign that decided, e.g. "boxed", "stated", "bold", "whole text"; "" if there was none.
        candidates: the different values that the deciding sign points at.
    """

    answer: str | None
    how: str = ""
    candidates: tuple[str, ...] = ()

    @property
    def ambiguous(self) -> bool:
        """Several different answers were given and none marked as the final one: a wrong answer, not an unparsed."""
        return len(self.candidates) > 1


NOTHING = Reading(None)
Finder = Callable[[str], list[str]]
"""The different values that a stretch of text names, in order."""

_STATED = re.compile(
    r"\b(?P<final>final\s+|correct\s+final\s+)?(?:answer|solution|option|choice|result)\b"
    r"(?:\s+(?:to|for|of)\s+(?:the|this|that|your)\s[^.:=\n]{0,60}?)?"
    r"[\s*_`]*(?:is|are|would\s+be|will\s+be|must\s+be|should\s+be|=|:|[-–—](?=\s))(?P<marks>[\s*_`]*):?"
    r"(?=(?P<span>\s*[^\n]*))",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:^|\n)[\W_]*(?:(?:the|my|correct|right|best)\s+)*(?:answer|option|choice)[\W_]*\Z", re.IGNORECASE
)
_FEW = 6
"""Words of a line that gives an answer and nothing besides."""
_CONCLUSION = re.compile(r"(?:^|[.!\n])\s*(?:so|therefore|thus|hence|in conclusion)\b[,:]?(?P<span>[^\n]*)", re.I)
_BOLD = re.compile(r"\*\*(?P<span>[^*\n]{1,200})\*\*|__(?P<other>[^_\n]{1,200})__")
_HASHES = re.compile(r"^####[ \t]+(?P<span>[^\n]+)\Z", re.MULTILINE)
_EQUATED = re.compile(r"^[A-Za-z]\w{0,20}[ \t]*=[ \t]*(?P<span>[^\n=]+)\Z", re.MULTILINE)
OR = r"(?:or|maybe|perhaps|possibly|alternatively)"
HEDGE = (
    "and|or|nor|then|to|through|plus|vs|also|even|else|otherwise|alternatively|either|both|maybe|perhaps|possibly|"
    r"potentially|probably|likely|as\s+well\s+as|(?:(?:but|though|although)\s+)?(?:it|this|that)\s+(?:could|can|might|may)"
    r"|but(?=\s+(?:also|maybe|perhaps|possibly|could|might|may)\b)|could|might|may|be|the|options?|choices?|letters?|answers?"
)
"""Words that join one candidate to the next: an answer that puts nothing else between two gives both."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[.!?][)*\"'](?=\s|$)")


def boxed(text: str) -> list[str]:
    r"""What every `\boxed{…}` holds (braces may nest), in order; `\text{…}` is unwrapped, `\frac{a}{b}` is a/b."""
    found = []
    for start in (m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                bare = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text[start:position])
                found.append(re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", bare))
                break
    return found


def marked_spans(text: str) -> Iterator[tuple[str, list[str]]]:
    """(sign, the stretches of text it points at), strongest sign first; only signs that occur."""
    for how, spans in spans_as_written(text):
        if kept := [bare for span in spans if (bare := plain(how, span)) is not None]:
            yield how, kept


def plain(how: str, span: str) -> str | None:
    """What a sign points at without marks around it; None if that is denied."""
    if how not in ("stated", "final answer"):
        return clean(span)
    bare = clean(re.sub(r"^[\s*_`]+", "", span))
    return None if re.match(r"not\b", bare, re.IGNORECASE) else bare


def spans_as_written(text: str) -> Iterator[tuple[str, list[str]]]:
    """The same with their marks, what is denied among them."""
    stated = _stated(text)
    signs = (
        ("boxed", boxed(text)),
        ("answer tag", [m["span"] for m in ANSWER_TAG.finditer(text)]),
        ("hashes", [m["span"] for m in _HASHES.finditer(text)]),
        *((sign, [span for how, span in stated if how == sign]) for sign in ("final answer", "stated")),
        ("bold", [m["span"] or m["other"] for m in _BOLD.finditer(text)]),
        ("last line", [m["span"] for m in _EQUATED.finditer(text)]),
        ("conclusion", [m["span"] for m in _CONCLUSION.finditer(text)][-1:]),
    )
    yield from ((how, spans) for how, spans in signs if spans)


def _stated(text: str) -> list[tuple[str, str]]:
    """(sign, what it points at) of all statements.

    "Solution:", "each option:" or "to find the answer:" before a line break announces the way to an answer. So what
    stands below counts only if nothing is stated on its own line, only the last, and only where it is the end or
    "Answer:" or "Correct option:" is a heading with a few words below it.
    """
    found = [(m, m["marks"] + span) for m in _STATED.finditer(text) if (span := _up_to_the_next(m["span"])) is not None]
    final = [("final answer", span) for m, span in found if m["final"]]
    here = [("stated", span) for m, span in found if not m["final"] and not _is_below(span)]
    below = [("stated", span) for m, span in found if not m["final"] and _is_below(span) and _is_last_word(m, text)]
    return final + (here or below[-1:])


def _is_below(span: str) -> bool:
    return "\n" in span[: len(span) - len(span.lstrip("*_` \t\n"))]


def _is_last_word(statement: re.Match[str], text: str) -> bool:
    headed = _HEADING.search(text[: statement.end("marks")]) is not None
    return not text[statement.end("span") :].strip() or (headed and len(statement["span"].split()) <= _FEW)


def _up_to_the_next(span: str) -> str | None:
    """What is stated before the next statement, if that is an alternative ("… 7 or the answer is 8"); else nothing."""
    following = _STATED.search(span)
    if following is None:
        return span
    alternative = re.search(
        rf"\b{OR}\b[\W_]*(?:{OR}\b|the\b|that\b|my\b|correct\b|[\W_])*$", span[: following.start()], re.I
    )
    return span[: alternative.start()] if alternative else None


def clean(span: str) -> str:
    """Without Markdown and TeX marks around it."""
    return re.sub(r"\*\*|__|`|\\[()\[\]]|\\?\$", "", span).replace("\\%", "%").strip()


def first_sentence(span: str) -> str:
    """Up to the first full stop that ends a sentence (not the point of a number)."""
    end = _SENTENCE_END.search(span)
    return span[: end.start()] if end else span


def distinct(values: Iterable[str]) -> tuple[str, ...]:
    """What differs of them, in order, without what is empty."""
    return tuple(dict.fromkeys(filter(None, values)))


def decide(text: str, find: Finder, last_resort: Iterable[tuple[str, Finder]]) -> Reading:
    """The strongest sign whose spans name a value; then the last resorts, each over the whole text."""
    text = text[-MAX_CHARS:].strip()
    for how, spans in marked_spans(text):
        values = distinct(value for span in spans for value in find(span))
        if values:
            return Reading(values[0] if len(values) == 1 else None, how, values)
    for how, finder in last_resort:
        values = distinct(finder(text))
        if values:
            return Reading(values[0] if len(values) == 1 else None, how, values)
    return NOTHING
