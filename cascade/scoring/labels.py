"""Reading the label of a multiple-choice answer: all letters alike, and no answer where several are given.

Labels with nothing but a hedge between them ("A or B", "B, but maybe C", "both A and D") are several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from cascade.scoring.denials import without_denials
from cascade.scoring.signs import HEDGE, MAX_CHARS, Finder, Reading, decide

# "A" and "I" are words as well: no labels where they are the article ("A cat is …") or the pronoun ("I think it is C").
_NO_NOUN = (
    "or|and|nor|but|because|since|as|for|if|though|although|where|whereas|when|which|that|so|is|isn|are|was|were|has|"
    "does|seems|looks|fits|matches|makes|works|follows|describes|by|due|from|with|without|in|on|at|to|than|then|too|also|only"
)
"""Words that follow a label, and neither an article nor "I"."""
_MODAL = r"would|could|should|must|may|might|cannot|(?:will|can)\s+(?:be|also)"
_WORD = (
    rf"[Aa]\s+(?!(?:{_NO_NOUN}|{_MODAL})(?![\w-]))(?-i:[a-z])"  # "A cat"
    rf"|I\s+(?!(?:{_NO_NOUN})(?![\w-]))(?-i:[a-z])"  # "I think", "I would"
)
_NAMED = "".join(rf"|(?<={word[1:]}\s)" for word in ("option", "choice", "letter", "answer"))
"""After these words a letter is a label whatever follows."""
_ALL = r"(?:both\s+|all\s+|also\s+|equally\s+|the\s+)*"
_TOO = (
    rf"\s+(?:is|are|could|can|might|may|would|seems?)(?:\s+be)?\s+{_ALL}"
    r"(?:(?<=also\s)|(?<=equally\s)|possible|plausible|acceptable|correct|right|true|likely|too\b)"
)
"""What follows a label that is given beside another, as in "A, but B is also possible"."""
_SO_IS = r"\bso\s+(?:is|can|could|may|might)\s+(?:be\s+)?"


@dataclass(frozen=True)
class _Patterns:
    """Of labels alone, so that they are compiled once for all questions that have the same.

    Attributes:
        single: a label.
        group: labels with nothing but a hedge between them.
        opening, opening_any_case: a group that opens a text.
        single_any_case: a label, as it stands in a group that opens a text.
        too: a label that is given beside another.
        line_opening: a label that opens a line.
        bracketed: a label in brackets.
        declared: a group that is said to be right.
    """

    single: re.Pattern[str]
    group: re.Pattern[str]
    opening: re.Pattern[str]
    opening_any_case: re.Pattern[str]
    single_any_case: re.Pattern[str]
    too: re.Pattern[str]
    line_opening: re.Pattern[str]
    bracketed: re.Pattern[str]
    declared: re.Pattern[str]


@lru_cache(maxsize=64)
def _patterns(names: tuple[str, ...]) -> _Patterns:
    labels = "|".join(map(re.escape, names))
    label = rf"(?<!\w)(?<!\w['’])(?:(?!{_WORD}){_NAMED})(?:{labels})(?!\w|['’]\w|-(?-i:[a-z]))"
    listed = rf"{label}(?:(?:[\W_]|(?i:\b(?:{HEDGE})\b))++{label}){{0,25}}+"
    opening = rf"\W*(?P<labels>{listed})"
    return _Patterns(
        single=re.compile(label),
        group=re.compile(listed),
        opening=re.compile(opening),
        opening_any_case=re.compile(opening, re.IGNORECASE),
        single_any_case=re.compile(label, re.IGNORECASE),
        too=re.compile(rf"{label}(?={_TOO})|(?:{_SO_IS}({label}))"),
        line_opening=re.compile(rf"^[\s*_`\"']*(?:\(\s*({labels})\s*\)|({labels})(?=[.):*\s]*$|[.):]))", re.MULTILINE),
        bracketed=re.compile(rf"\(\s*({labels})\s*\)"),
        declared=re.compile(rf"(?P<labels>{listed})\W?\s+(?:is|are)\s+{_ALL}(?:correct|right|best|true|answers?)\b"),
    )


def read_choice(text: str, options: Mapping[str, str]) -> Reading:
    """The label of a multiple-choice answer, from "(B)", "B.", "The answer is b)", or the option's own text.

    Args:
        text: the answer.
        options: label ("A") to the option's text; texts may be empty where only labels are known.
    """
    of = _patterns(tuple(options))
    by_upper = {name.upper(): name for name in options}
    text = without_denials(text[-MAX_CHARS:], _named_choice(options), options.values())
    text = _without_own_texts(_with_quoted_labels(text, options, of.single), options, of.single)

    def find(span: str) -> list[str]:
        if start := of.opening.match(span):
            return of.single.findall(start["labels"]) + [m[1] or m[0] for m in of.too.finditer(span)]
        if start := of.opening_any_case.match(span):
            return [by_upper[m.upper()] for m in of.single_any_case.findall(start["labels"])]
        return of.single.findall(span) or _options_named(span, options)

    def called_right(whole: str) -> list[str]:
        names = [name for m in of.declared.finditer(whole) for name in of.single.findall(m["labels"])]
        return names + [m[1] for m in of.too.finditer(whole) if names and m[1]]

    def opening(whole: str) -> list[str]:
        start = of.opening.match(whole) if of.line_opening.match(whole) else None
        if start is None:
            return []
        return [*of.single.findall(start["labels"]), *(m[1] or m[2] for m in of.line_opening.finditer(whole))]

    def in_brackets(whole: str) -> list[str]:
        around = [(m[0], whole[max(0, m.start() - 2) : m.end() + 2]) for m in of.group.finditer(whole)]
        return [name for names, marked in around if of.bracketed.search(marked) for name in of.single.findall(names)]

    resorts: list[tuple[str, Finder]] = [("declared", called_right), ("opening", opening)]
    resorts += [("bracketed", in_brackets), ("option text", lambda t: _options_named(t, options))]
    return decide(text, find, [*resorts, ("label", find)])


_BETWEEN, _NO_WORDS_FIRST = re.compile(r"\W+"), re.compile(r"^\W+")


def _without_own_texts(text: str, options: Mapping[str, str], label: re.Pattern[str]) -> str:
    """A text without what options say behind their labels: "A. ant or B. bee" is "A or B"."""
    kept, done = [], 0
    for match in label.finditer(text):
        between = _BETWEEN.match(text, match.end())
        if between is None or match.start() < done:
            continue
        if end := _end_of(options.get(match[0], ""), text, between.end()):
            kept.append(text[done : between.end()])
            done = end
    return "".join(kept) + text[done:]


def _end_of(option: str, text: str, start: int) -> int:
    """Where an option's text ends that stands at a place of a text, whatever blanks and case; 0 if it does not.

    Marks that it begins with are left out: they stand before that place.
    """
    words = _NO_WORDS_FIRST.sub("", option).rstrip(". ").split()
    for number, word in enumerate(words):
        if number:
            there = start
            while start < len(text) and text[start].isspace():
                start += 1
            if start == there:
                return 0
        if text[start : start + len(word)].lower() != word.lower():
            return 0
        start += len(word)
    ends = start == len(text) or not (text[start].isalnum() or text[start] == "_")
    return start if words and ends else 0


def _spelled(option: str) -> str:
    """A pattern of an option's text, whatever the blanks."""
    return r"\s+".join(map(re.escape, option.rstrip(". ").split()))


