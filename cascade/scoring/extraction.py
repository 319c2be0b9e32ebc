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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.scoring.denials import without_denials
from cascade.scoring.fences import ANSWER_TAG, FENCE, fenced_blocks

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
    r"[\s*_`]*(?:is|are|would\s+be|will\s+be|must\s+be|should\s+be|=|:|[-–—](?=\s))[\s*_`]*:?(?!\s*not\b)"
    r"(?=(?P<span>\s*[^\n]*))",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(r"(?:^|[.!\n])\s*(?:so|therefore|thus|hence|in conclusion)\b[,:]?(?P<span>[^\n]*)", re.I)
_BOLD = re.compile(r"\*\*(?P<span>[^*\n]{1,200})\*\*|__(?P<other>[^_\n]{1,200})__")
_HASHES = re.compile(r"^####[ \t]+(?P<span>[^\n]+)\Z", re.MULTILINE)
_EQUATED = re.compile(r"^[A-Za-z]\w{0,20}[ \t]*=[ \t]*(?P<span>[^\n=]+)\Z", re.MULTILINE)
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
    stated = [m for m in _STATED.finditer(text) if not _STATED.search(m["span"])]
    final = [m["span"] for m in stated if m["final"]]
    signs = (
        ("boxed", boxed(text)),
        ("answer tag", [m["span"] for m in ANSWER_TAG.finditer(text)]),
        ("hashes", [m["span"] for m in _HASHES.finditer(text)]),
        ("final answer", final),
        ("stated", [m["span"] for m in stated if not m["final"]]),
        ("bold", [m["span"] or m["other"] for m in _BOLD.finditer(text)]),
        ("last line", [m["span"] for m in _EQUATED.finditer(text)]),
        ("conclusion", [m["span"] for m in _CONCLUSION.finditer(text)][-1:]),
    )
    yield from ((how, [_clean(s) for s in spans]) for how, spans in signs if spans)


def _clean(span: str) -> str:
    """Without Markdown and TeX marks around it."""
    return re.sub(r"\*\*|__|`|\\[()\[\]]|\\?\$", "", span).replace("\\%", "%").strip()


def first_sentence(span: str) -> str:
    """Up to the first full stop that ends a sentence (not the point of a number)."""
    end = _SENTENCE_END.search(span)
    return span[: end.start()] if end else span


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _decide(text: str, find: Finder, last_resort: Iterable[tuple[str, Finder]]) -> Reading:
    """The strongest sign whose spans name a value; then the last resorts, each over the whole text."""
    text = text[-MAX_CHARS:].strip()
    for how, spans in marked_spans(text):
        values = _distinct(value for span in spans for value in find(span))
        if values:
            return Reading(values[0] if len(values) == 1 else None, how, values)
    for how, finder in last_resort:
        values = _distinct(finder(text))
        if values:
            return Reading(values[0] if len(values) == 1 else None, how, values)
    return NOTHING


# ------------------------------------------------------------------------------------------------- numbers

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
NUMBER = re.compile(rf"[-+]?{_DIGITS}")
"""What is all of a text that is a number."""
_NUMBER = re.compile(rf"(?<![\w.])(?:[-+−–]\s?(?=[\d$€£.]))?[$€£]?{_DIGITS}(?![\w]*\d)")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,;:! ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
"""What TeX, and texts that will not break a line there, put between groups of digits."""
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d.$€£])", re.IGNORECASE)
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()  # noqa: SIM905
_NUMBER_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b", re.IGNORECASE)
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
    if "=" in sentence:
        sentence = sentence.rsplit("=", 1)[1]
    values = numbers(sentence)
    lead = _NUMBER.search(sentence)
    if len(set(values)) > 1 and lead and not re.search(r"\w", sentence[: lead.start()]):
        listing = re.match(r"\s*(?:[,/|&;]|or\b|and\b|to\b)*\s*(?:or\b|and\b)?\s*[-+$]?\d", sentence[lead.end() :])
        return values if listing else values[:1]
    return values


