"""Reading answers: forms as models write them, several candidates, and nothing to read."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from answer_forms import CHOICES, LISTS, NUMBERS, WORDS, code_forms, forms, json_forms
from text_forms import TEXTS, bbh_forms

from cascade.benchmarks.bbh import read_answer
from cascade.scoring.extraction import read_choice, read_list, read_number, read_text, read_word
from cascade.scoring.fences import fenced_blocks, read_code, read_javascript, read_json

OPTIONS = {"A": "ant", "B": "whale", "C": "dog", "D": "cat"}


def wrong(forms: list[str], read: Callable[[str], object], expected: object) -> list[str]:
    return [form for form in forms if read(form) != expected]


def test_each_corpus_has_a_hundred_forms() -> None:
    corpora = [forms(text) for text in (NUMBERS, CHOICES, WORDS, LISTS, TEXTS)]
    corpora += [bbh_forms(text) for text in (NUMBERS, CHOICES, WORDS)]
    assert min(map(len, [*corpora, code_forms(), json_forms()])) >= 100


@pytest.mark.parametrize(("given", "value"), [("5", "5"), ("-31", "-31"), ("1,250", "1250"), ("7.5", "7.5")])
def test_numbers(given: str, value: str) -> None:
    filled = [form.format(a=given) for form in forms(NUMBERS)]
    assert wrong(filled, lambda text: read_number(text).answer, value) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [(".5", ".5"), ("The answer is -.5.", "-.5"), ("It is 1.5e3.", "1.5e3"), ("x = 2E-5", "2E-5"), ("12em", "12"),
     (r"\boxed{1{,}000}", "1000"), (r"The answer is $12\,345\,678$.", "12345678"), (r"\boxed{1,\!000}", "1000"),
     ("The sum is 3+4=7.", "7"),
     ("1\u202f000\u202f000", "1000000"), ("1\u00a0000", "1000"), ("It is minus 3.", "-3"), ("negative 3", "-3")],
)  # fmt: skip
def test_numbers_as_they_are_typeset_and_said(text: str, value: str) -> None:
    assert read_number(text).answer == value


HEADINGS = (
    "**Solution:**\n\n",
    "Solution:\n",
    "### Solution:\n\nStep 1: ",
    "To find the answer:\n\n",
    "The result:\n1. ",
)
ENDS = (
    "The answer is 17.",
    "**Answer:** 17",
    "So there are 17 apples.",
    "**17**",
    "Final Answer:\n17",
    "Answer:\n\n17",
)


@pytest.mark.parametrize("heading", HEADINGS)
@pytest.mark.parametrize("end", ENDS)
def test_what_a_heading_announces_is_the_way_to_the_answer(heading: str, end: str) -> None:
    working = "Mary has 3 boxes of 4 apples.\n3 * 4 = 12\n12 + 5 = 17\n\n"
    assert read_number(f"{heading}{working}{end}").answer == "17"


@pytest.mark.parametrize("end", [end.replace("17", "B") for end in ENDS if "apples" not in end])
def test_options_that_are_gone_through_are_not_chosen(end: str) -> None:
    options = "(A) It is 12, so it is wrong.\n(B) It is 17, so it is right.\n(C) It is 5."
    text = f"Let us look at each option:\n\n{options}\n\n{end}"
    assert read_choice(text, dict.fromkeys("ABC", "")).answer == "B"


@pytest.mark.parametrize(
    "text", ["Answer:\n17\n\nExplanation: 12 + 5.", "**The answer:**\n\n17 apples\n\nI took 12 and 5."]
)
def test_an_answer_may_stand_below_its_heading_and_its_reasons_behind_it(text: str) -> None:
    assert read_number(text).answer == "17"


@pytest.mark.parametrize("heading", ["Answer:", "**Correct option:**\n", "The right choice:", "### Best answer:"])
def test_a_choice_may_stand_below_its_heading_and_its_reasons_behind_it(heading: str) -> None:
    text = f"{heading}\n(B) whale\n\nThe others, (A), (C) and (D), are land animals."
    assert read_choice(text, OPTIONS).answer == "B"


@pytest.mark.parametrize(
    "text",
    [
        "- 42",
        "Answer:\n- 42",
        "Here it is:\n\n- 42",
        "Total apples - 42",
        "* 42",
        "1. 42",
        "The answer is:\n1. 42",
        "• 42",
    ],
)
def test_marks_of_lists_and_dashes_are_no_minus(text: str) -> None:
    assert read_number(text).answer == "42"


@pytest.mark.parametrize("text", ["-42", "The answer is - 42", "x = - 42", "The answer is −42.", "12 - 54 = -42"])
def test_a_minus_is_one(text: str) -> None:
    assert read_number(text).answer == "-42"


@pytest.mark.parametrize(
    "text",
    ["The answer is x = 7 or x = 8.", "The answer is x = 7 or maybe x = 8", r"\boxed{x = 7 \text{ or } x = 8}",
     "So x = 7 or x = 8", "The answer is n = 7, n = 8, or n = 9", "x = 7, x = 8", "It is a = 7 or b = 8."],
)  # fmt: skip
def test_several_equations_are_no_answer(text: str) -> None:
    assert read_number(text).ambiguous


@pytest.mark.parametrize(
    "text",
    ["The answer is x = 4, so 2x = 8", "The answer is x = 3 + 5 = 8", "Either x = 7 or x = 8. As 7 is odd, x = 8.",
     "So x = 8 and x = 8"],
)  # fmt: skip
def test_equations_that_lead_to_one_another_are_one_answer(text: str) -> None:
    assert read_number(text).answer == "8"


@pytest.mark.parametrize(("label", "option"), [("B", "whale"), ("C", "dog"), ("D", "cat")])
def test_choices(label: str, option: str) -> None:
    filled = [form.replace("whale", option).replace("Whale", option.title()).format(a=label) for form in forms(CHOICES)]
    assert wrong(filled, lambda text: read_choice(text, OPTIONS).answer, label) == []


LETTERS = {letter: f"animal{number}" for number, letter in enumerate("ABCDEFGHIJKLMNOPQR")}
"""As many options as BIG-Bench Hard has."""
USUAL = r"""Option {a}|Option {a} because it flies|It is {a}.|It's {a}.|It is '{a}'.|It must be {a}.
It has to be {a}.|I choose {a}.|I pick {a}.|I'd go with {a}.|I would choose {a}|I think {a}|I think it is {a}
I believe it is {a}.|My choice is {a}.|The answer is option {a}.|The answer is probably {a}.
The answer is clearly {a}.|The answer is '{a}'.|Choose {a}|The answer is {a}, as it flies.
The answer is {a} as it flies.|The answer is {a} for two reasons.|The letter is {a}|{a} because it has six legs
{a}, because it has six legs|{a} since it flies.|{a} as it flies|{a} is right.|{a}, I think.
{a} is the best answer because it flies|{a} - it flies|{a} for that reason|So it must be {a}.|So {a}|Probably {a}.
Therefore {a} is the answer|{a} fits best.|{a} seems right|The one that fits is {a}|Option {a} is the one that flies"""
HEDGES = r"""The answer is either {a} or {b}.|Both {a} and {b}|Options {a} and {b} are both correct.
It could be {b} or {a}.|The answer is both {a} and {b}.|{a} or {b}|{a}, {b}|{a} and {b}|{a} or maybe {b}
{a} (or {b})|{a}, possibly {b}|{a} & {b}|{a}/{b}|({a}) or {b}|It is ({a}) or {b}.|It is {a} or ({b}).
The answer is ({a}) or {b}|The answer is {a}, or possibly {b}.|The answer is {a}, but it could be {b}.
The answer is {a}, but {b} is also possible.|The answer is {a}. Or maybe {b}.|{a} and {b} are correct.
{a} or {b} is correct.|{a} is correct and {b} is also correct.|{a} is right, and so is {b}.|I choose {a} and {b}.
I think {a} or {b}|Option {a} or option {b}|The answer is option {a} or option {b}|**{a}** or **{b}**
{a} as well as {b}|The answer is {a} or the answer is {b}.|{a} then {b}|{a}; {b}|{a}. Alternatively, {b}.
Maybe {a}, maybe {b}.|The answer is {a}; {b} is equally right|Final answer: {a}, perhaps {b}
I would say {a}, though it could be {b}."""


@pytest.mark.parametrize("form", re.split(r"[|\n]", USUAL))
def test_every_letter_is_read_in_the_usual_wordings(form: str) -> None:
    for options in (OPTIONS, LETTERS):
        assert {k: read_choice(form.format(a=k), options).answer for k in options} == {k: k for k in options}
    lettered = "Q?\n" + "\n".join(f"({k}) {v}" for k, v in LETTERS.items())
    assert {k: read_answer(form.format(a=k), f"({k})", lettered) for k in LETTERS} == {k: f"({k})" for k in LETTERS}


@pytest.mark.parametrize("form", re.split(r"[|\n]", HEDGES))
def test_no_two_letters_pass_as_one(form: str) -> None:
    for a, b in itertools.permutations(LETTERS, 2):
        for options in (OPTIONS, LETTERS) if {a, b} <= set(OPTIONS) else (LETTERS,):
            assert read_choice(form.format(a=a, b=b), options).answer is None, (a, b)
    lettered = "Q?\n" + "\n".join(f"({k}) {v}" for k, v in LETTERS.items())
    for a, b in itertools.permutations("ABIR", 2):
        assert read_answer(form.format(a=a, b=b), f"({a})", lettered) not in (f"({a})", a), (a, b)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A cat is what it is.", "D"),
        ("A dog is a mammal. The answer is C.", "C"),
        ("The answer is A dog.", "C"),
        ("I think the answer is C", "C"),
        ("I would say a cat", "D"),
        ("the answer is a because it is small", "A"),
        ("a", "A"),
        ("the answer is a or b", None),
        ("C. A hint: it barks.", "C"),
    ],
)
def test_articles_and_pronouns_are_told_from_labels(text: str, label: str | None) -> None:
    assert read_choice(text, OPTIONS).answer == label
    assert read_choice("I like the whale.", LETTERS | {"B": "whale"}).answer == "B"


def test_options_that_hold_letters_themselves_are_read() -> None:
    options = {"A": "Vitamin C", "B": "A for loop", "C": "Both A and B", "D": "Neither A nor B"}
    for label, text in options.items():
        for form in ("{t}", "The answer is {t}.", "{k}. {t}", "The answer is ({k}) {t}.", "I would say {t}."):
            assert read_choice(form.format(k=label, t=text), options).answer == label, form
    assert read_choice("A and B", options).answer is None


@pytest.mark.parametrize("word", ["Yes", "No", "yes", "NO"])
def test_words(word: str) -> None:
    filled = [form.format(a=word) for form in forms(WORDS)]
    assert wrong(filled, lambda text: read_word(text, ("yes", "no")).answer, word.lower()) == []


@pytest.mark.parametrize("items", ["c b a", "the whales swim", "and 12 or"])
def test_lists(items: str) -> None:
    names = dict(zip("cba", items.split(), strict=True))
    filled = [re.sub(r"\b[abc]\b", lambda m: names[m[0]], form.format()) for form in forms(LISTS)]
    assert wrong(filled, lambda text: read_list(text, 3).answer, ", ".join(items.split())) == []


@pytest.mark.parametrize("given", ["New York", "42nd Street", "blue whale"])
def test_texts(given: str) -> None:
    filled = [form.format(a=given) for form in forms(TEXTS)]
    assert wrong(filled, lambda text: read_text(text).answer, given) == []


@pytest.mark.parametrize(
    ("corpus", "given", "target"),
    [(CHOICES, "B", "(B)"), (WORDS, "No", "No"), (WORDS, "yes", "yes"), (NUMBERS, "-31", "-31"), (NUMBERS, "24", "24")],
)
def test_bbh_answers(corpus: str, given: str, target: str) -> None:
    question = "Q?\nOptions:\n(A) ant\n(B) whale\n(C) dog\n(D) cat"

    def read(text: str) -> str:
        return (read_answer(text, target, question) or "").strip("\"'").removesuffix(".").lower()

    assert wrong([form.format(a=given) for form in bbh_forms(corpus)], read, target.lower()) == []


def test_bbh_choices_after_the_words_that_state_them() -> None:
    question = "Q?\nOptions:\n(A) ant\n(B) whale"
    for text in ("The answer is B.", "So the answer is **B**.", "The answer is Option B", "the answer is whale.",
                 r"The answer is \boxed{B}", "the answer is (b)."):  # fmt: skip
        assert read_answer(text, "(B)", question) == "(B)", text
    for text in ("The answer is (A) or (B).", "The answer is A or B.", "The answer is A."):
        assert read_answer(text, "(B)", question) != "(B)", text


DENIALS = """The answer is not {a}.|The answer is not {a}|the answer is definitely not {a}
The answer is certainly not {a}.
The answer isn't {a}.|The answer isn’t {a}|The answer cannot be {a}|The answer can't be {a}.|The answer is never {a}.
It is not {a}.|It cannot be {a}.|Not {a}.|not {a}|{a} is not the answer.|{a} is wrong.
{a} is incorrect|{a} isn't right.
I don't think the answer is {a}.|I do not believe it is {a}.|I would not say {a}.|It is anything but {a}.
The final answer is not {a}.|So the answer is not {a}.|So it is not {a}.|Therefore, not {a}.|**Not {a}**|Answer: not {a}
The correct answer is not {a}, I am sure.|The answer would not be {a}.|The answer should not be {a}.
The answer is other than {a}.|It is unlikely to be {a}.|By no means {a}.|The result is not equal to {a}.
First I add.\nThe answer is not {a}.|{a} cannot be the answer.|It is not the case that the answer is {a}."""


@pytest.mark.parametrize("form", re.split(r"[|\n]", DENIALS.replace("\\n", "\r")))
def test_what_is_ruled_out_is_no_answer(form: str) -> None:
    form = form.replace("\r", "\n")
    assert read_number(form.format(a="5")).answer is None
    for label in ("B", "(B)", "the whale"):
        assert read_choice(form.format(a=label), OPTIONS).answer is None
    assert read_word(form.format(a="yes"), ("yes", "no")).answer is None
    assert read_answer(form.format(a="(B)"), "(B)", "Q?\nOptions:\n(A) ant\n(B) whale") != "(B)"


def test_a_denial_hides_nothing_else() -> None:
    assert read_number("It is not 5, so the answer is 6.").answer == "6"
    assert read_number("It's not hard to see that the answer is 6.").answer == "6"
    assert read_number("The answer is 6, not 5.").answer == "6"
    assert read_choice("B cannot be right, so the answer is (C).", OPTIONS).answer == "C"
    assert read_choice("A is wrong. B is wrong. So C.", OPTIONS).answer == "C"
    assert read_choice("It does not change.", {"A": "It does not change.", "B": "It melts."}).answer == "A"
    assert read_choice("The answer is not red", {"A": "red", "B": "not red"}).answer == "B"
    negative = {"A": "red", "B": "neither", "C": "None of the above"}
    assert read_choice("None of the above", negative).answer == "C"
    assert read_choice("The answer is none of the above.", negative).answer == "C"
    assert read_word("It does not follow, so no.", ("yes", "no")).answer == "no"
    assert read_word("The argument is not valid.", ("valid", "invalid")).answer is None


@pytest.mark.parametrize(
    "text",
    ["3, 4, 5", "3 or 4", "The answer is 3 or 4.", "The answer is 3, 4 or 5", "Answer: 3\nAnswer: 4", "3\n4\n5",
     "**3** **4**", "It is 3. It is 4.", "\\boxed{3} \\boxed{4}", "3/4/5", "Either 3 or 5.",
     "The answer is 7 or maybe 8", "The answer is 7 (or 8)", "The answer is 7, possibly 8", "7 (or 8)", "7, possibly 8",
     "The answer is 7, but it could be 8.", "The answer is 7. Or maybe 8.", "Answer: 7 apples, or maybe 8",
     "The answer is 7%, perhaps 8%", "The answer is 7 or the answer is 8."],
)  # fmt: skip
def test_several_numbers_are_no_answer(text: str) -> None:
    reading = read_number(text)
    assert reading.answer is None
    assert reading.ambiguous


@pytest.mark.parametrize(
    "text",
    ["A, B, C, D", "(A) or (B)", "A or B", "The answer is (A) or (B).", "A) ant\nB) whale", "(A) (B) (C)",
     "Answer: A\nAnswer: B", "ant, whale", "A/B", "The answer is A, B or C.", "A. ant B. whale C. dog D. cat",
     "(A)(B)(C)(D)", "(A) ant (B) whale (C) dog (D) cat", "A) ant, B) whale", "A: ant | B: whale",
     "**A.** ant **B.** whale",
     "The answer is A. ant B. whale", "Which? A. ant B. whale C. dog D. cat"],
)  # fmt: skip
def test_several_choices_are_no_answer(text: str) -> None:
    reading = read_choice(text, OPTIONS)
    assert reading.answer is None
    assert reading.ambiguous


@pytest.mark.parametrize(
    "text",
    [
        "yes no",
        "Yes, No",
        "Yes/No",
        "yes or no",
        "No. Yes.",
        "Answer: yes\nAnswer: no",
        "Yes and no",
        "Yes, or maybe no",
    ],
)
def test_yes_and_no_are_no_answer(text: str) -> None:
    assert read_word(text, ("yes", "no")).ambiguous


@pytest.mark.parametrize("text", ["", "   ", "I cannot say.", "...", "?", "```\n```"])
def test_nothing_to_read(text: str) -> None:
    assert read_number(text).answer is None
    assert not read_number(text).ambiguous
    assert read_word(text, ("yes", "no")).answer is None
    assert text.startswith("I") or read_list(text, 3).answer is None


def test_articles_and_options_within_options_are_not_taken_for_labels() -> None:
    assert read_choice("A cat", OPTIONS).answer == "D"
    assert read_choice("I think it is a dog.", OPTIONS).answer == "C"
    nested = {"A": "red", "B": "dark red"}
    assert read_choice("It is dark red.", nested).answer == "B"


def sum_by(text: str) -> object:
    space: dict[str, Any] = {}
    exec(read_code(text, "add") or "", space)
    return space["add"](2, 3) if "add" in space else None


def test_code() -> None:
    assert wrong(code_forms(), sum_by, 5) == []


def test_code_keeps_helpers_of_other_blocks_and_misses_what_is_not_there() -> None:
    helper = "```python\nimport math\ndef two(): return 2\n```"
    text = f"{helper}\nthen\n```python\ndef f(): return two() + math.floor(1.5)\n```"
    space: dict[str, object] = {}
    exec(read_code(text, "f") or "", space)
    assert space["f"]() == 3  # type: ignore[operator]
    listed = text.replace("\n", "\n   ").replace("```python", "1. Step:\n\n   ```python")
    assert read_code(listed, "f") == read_code(text, "f")
    with_constants = text.replace("import math", 'import math\nONE: int = 1\n"""Of all."""').replace("2\n", "1 + ONE\n")
    exec(read_code(with_constants, "f") or "", space := {})
    assert space["f"]() == 3  # type: ignore[operator]
    assert read_code(text.replace("import math", "print(f())"), "f") == "def f(): return two() + math.floor(1.5)"
    assert read_code("No code here.", "add") is None
    assert read_code("```python\ndef sub(a, b): return a - b\n```", "add") is None
    assert fenced_blocks("a\n```\nb\n```\n```js\nc") == [("", "b"), ("js", "c")]


def test_a_fence_in_a_docstring_closes_no_block() -> None:
    code = 'def add(a, b):\n    """Adds.\n\n    ```\n    add(2, 3)\n    ```\n    """\n    return a + b'
    assert read_code(f"```python\n{code}\n```\nDone.", "add") == code
    assert fenced_blocks("  ```\n  a\n   ```") == [("", "  a")]


@pytest.mark.parametrize("text", ["Here:\n\n    {}\n\nIt adds.", "\t{}", "```python3.11\n{}\n```"])
def test_code_indented_or_of_a_version(text: str) -> None:
    margin = text.split("{}")[0].rpartition("\n")[2]
    assert sum_by(text.format(f"def add(a, b):\n{margin}    return a + b")) == 5


JAVASCRIPT = "function add(a, b) {\n  return a + b;\n}"


@pytest.mark.parametrize(
    "text",
    [
        JAVASCRIPT,
        f"```javascript\n{JAVASCRIPT}\n```",
        f"Sure:\n```js\n{JAVASCRIPT}\n```\nIt adds.",
        f"```\n{JAVASCRIPT}\n```",
        "```js\nconst add = (a, b) => a + b;\n```",
        "const add = (a, b) => a + b",
        "```js\nmodule.exports = { add: (a, b) => a + b };\n```",
        f"```js\nconst two = 2;\n```\nand\n```js\n{JAVASCRIPT}\n```",
        f"```js\n{JAVASCRIPT}\n```\nUse it:\n```js\nif (add(1, 2) === 3) {{ console.log(add(1, 2)); }}\n```",
        f"```js\nexport {JAVASCRIPT}\n```",
        f"export default {JAVASCRIPT}",
        "```js\nclass Sums {}\nSums.add = function (a, b) { return a + b };\nexport { Sums };\n```",
    ],
)
def test_javascript(text: str) -> None:
    code = read_javascript(text, "add")
    assert code is not None
    assert "a + b" in code
    assert "```" not in code
    assert "export " not in code
    assert "console" not in code
    assert ("const two" in code) == ("const two" in text)


def test_no_javascript() -> None:
    assert read_javascript("I would add them.", "add") is None
    assert read_javascript("```js\nfunction sub(a, b) { return a - b }\n```", "add") is None
    assert read_javascript("```python\ndef add(a, b): return a\n```", "add") is None


def test_json() -> None:
    assert wrong(json_forms(), read_json, {"a": [1, 2]}) == []
    assert read_json('I think [x] is {"a": [1,\n 2]}\n\nNote: {braces}') == {"a": [1, 2]}


def test_text_by_sign_fence_or_whole() -> None:
    assert read_text("The answer is New York.").answer == "New York"
    assert read_text("Well:\n```\n1 2\n3 4\n```").answer == "1 2\n3 4"
    assert read_text(r"So it is $\boxed{\dfrac{1}{2}}$.").answer == "1/2"
    assert read_text("blue whale").answer == "blue whale"
    assert read_text("Answer: a\nAnswer: b").ambiguous
    assert read_text("").answer is None


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, "(" * 50_000, "**" * 50_000, "answer is " * 20_000, "1," * 50_000, "```\n" * 20_000, "a " * 100_000,
     "The answer is" + "\n" * 100_000, "The answer is x = 1" + ",000" * 20_000, "x = 1 or " * 20_000,
     "answer:\n" * 20_000,
     "\n**" + "a" * 100_000, "- \n" * 20_000],
)  # fmt: skip
def test_hostile_texts_cost_little(text: str) -> None:
    start = time.process_time()
    read_number(text), read_choice(text, OPTIONS), read_word(text, ("yes", "no")), read_list(text, 3), read_text(text)
    read_json(text), read_code(text, "add")
    assert time.process_time() - start < 3
