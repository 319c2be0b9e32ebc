# ruff: noqa: E501
"""Reading answers: forms as models write them, several candidates, and nothing to read."""

from __future__ import annotations

import time

import pytest

from cascade.scoring.extraction import (
    fenced_blocks,
    read_choice,
    read_code,
    read_json,
    read_list,
    read_number,
    read_text,
    read_word,
)

NUMBER_FORMS = r"""{a}
{a}.
 {a}
**{a}**
*{a}*
`{a}`
${a}$
\({a}\)
\boxed{{{a}}}
$\boxed{{{a}}}$
The answer is \boxed{{{a}}}.
\fbox is not it, but \boxed{{\text{{{a}}}}}
<answer>{a}</answer>
<answer> {a} apples </answer>
Answer: {a}
answer: {a}
ANSWER: {a}
**Answer:** {a}
**Answer: {a}**
Answer:|{a}
### Answer|{a}
The answer is {a}
The answer is {a}.
The answer is: {a}.
The answer is **{a}**.
The answer is ${a}.
The answer is {a} apples.
The answer is {a}, because 3 + 4 makes 7.
The answer to the problem is {a}.
The answer would be {a}.
the correct answer is {a}
The final answer is {a}.
Final answer: {a}
**Final Answer:** {a}
The answer is 99. Wait, no. Final answer: {a}
The result is {a}.
The solution is {a}.
So the answer is {a}.
Therefore, the answer is {a}.
Mary has 3 brothers. Therefore she has {a} sisters.
There are 2 and 5 of them. So it is {a}.
Thus, {a}.
Hence {a}
Mary has {a} sisters.
She has {a} of them
It equals {a}.
It is {a}
x = {a}
= {a}
3 + 4 = {a}
3+4={a}
The sum of 3 and 4 is {a}.
The LCM of 4 and 6 is {a}.
The next number in the sequence is {a}.
3 + 4 - 2 equals {a}
Sure! The total is {a}
{a} apples
{a} km/h
First, 3 + 4 = 7.|The answer is {a}.
Step 1: add 3 and 4.|Step 2: subtract 2.|Answer: {a}
Let's think. 3 plus 4 is 7, minus 2 is 5.|**{a}**
We get 3 * 4 = {a}"""
CHOICE_FORMS = r"""({a})
{a}
{a}.
{a})
({a}).
**{a}**
**({a})**
({a}) whale
{a}) whale
{a}. whale
{a}: whale
Answer: {a}
Answer: ({a})
answer: ({a}).
**Answer:** {a}
**Answer: ({a})**
Answer:|{a}
Answer:|({a}) whale
The answer is {a}
The answer is {a}.
The answer is ({a})
The answer is ({a}).
The answer is ({a}).
The answer is: ({a})
The answer is **{a}**.
The answer is **({a}) whale**.
The answer is option {a}.
The answer is choice ({a})
The correct answer is {a}.
The correct answer is ({a}) whale.
The correct option is ({a}).
The correct choice is {a}
The best answer is ({a}).
So the answer is ({a}).
Therefore, the answer is ({a}).
Final answer: {a}
**Final Answer:** ({a})
The final answer is \boxed{{{a}}}.
\boxed{{{a}}}
$\boxed{{\text{{{a}}}}}$
<answer>{a}</answer>
<answer>({a})</answer>
Option ({a}) is correct.
({a}) is correct.
{a} is correct
{a} is the correct answer.
{a} is the right choice
I would choose ({a}).
Let's see. Ants are small.|So the answer is ({a}).
Ants are small, so it must be|({a})
[{a}]
The answer is [{a}].
The answer would be {a}."""
WORD_FORMS = """{a}
{a}.
 {a}
**{a}**
"{a}"
{a}!
{a}, because it is so.
{a}. It follows from 1.
{a}: all birds fly.
{a} - it follows.
{a}, it logically follows.
{a}, it does.|All birds fly.
Answer: {a}
answer: {a}.
**Answer:** {a}
**Answer: {a}**
Answer:|{a}
The answer is {a}
The answer is {a}.
The answer is "{a}".
The answer is: {a}
The answer is **{a}**.
The answer would be {a}.
The correct answer is {a}.
The final answer is {a}.
Final answer: {a}
So the answer is {a}.
Therefore, the answer is {a}, it follows.
All birds fly. So {a}.
Thus, {a}.
Hence: {a}
Does it follow? {a}, clearly.
Does it logically follow? {a}.
It follows that the claim holds: {a}
\\boxed{{{a}}}
\\boxed{{\\text{{{a}}}}}
<answer>{a}</answer>
Let us see.|Birds fly.|**{a}**
I would say {a}.
My answer: {a}
`{a}`
*{a}*
In conclusion, {a}.
The result is {a}.
The answer to the question is {a}.
The answer to this problem is: {a}
Sure. {a}.
Well, {a}
{a}, that follows logically from the statements.
{a} (it follows from the first statement)"""
LIST_FORMS = """c, b, a
c,b,a
c, b, a.
[c, b, a]
(c, b, a)
['c', 'b', 'a']
"c", "b", "a"
'c, b, a'
c b a
c; b; a
**c, b, a**
`c, b, a`
Answer: c, b, a
Answer: c, b, a.
Answer:|c, b, a
**Answer:** c, b, a
The answer is c, b, a.
The answer is: c, b, a
The answer is [c, b, a].
The final answer is c, b, a.
Final answer: c, b, a
The reversed list is: c, b, a
The reversed list is c, b, a.
The reversed list of words is c, b, a
Reversed: c, b, a
Reversed list: c,b,a
Sure, here it is: c, b, a
Here is the reversed list:||c, b, a
Here is the reversed list:||c,b,a||
1. c|2. b|3. a
1) c|2) b|3) a
- c|- b|- a
* c|* b|* a
c|b|a
```|c, b, a|```
```text|c, b, a|```
\\boxed{c, b, a}
<answer>c, b, a</answer>
c, b, and a
So the list is c, b, a
The words in reverse order are: c, b, a
The words in reverse order are c, b, a."""
OPTIONS = {"A": "ant", "B": "whale", "C": "dog", "D": "cat"}