def _closing_numbers(text: str) -> list[str]:
    """Numbers that close a sentence after "is", "=" or ":", e.g. "The LCM of 4 and 6 is 12."."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", _clean(text)):
        match = _CLOSING_VALUE.search(sentence.rstrip(" .!?"))
        values = numbers(match["span"]) if match and len(match["span"].split()) <= 4 else []
        if len(set(values)) == 1:
            found.append(values[0])
    return found


def _last_equation(text: str) -> list[str]:
    """The right side of an equation that is all of the last line, e.g. "38 - 69 = -31"."""
    last = _clean(text).rpartition("\n")[2].rstrip(" .")
    values = numbers(last.rsplit("=", 1)[1]) if re.fullmatch(r"[\d\s+\-*/×÷^().,−–=]+", last) and "=" in last else []
    return values if len(values) == 1 else []


def read_number(text: str) -> Reading:
    """A number, from "5", "Mary has 5 sisters.", "The answer is **5**", "12 + 3 = 15", "$1,250.00"."""
    text = _MINUS.sub("-", _THOUSANDS.sub(",", text[-MAX_CHARS:]))
    text = without_denials(text, _NUMBER.pattern)
    resorts = [("equation", _last_equation), ("whole text", _only_number), ("closing", _closing_numbers)]
    return _decide(text, _number_in, [*resorts, ("whole text", lambda t: numbers(_clean(t)))])


def _only_number(text: str) -> list[str]:
    values = _distinct(numbers(_clean(text)))
    return list(values) if len(values) == 1 else []


# ------------------------------------------------------------------------------------------- words and choices


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
        rest = re.sub(r"[\W_]+|\b(?:or|and)\b", " ", whole.lstrip("*_`\"' \n")[opening.end() :]) if opening else ""
        only_words = bool(rest.strip()) and not pattern.sub("", rest).strip()
        return [opening[0].lower()] if opening and not only_words else []

    return _decide(
        text, find, [("leading", leading), ("whole text", lambda t: [m.lower() for m in pattern.findall(t)])]
    )


_LETTER = r"(?:\(\s*{0}\s*\)|\[\s*{0}\s*\]|(?<![\w'’]){0}(?![\w'’]))"


def read_choice(text: str, options: Mapping[str, str]) -> Reading:
    """The label of a multiple-choice answer, from "(B)", "B.", "The answer is b)", or the option's own text.

    Args:
        text: the answer.
        options: label ("A") to the option's text; texts may be empty where only labels are known.
    """
    labels = "|".join(re.escape(label) for label in options)
    letter = re.compile(_LETTER.format(f"({labels})").replace(f"({labels})", f"(?:{labels})"))
    bracketed = re.compile(rf"\(\s*({labels})\s*\)")
    by_upper = {label.upper(): label for label in options}
    text = without_denials(text[-MAX_CHARS:], _named_choice(options), options.values())

    def find(span: str) -> list[str]:
        opening = re.match(rf"\W*({labels})(?:\W|$)", span, re.IGNORECASE)
        if opening and not re.match(r"\W*[aAiI]\s+[a-z]", span) and not _lists_labels(span, options):
            return [by_upper[opening[1].upper()]]
        articles = set() if _lists_labels(span, options) else {"A", "I"}
        found = [m.strip("()[] ") for m in letter.findall(span) if m not in articles]
        found += [m for m in bracketed.findall(span) if m not in found]
        return found or _options_named(span, options)

    line_opening = re.compile(rf"^[\s*_`\"']*(?:\(\s*({labels})\s*\)|({labels})(?=[.):*\s]*$|[.):]))", re.MULTILINE)
    declared = re.compile(rf"(?<!\w)\(?({labels})\)?\s+is\s+(?:the\s+)?(?:correct|right|best|true|answer)\b")

    def opening(whole: str) -> list[str]:
        lines = [m[1] or m[2] for m in line_opening.finditer(whole)]
        return lines if line_opening.match(whole) and not _lists_labels(whole, options) else []

    resorts: list[tuple[str, Finder]] = [("declared", declared.findall), ("opening", opening)]
    resorts += [("bracketed", bracketed.findall), ("option text", lambda t: _options_named(t, options))]
    return _decide(text, find, [*resorts, ("label", find)])


def _named_choice(options: Mapping[str, str]) -> str:
    """A pattern of everything that names an option: its label, or its text."""
    labels, texts = ("|".join(map(re.escape, names)) for names in (options, filter(str.strip, options.values())))
    return rf"(?<!\w)\(?(?-i:{labels})\)?" + (rf"|(?<!\w)(?:{texts})" if texts else "")


def _lists_labels(span: str, options: Mapping[str, str]) -> bool:
    """Whether a span opens with several labels: "A, B or C", "(A)(B)", or each before its option, "A. ant B. dog"."""
    labels = "|".join(re.escape(label) for label in options)
    first = re.match(rf"\W*(?P<label>{labels})(?P<mark>\W+)", span)
    if first is None:
        return False
    own = options[first["label"]].strip()
    rest, mark = span[first.end() :], first["mark"]
    if own and rest.lower().startswith(own.lower()):
        rest, mark = rest[len(own) :], ", "
    second = re.match(rf"(?P<more>\W*(?:or\b|and\b)?\W*)(?P<label>{labels})(?:\W|$)", rest)
    apart = second is not None and re.search(r"[,/|&)\]\s]|or|and", mark + second["more"])
    return bool(second and apart and second["label"] != first["label"])


def _options_named(span: str, options: Mapping[str, str]) -> list[str]:
    """Labels of the options whose text a span contains; an option inside a longer named one does not count."""
    low = " ".join(span.lower().split())
    named = {k: " ".join(v.lower().split()).rstrip(".") for k, v in options.items() if v.strip()}
    named = {k: v for k, v in named.items() if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", low)}
    return [k for k, v in named.items() if not any(v != other and v in other for other in named.values())]


# ------------------------------------------------------------------------------------------------ lists and text


def list_items(span: str) -> list[str]:
    """The items of "a, b, c", "[a, b, c]", "'a' 'b' 'c'" or "a b c"."""
    bare = _clean(span).strip(" \t\n*").rstrip(".!").strip("[](){} \t\n")
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

    return _decide(text, find, [("whole text", lines)])


def read_text(text: str) -> Reading:
    """A short free answer: what a sign points at (up to the end of its line), a fenced block, or the whole text."""
    text = text[-MAX_CHARS:].strip()
    for how, spans in marked_spans(text):
        if how in {"bold", "last line", "conclusion"}:
            continue
        values = _distinct(span.strip().rstrip(".").strip("\"'") for span in spans if span.strip())
        if values:
            return Reading(values[0] if len(values) == 1 else None, how, values)
    blocks = _distinct(body.strip() for _, body in fenced_blocks(text) if body.strip())
    if blocks:
        return Reading(blocks[0] if len(blocks) == 1 else None, "fenced", blocks)
    whole = _clean(text).strip("\"'")
    return Reading(whole, "whole text", (whole,)) if whole else NOTHING
