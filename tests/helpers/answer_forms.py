r"""Forms in which models write answers: at least a hundred per kind. "|" stands for a line break, {a} for the answer.

What chat models write when they are asked for one number, one letter, one word, a list, a function, or JSON: with
and without reasoning, marked with \boxed, tags, bold, headings or fences, with and without a full stop.
"""

from __future__ import annotations

import itertools

NUMBERS = r"""{a}
{a}.
 {a}
**{a}**
*{a}*
`{a}`
${a}$
\({a}\)
\[{a}\]
\boxed{{{a}}}
$\boxed{{{a}}}$
$$\boxed{{{a}}}$$
\[\boxed{{{a}}}\]
The answer is \boxed{{{a}}}.
The final answer is $\boxed{{{a}}}$. I hope it is correct.
Final Answer: The final answer is ${a}$. I hope it is correct.
\fbox is not it, but \boxed{{\text{{{a}}}}}
<answer>{a}</answer>
<answer> {a} apples </answer>
<answer>|{a}|</answer>
<think>3 and 4 make 7</think>|<answer>{a}</answer>
Answer: {a}
answer: {a}
ANSWER: {a}
Answer - {a}
Answer = {a}
**Answer:** {a}
**Answer: {a}**
**Answer**: {a}
Answer:|{a}
Answer:||{a}
### Answer|{a}
### Answer:|{a}
## Final Answer||{a}
#### {a}
3 + 4 = 7|7 - 2 is less.|#### {a}
The answer is {a}
The answer is {a}.
The answer is {a}!
The answer is: {a}.
The answer is **{a}**.
The answer is `{a}`.
The answer is ${a}.
The answer is {a} apples.
The answer is {a} (in total).
The answer is {a}, because 3 + 4 makes 7.
The answer is {a} because 3 + 4 makes 7.
The answer is therefore {a}.
The answer to the problem is {a}.
The answer to your question is {a}.
The answer to this is {a}.
The answer would be {a}.
The answer should be {a}.
the correct answer is {a}
The correct answer is: {a}
The final answer is {a}.
The final answer is: {a}
My final answer is {a}.
My answer is {a}.
Our answer is {a}.
Final answer: {a}
final answer: {a}.
**Final Answer:** {a}
**Final Answer**: {a}
**Final Answer: {a}**
Final Answer:|{a}
The answer is 99. Wait, no. Final answer: {a}
The result is {a}.
The result is: {a}
Result: {a}
The solution is {a}.
Solution: {a}
So the answer is {a}.
so the answer is {a}
So, the answer is {a}.
Therefore, the answer is {a}.
Thus, the answer is {a}.
Hence the answer is {a}.
Hence, the final answer is {a}.
Mary has 3 brothers. Therefore she has {a} sisters.
There are 2 and 5 of them. So it is {a}.
So we get {a}.
So the total is {a}.
Thus, {a}.
Therefore: {a}
Hence {a}
In conclusion, {a}.
Mary has {a} sisters.
She has {a} of them
There are {a} of them.
It equals {a}.
It is {a}
That makes {a}.
x = {a}
= {a}
n = {a}.
3 + 4 = {a}
3+4={a}
3 + 4 - 2 = 7 - 2 = {a}
The sum of 3 and 4 is {a}.
The LCM of 4 and 6 is {a}.
The GCD is {a}.
The next number in the sequence is {a}.
The missing number is {a}.
The total is {a}.
The total number of apples is {a}.
Total: {a}
3 + 4 - 2 equals {a}
Sure! The total is {a}
Sure, here is the answer: {a}
{a} apples
{a} km/h
{a} dollars.
{a} is the answer.
{a} is the final answer.
First, 3 + 4 = 7.|The answer is {a}.
First, 3 + 4 = 7.||The answer is {a}
Step 1: add 3 and 4.|Step 2: subtract 2.|Answer: {a}
1. Add 3 and 4.|2. Subtract 2.||**Answer: {a}**
Let's think. 3 plus 4 is 7, minus 2 is 5.|**{a}**
Let x be 3 and y be 4.|So x + y is more than 2.|x = {a}
We get 3 * 4 = {a}
```|{a}|```
```text|{a}|```"""