def forms(text: str) -> list[str]:
    return [line.replace("|", "\n") for line in text.splitlines()]


@pytest.mark.parametrize("form", forms(NUMBER_FORMS))
def test_numbers(form: str) -> None:
    for given, value in (("5", "5"), ("-31", "-31"), ("1,250", "1250"), ("7.5", "7.5")):
        assert read_number(form.format(a=given)).answer == value, form.format(a=given)


@pytest.mark.parametrize("form", forms(CHOICE_FORMS))
def test_choices(form: str) -> None:
    assert read_choice(form.format(a="B"), OPTIONS).answer == "B"
    other = form.replace("whale", "dog").format(a="C")
    assert read_choice(other, OPTIONS).answer == "C"


@pytest.mark.parametrize("form", forms(WORD_FORMS))
def test_words(form: str) -> None:
    for word in ("Yes", "No", "yes", "NO"):
        assert read_word(form.format(a=word), ("yes", "no")).answer == word.lower()


@pytest.mark.parametrize("form", forms(LIST_FORMS))
def test_lists(form: str) -> None:
    assert read_list(form, 3).answer == "c, b, a"
    longer = form.replace("c", "\0").replace("b", "whales").replace("\0", "the")  # ordinary words, of any length
    if "reverse" not in form.lower() and "list" not in form and "here" not in form and "boxed" not in form:
        assert read_list(longer, 3).answer == "the, whales, a"


