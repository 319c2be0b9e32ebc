"""Reading the label of a multiple-choice answer: all letters alike, and no answer where several are given.

Labels with nothing but a hedge between them ("A or B", "B, but maybe C", "both A and D") are several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def read_choice(text: str, options: Mapping[str, str]) -> Reading:
    """The label of a multiple-choice answer, from "(B)", "B.", "The answer is b)", or the option's own text.

    Args:
        text: the answer.
        options: label ("A") to the option's text; texts may be empty where only labels are known.
    """
    labels = "|".join(map(re.escape, options))
    label = rf"(?<!\w)(?<!\w['’])(?:(?!{_WORD}){_NAMED})(?:{labels})(?!\w|['’]\w|-(?-i:[a-z]))"
    own = [rf"(?:{re.escape(k)}(?:\W+{_spelled(v)}(?!\w))?)" if v.strip() else re.escape(k) for k, v in options.items()]
    item = rf"(?={label})(?:{'|'.join(own)})"
    listed = rf"{item}(?:(?:[\W_]|(?i:\b(?:{HEDGE})\b))++{item}){{0,25}}+"
    single, group, opening_group = re.compile(label), re.compile(listed), re.compile(rf"\W*(?P<labels>{listed})")
    too = re.compile(rf"{label}(?={_TOO})|(?:{_SO_IS}({label}))")
    by_upper = {name.upper(): name for name in options}
    text = without_denials(text[-MAX_CHARS:], _named_choice(options), options.values())
    text = _with_quoted_labels(text, options, single)

    def find(span: str) -> list[str]:
        if start := opening_group.match(span):
            return single.findall(start["labels"]) + [m[1] or m[0] for m in too.finditer(span)]
        if start := re.match(opening_group.pattern, span, re.IGNORECASE):
            return [by_upper[m.upper()] for m in re.findall(label, start["labels"], re.IGNORECASE)]
        return single.findall(span) or _options_named(span, options)

    line_opening = re.compile(rf"^[\s*_`\"']*(?:\(\s*({labels})\s*\)|({labels})(?=[.):*\s]*$|[.):]))", re.MULTILINE)
    bracketed = re.compile(rf"\(\s*({labels})\s*\)")
    declared = re.compile(rf"(?P<labels>{listed})\W?\s+(?:is|are)\s+{_ALL}(?:correct|right|best|true|answers?)\b")

    def called_right(whole: str) -> list[str]:
        names = [name for m in declared.finditer(whole) for name in single.findall(m["labels"])]
        return names + [m[1] for m in too.finditer(whole) if names and m[1]]

    def opening(whole: str) -> list[str]:
        start = opening_group.match(whole) if line_opening.match(whole) else None
        return (
            [*single.findall(start["labels"]), *(m[1] or m[2] for m in line_opening.finditer(whole))] if start else []
        )

    def in_brackets(whole: str) -> list[str]:
        around = [(m[0], whole[max(0, m.start() - 2) : m.end() + 2]) for m in group.finditer(whole)]
        return [name for names, marked in around if bracketed.search(marked) for name in single.findall(names)]

    resorts: list[tuple[str, Finder]] = [("declared", called_right), ("opening", opening)]
    resorts += [("bracketed", in_brackets), ("option text", lambda t: _options_named(t, options))]
    return decide(text, find, [*resorts, ("label", find)])


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