CHOICES = r"""({a})
{a}
{a}.
{a})
({a}).
({a}):
[{a}]
**{a}**
**{a}.**
**({a})**
*{a}*
`{a}`
"{a}"
({a}) whale
{a}) whale
{a}. whale
{a}: whale
{a} - whale
{a} whale
**{a}. whale**
**{a}) whale**
**({a}) whale**
{a}. Whale
({a}) whale.
({a}) whale|It is by far the largest.
{a}||It is by far the largest.
{a}.||Explanation: it is by far the largest.
{a}, because it is the largest.
{a}, since it is the largest.
Answer: {a}
Answer: ({a})
Answer: {a}.
Answer: {a}) whale
Answer: {a}. whale
answer: ({a}).
ANSWER: {a}
Answer {a}
**Answer:** {a}
**Answer**: {a}
**Answer: {a}**
**Answer: ({a})**
Answer:|{a}
Answer:||({a})
Answer:|({a}) whale
### Answer|({a})
### Answer: {a}
The answer is {a}
The answer is {a}.
The answer is ({a})
The answer is ({a}).
The answer is ({a}).
The answer is: ({a})
The answer is: {a}.
The answer is "{a}".
The answer is **{a}**.
The answer is **({a}) whale**.
The answer is {a}) whale.
The answer is {a}, whale.
The answer is {a}: whale.
The answer is option {a}.
The answer is Option ({a}).
The answer is choice ({a})
The answer is letter {a}.
The correct answer is {a}.
The correct answer is: {a}
The correct answer is ({a}) whale.
The correct answer is **{a}) whale**.
The correct answer is option {a}: whale.
The correct answer to the question is ({a}).
The correct option is ({a}).
The correct option is {a}.
The correct choice is {a}
The right answer is {a}.
The best answer is ({a}).
The best answer is {a}.
The most likely answer is ({a}).
The answer must be ({a}).
The answer should be {a}.
The answer would be {a}.
So the answer is ({a}).
so the answer is ({a})
So, the correct answer is {a}.
Therefore, the answer is ({a}).
Therefore, the correct option is {a}.
Thus the answer is {a}.
Hence, ({a}).
Final answer: {a}
Final answer: ({a})
**Final Answer:** ({a})
**Final Answer: {a}**
The final answer is {a}.
The final answer is ({a})
The final answer is \boxed{{{a}}}.
My answer is {a}.
My final answer is ({a}).
\boxed{{{a}}}
\boxed{{({a})}}
$\boxed{{{a}}}$
$\boxed{{\text{{{a}}}}}$
<answer>{a}</answer>
<answer>({a})</answer>
<answer>{a}. whale</answer>
<answer>|{a}|</answer>
Option {a}
Option {a}: whale
Option ({a}) is correct.
Option {a} is correct.
Option {a} is the correct answer.
({a}) is correct.
{a} is correct
{a} is correct.
{a} is the answer.
{a} is the correct answer.
{a} is the right choice
({a}) is the best answer.
I would choose ({a}).
I choose {a}.
I would go with ({a}).
I think the answer is {a}.
I believe the correct answer is ({a}).
Let's see. Ants are small.|So the answer is ({a}).
Let's see. Ants are small.||**{a}**
Ants are small, so it must be|({a})
Ants are small. It must be ({a}).
Let's think step by step.|1. Ants are small.|2. Cats are larger.|Therefore the answer is ({a}).
The answer is [{a}]."""

WORDS = r"""{a}
{a}.
 {a}
{a}!
**{a}**
**{a}.**
*{a}*
`{a}`
"{a}"
'{a}'
({a})
{a}, because it is so.
{a}, since all birds fly.
{a}. It follows from 1.
{a}: all birds fly.
{a} - it follows.
{a} – it follows.
{a}; it follows.
{a}, it logically follows.
{a}, it does.|All birds fly.
{a}, that follows logically from the statements.
{a}, it is.
{a}, that is right.
{a} (it follows from the first statement)
{a}|Explanation: all birds fly.
{a}||All birds fly.
{a}.||Because all birds fly, it follows.
**{a}**||All birds fly.
**{a}**, because all birds fly.
**{a}.** All birds fly.
Answer: {a}
Answer: {a}.
answer: {a}.
ANSWER: {a}
Answer: "{a}"
Answer: **{a}**
Answer: {a}, it follows.
Answer:|{a}
Answer:||{a}
Answer - {a}
**Answer:** {a}
**Answer**: {a}
**Answer: {a}**
### Answer|{a}
### Answer: {a}
The answer is {a}
The answer is {a}.
The answer is "{a}".
The answer is '{a}'.
The answer is: {a}
The answer is: {a}.
The answer is **{a}**.
The answer is `{a}`.
The answer is {a}, because all birds fly.
The answer is {a} because all birds fly.
The answer is therefore {a}.
The answer is simply {a}.
The answer would be {a}.
The answer should be {a}.
The answer must be {a}.
The answer to the question is {a}.
The answer to your question is {a}.
The answer to this problem is: {a}
The correct answer is {a}.
The correct answer is: {a}
The correct answer is "{a}".
The right answer is {a}.
The final answer is {a}.
The final answer is: {a}
Final answer: {a}
Final answer: {a}.
final answer: {a}
**Final Answer:** {a}
**Final Answer: {a}**
My answer: {a}
My answer is {a}.
My final answer is {a}.
So the answer is {a}.
so the answer is {a}
So, the answer is {a}.
Therefore, the answer is {a}.
Therefore, the answer is {a}, it follows.
Thus, the answer is {a}.
Hence, the answer is {a}.
All birds fly. So {a}.
All birds fly. So the answer is {a}.
All birds fly. Therefore, {a}.
All birds fly.||Answer: {a}
Thus, {a}.
Therefore: {a}
Hence: {a}
In conclusion, {a}.
In conclusion, the answer is {a}.
Does it follow? {a}, clearly.
Does it logically follow? {a}.
It follows that the claim holds: {a}
Conclusion: {a}
Result: {a}
The result is {a}.
\boxed{{{a}}}
\boxed{{\text{{{a}}}}}
$\boxed{{\text{{{a}}}}}$
The answer is $\boxed{{\text{{{a}}}}}$.
<answer>{a}</answer>
<answer> {a} </answer>
<answer>|{a}|</answer>
<think>All birds fly.</think>|{a}
Let us see.|Birds fly.|**{a}**
Let's think step by step.|Birds fly.|So the answer is {a}.
Step 1: all birds fly.|Step 2: a crow is a bird.|Answer: {a}
I would say {a}.
I think {a}.
I think the answer is {a}.
I believe it is {a}.
Sure. {a}.
Sure! The answer is {a}.
Well, {a}
{a} is the answer.
{a} is the correct answer."""