def _named_choice(options: Mapping[str, str]) -> str:
    """A pattern of everything that names an option: its label, or its text."""
    labels, texts = ("|".join(map(re.escape, names)) for names in (options, filter(str.strip, options.values())))
    return rf"(?<!\w)\(?(?-i:{labels})\)?" + (rf"|(?<!\w)(?:{texts})" if texts else "")


def _with_quoted_labels(text: str, options: Mapping[str, str], label: re.Pattern[str]) -> str:
    """A text with the label in place of options whose own text holds letters, like "Both A and B" or "Vitamin A"."""
    quoting = {k: v for k, v in options.items() if label.search(v) and not label.fullmatch(v.strip(" .()"))}
    for name, option in sorted(quoting.items(), key=lambda item: -len(item[1])):
        text = re.sub(rf"(?<!\w){_spelled(option)}(?!\w)", f"({name})", text, flags=re.IGNORECASE)
    return text


def _options_named(span: str, options: Mapping[str, str]) -> list[str]:
    """Labels of the options whose text a span contains; an option inside a longer named one does not count."""
    low = " ".join(span.lower().split())
    named = {k: " ".join(v.lower().split()).rstrip(".") for k, v in options.items() if v.strip()}
    named = {k: v for k, v in named.items() if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", low)}
    return [k for k, v in named.items() if not any(v != other and v in other for other in named.values())]