@pytest.mark.parametrize(
    "text",
    ["3, 4, 5", "3 or 4", "The answer is 3 or 4.", "The answer is 3, 4 or 5", "Answer: 3\nAnswer: 4", "3\n4\n5",
     "**3** **4**", "It is 3. It is 4.", "\\boxed{3} \\boxed{4}", "3/4/5", "Either 3 or 5."],
)  # fmt: skip
def test_several_numbers_are_no_answer(text: str) -> None:
    reading = read_number(text)
    assert reading.answer is None
    assert reading.ambiguous


@pytest.mark.parametrize(
    "text",
    ["A, B, C, D", "(A) or (B)", "A or B", "The answer is (A) or (B).", "A) ant\nB) whale", "(A) (B) (C)",
     "Answer: A\nAnswer: B", "ant, whale", "A/B", "The answer is A, B or C."],
)  # fmt: skip
def test_several_choices_are_no_answer(text: str) -> None:
    reading = read_choice(text, OPTIONS)
    assert reading.answer is None
    assert reading.ambiguous


@pytest.mark.parametrize(
    "text", ["yes no", "Yes, No", "Yes/No", "yes or no", "No. Yes.", "Answer: yes\nAnswer: no", "Yes and no"]
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


CODE = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        f"\n\n{CODE}\n\n",
        f"```python\n{CODE}\n```",
        f"```\n{CODE}\n```",
        f"```py\n{CODE}\n```",
        f"~~~python\n{CODE}\n~~~",
        f"````python\n{CODE}\n````",
        f"Sure! Here it is:\n```python\n{CODE}\n```\nIt adds.",
        f"```python\n{CODE}",
        f"```python\n{CODE}\n```\nTest:\n```python\nprint(add(1, 2))\n```",
        f"First try:\n```python\ndef add(a, b): return 0\n```\nBetter:\n```python\n{CODE}\n```",
        f"```bash\npip install x\n```\n```python\n{CODE}\n```",
        f"Here is the code:\n{CODE}\nThis adds two numbers.",
        f"{CODE}\n\nExplanation: it adds.",
        "1. Do this:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    ],
)
def test_code(text: str) -> None:
    code = read_code(text, "add")
    assert code is not None
    space: dict[str, object] = {}
    exec(code, space)
    assert space["add"](2, 3) == 5  # type: ignore[operator]


def test_code_keeps_helpers_of_other_blocks_and_misses_what_is_not_there() -> None:
    text = "```python\nimport math\ndef two(): return 2\n```\nthen\n```python\ndef f(): return two() + math.floor(1.5)\n```"
    space: dict[str, object] = {}
    exec(read_code(text, "f") or "", space)
    assert space["f"]() == 3  # type: ignore[operator]
    assert read_code("No code here.", "add") is None
    assert read_code("```python\ndef sub(a, b): return a - b\n```", "add") is None
    assert fenced_blocks("a\n```\nb\n```\n```js\nc") == [("", "b"), ("js", "c")]


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2]}', 'Sure: {"a": [1, 2]}. Done', '```json\n{"a": [1, 2]}\n```', 'I think [x] is {"a": [1, 2]}',
     'first {} then {"a": [1, 2]}', '{"a": [1,\n 2]}\n\nNote: {braces}'],
)  # fmt: skip
def test_json(text: str) -> None:
    assert read_json(text) == {"a": [1, 2]}


def test_text_by_sign_fence_or_whole() -> None:
    assert read_text("The answer is New York.").answer == "New York"
    assert read_text("Well:\n```\n1 2\n3 4\n```").answer == "1 2\n3 4"
    assert read_text("blue whale").answer == "blue whale"
    assert read_text("Answer: a\nAnswer: b").ambiguous
    assert read_text("").answer is None


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, "(" * 50_000, "**" * 50_000, "answer is " * 20_000, "1," * 50_000, "```\n" * 20_000, "a " * 100_000],
)
def test_hostile_texts_cost_little(text: str) -> None:
    start = time.process_time()
    read_number(text), read_choice(text, OPTIONS), read_word(text, ("yes", "no")), read_list(text, 3), read_text(text)
    read_json(text), read_code(text, "add")
    assert time.process_time() - start < 3