LISTS = r"""c, b, a
c,b,a
c , b , a
c, b, a.
c, b, a!
 c, b, a
[c, b, a]
[c,b,a]
(c, b, a)
{{c, b, a}}
['c', 'b', 'a']
["c", "b", "a"]
("c", "b", "a")
"c", "b", "a"
'c', 'b', 'a'
`c`, `b`, `a`
**c**, **b**, **a**
'c, b, a'
"c, b, a"
c b a
c; b; a
c;b;a
c, b, and a
c, b and a
**c, b, a**
*c, b, a*
`c, b, a`
`[c, b, a]`
$c, b, a$
Answer: c, b, a
Answer: c, b, a.
Answer: c b a
Answer: [c, b, a]
Answer: ["c", "b", "a"]
Answer: `c, b, a`
Answer: "c, b, a"
answer: c, b, a
ANSWER: c, b, a
Answer:|c, b, a
Answer:||c, b, a
Answer:|c|b|a
**Answer:** c, b, a
**Answer**: c, b, a
**Answer: c, b, a**
### Answer|c, b, a
### Answer:|c, b, a
The answer is c, b, a
The answer is c, b, a.
The answer is: c, b, a
The answer is: c, b, a.
The answer is [c, b, a].
The answer is ['c', 'b', 'a'].
The answer is **c, b, a**.
The answer is `c, b, a`.
The answer is "c, b, a".
The answer would be c, b, a.
The correct answer is c, b, a.
The correct answer is: c, b, a
The correct order is c, b, a.
The correct order is: c, b, a
The final answer is c, b, a.
The final answer is: c, b, a
Final answer: c, b, a
Final answer: c, b, a.
Final answer: [c, b, a]
**Final Answer:** c, b, a
**Final Answer: c, b, a**
Final Answer:|c, b, a
The result is c, b, a.
The result is: c, b, a
Result: c, b, a
Output: c, b, a
Solution: c, b, a
The reversed list is: c, b, a
The reversed list is c, b, a.
The reversed list of words is c, b, a
The reversed list is:|c, b, a
The reversed list is:||c, b, a
Reversed: c, b, a
Reversed list: c,b,a
Reversed list:|c, b, a
Sure, here it is: c, b, a
Sure! Here is the reversed list: c, b, a
Sure! Here is the reversed list:||c, b, a
Here is the reversed list:||c, b, a
Here is the reversed list:||c,b,a||
Here is the reversed list:||c|b|a
Here is the list in reverse order:||1. c|2. b|3. a
1. c|2. b|3. a
1) c|2) b|3) a
1: c|2: b|3: a
- c|- b|- a
* c|* b|* a
• c|• b|• a
- **c**|- **b**|- **a**
1. **c**|2. **b**|3. **a**
c|b|a
c|b|a|
c,|b,|a
```|c, b, a|```
```text|c, b, a|```
```|c|b|a|```
```python|["c", "b", "a"]|```
Here it is:|```|c, b, a|```
\boxed{{c, b, a}}
$\boxed{{c, b, a}}$
The answer is \boxed{{c, b, a}}.
\boxed{{\text{{c, b, a}}}}
<answer>c, b, a</answer>
<answer>[c, b, a]</answer>
<answer>|c, b, a|</answer>
So the list is c, b, a
So the answer is c, b, a.
So, the reversed list is: c, b, a
Therefore, the answer is c, b, a.
Therefore, the reversed list is: c, b, a.
Thus, c, b, a.
The words in reverse order are: c, b, a
The words in reverse order are c, b, a.
In reverse order: c, b, a
In reverse order, the words are: c, b, a"""

