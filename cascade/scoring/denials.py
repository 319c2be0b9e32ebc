"""What an answer says it is not: stretches of a text that no reader may take a value from.

"The answer is not 5.", "It cannot be (B).", "C is wrong." name a value to rule it out. Such stretches are blanked
before an answer is read, so that they are unparsed rather than read as their opposite. Accepted harnesses do without:
their patterns take what follows "the answer is" as it stands ("not (B)", which equals no target), or the last value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BLANK = "\u2302"
"""Stands where a denial stood: neither a word, nor a digit, nor a blank."""
_PAUSE = r"[,.;:!?\n](?!\d)|\b(?:but|because|since|so|therefore|thus|hence|although|while|and\s+the|that|answer)\b"
_WITHIN = rf"(?:(?!{_PAUSE})[^\n]){{0,60}}"
_NOT = r"(?:\b(?:not|never|cannot|nor|unlikely|impossible)\b|n['’]t\b|\b(?:rather|other)\s+than\b|\binstead\s+of\b)"
_DENIALS = [
    # What somebody does not think may follow after "that" or "the answer is": to the end of the sentence.
    r"(?:\bnot|n['’]t|\bnever)\s+(?:(?:think|believe|suppose|expect|feel|agree|claim|mean)\b|(?:the\s+case|true|right)\s+that\b)"
    r"(?:(?!,?\s*\bbut\b)[^.!?\n]){0,120}",
    r"\b(?:neither|none\s+of|anything\s+but|by\s+no\s+means)\b(?:(?!\bbut\b)[^.!?;\n]){0,120}",
    rf"{_NOT}(?!\s+only\b){_WITHIN}",
]
_RULED_OUT = (
    r"\s+(?:is|are|was|would\s+be|can\s*be|must\s+be)\s*(?:clearly|obviously|definitely|certainly|also|therefore)?\s*"
    r"(?:not\b|n['’]t\b|wrong\b|incorrect\b|false\b|ruled\s+out|eliminated|excluded)|\s+(?:cannot|can['’]t|isn['’]t|is\s+no)\b"
)


def without_denials(text: str, value: str, keep: Iterable[str] = ()) -> str:
    """A text with what it denies blanked.

    Args:
        text: an answer.
        value: pattern of the values that are read; one that is said to be wrong is blanked as well.
        keep: stretches that look like denials and are none, e.g. the texts of options.
    """
    like = re.compile("|".join([_NOT, *_DENIALS]), re.IGNORECASE)
    kept = [re.escape(" ".join(k.split())).replace(r"\ ", r"\s+") for k in keep if like.search(k)]
    ruled_out = rf"(?:{value})(?={_RULED_OUT})"
    pattern = "|".join([*(f"(?P<keep{i}>{k})" for i, k in enumerate(kept)), ruled_out, *_DENIALS])
    return re.sub(pattern, lambda m: m[0] if any(m.groupdict().values()) else BLANK, text, flags=re.IGNORECASE)