CODE = "def add(a, b):\n    return a + b"
_OPENINGS = (
    "",
    "\n\n",
    "Sure! Here it is:\n",
    "Here's a Python function that adds two numbers:\n\n",
    "To solve this, we add both arguments [a, b].\n\n### Solution\n\n",
    "**Solution:**\n",
    "1. Take both.\n2. Add them.\n\n",
    "First install it:\n```bash\npip install adding\n```\nThen:\n",
)
_FENCES = (
    "```python\n{code}\n```",
    "```\n{code}\n```",
    "```py\n{code}\n```",
    "```Python\n{code}\n```",
    "```python3\n{code}\n```",
    "~~~python\n{code}\n~~~",
    "````python\n{code}\n````",
    "``` python\n{code}\n```",
)
_ENDINGS = (
    "",
    "\n",
    "\nIt adds.",
    "\n\n### Explanation\nThe function returns `a + b`.\n",
    "\n\nExample usage:\n```python\nprint(add(1, 2))  # 3\n```",
    "\n\nOutput:\n```\n3\n```\n",
)
_BARE_CODE = (
    CODE,
    f"\n\n{CODE}\n\n",
    f"{CODE}\n\nprint(add(1, 2))",
    f"```python\n{CODE}",
    f"Here is the code:\n{CODE}\nThis adds two numbers.",
    f"{CODE}\n\nExplanation: it adds.",
    f"{CODE}\n# it adds",
    f"import math\n\n{CODE}",
    f"from typing import Any\n\n\n{CODE}\n\n\nassert add(1, 2) == 3",
    f'"""Adding."""\n\n{CODE}',
    f"First try:\n```python\ndef add(a, b): return 0\n```\nBetter:\n```python\n{CODE}\n```",
    f"```python\n{CODE}\n```\nTest:\n```python\nprint(add(1, 2))\n```",
    "1. Do this:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "```python\ndef add(a: int, b: int) -> int:\n    '''Add.'''\n    return a + b\n```",
    "```python\nclass Helper:\n    pass\n\ndef add(a, b):\n    return a + b\n```",
    "```python\nadd = lambda a, b: a + b\n```",
    "<answer>\n```python\ndef add(a, b):\n    return a + b\n```\n</answer>",
    "<answer>def add(a, b):\n    return a + b</answer>",
    "[BEGIN]\ndef add(a, b):\n    return a + b\n[DONE]",
    "def add(a, b): return a + b",
    "def add(a, b):\r\n    return a + b\r\n",
    "def add(a, b):\n\treturn a + b",
    "@staticmethod_free\ndef add(a, b):\n    return a + b".replace("@staticmethod_free\n", ""),
)

JSON_VALUE = '{"a": [1, 2]}'
_JSON_OPENINGS = (
    "",
    "\n",
    "Sure: ",
    "Here is the JSON:\n",
    "I think [x] is ",
    "first {} then ",
    "**Answer:** ",
    "Result -> ",
)
_JSON_FORMS = (
    '{"a": [1, 2]}',
    '{"a":[1,2]}',
    '{ "a" : [ 1, 2 ] }',
    '{\n  "a": [\n    1,\n    2\n  ]\n}',
    '```json\n{"a": [1, 2]}\n```',
    '```\n{\n  "a": [1, 2]\n}\n```',
    '`{"a": [1, 2]}`',
    '<answer>{"a": [1, 2]}</answer>',
)
_JSON_ENDINGS = ("", ".", "\n\nNote: {braces} are optional.", " Done")


def forms(text: str) -> list[str]:
    """The forms of a corpus, line breaks in place."""
    return list(dict.fromkeys(line.replace("|", "\n") for line in text.splitlines()))


def code_forms() -> list[str]:
    """Answers that define `add`: fences of every make between what models say before and after, and bare code."""
    framed = (o + f.format(code=CODE) + e for o, f, e in itertools.product(_OPENINGS, _FENCES, _ENDINGS))
    return [*framed, *_BARE_CODE]


def json_forms() -> list[str]:
    """Answers that hold JSON_VALUE."""
    return ["".join(parts) for parts in itertools.product(_JSON_OPENINGS, _JSON_FORMS, _JSON_ENDINGS)]
