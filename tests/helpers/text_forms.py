r"""Forms of short free answers, and which forms BIG-Bench Hard's stricter reading takes for another answer.

Written as those of `answer_forms`: "|" stands for a line break, {a} for the answer.
"""

from __future__ import annotations

from answer_forms import forms

TEXTS = r"""{a}
 {a}
**{a}**
`{a}`
"{a}"
'{a}'
Answer: {a}
Answer: {a}.
answer: {a}.
ANSWER: {a}
Answer: "{a}"
Answer: **{a}**
Answer:|{a}
Answer:||{a}
Answer - {a}
**Answer:** {a}
**Answer**: {a}
**Answer: {a}**
### Answer: {a}
The answer is {a}
The answer is {a}.
The answer is "{a}".
The answer is '{a}'.
The answer is: {a}
The answer is: {a}.
The answer is **{a}**.
The answer is `{a}`.
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
Thus, the answer is {a}.
Hence, the answer is {a}.
All birds fly. So the answer is {a}.
All birds fly.||Answer: {a}
In conclusion, the answer is {a}.
Result: {a}
The result is {a}.
\boxed{{{a}}}
\boxed{{\text{{{a}}}}}
$\boxed{{\text{{{a}}}}}$
The answer is $\boxed{{\text{{{a}}}}}$.
<answer>{a}</answer>
<answer> {a} </answer>
<answer>|{a}|</answer>
Let's think step by step.|Birds fly.|So the answer is {a}.
Step 1: all birds fly.|Step 2: a crow is a bird.|Answer: {a}
I think the answer is {a}.
Sure! The answer is {a}.
${a}$
\({a}\)
\[{a}\]
$\boxed{{{a}}}$
$$\boxed{{{a}}}$$
\[\boxed{{{a}}}\]
The answer is \boxed{{{a}}}.
The final answer is $\boxed{{{a}}}$. I hope it is correct.
\fbox is not it, but \boxed{{\text{{{a}}}}}
<think>3 and 4 make 7</think>|<answer>{a}</answer>
answer: {a}
Answer = {a}
### Answer:|{a}
#### {a}
3 + 4 = 7|7 - 2 is less.|#### {a}
The answer is ${a}.
The answer to the problem is {a}.
The answer to this is {a}.
the correct answer is {a}
Our answer is {a}.
final answer: {a}.
**Final Answer**: {a}
Final Answer:|{a}
The answer is 99. Wait, no. Final answer: {a}
The result is: {a}
The solution is {a}.
Solution: {a}
Hence the answer is {a}.
Hence, the final answer is {a}.
Sure, here is the answer: {a}
First, 3 + 4 = 7.|The answer is {a}.
First, 3 + 4 = 7.||The answer is {a}
Step 1: add 3 and 4.|Step 2: subtract 2.|Answer: {a}
1. Add 3 and 4.|2. Subtract 2.||**Answer: {a}**
```|{a}|```
```text|{a}|```
Answer: "{a}".
Here you go:|```|{a}|```
```text|{a}|```|That is it.
~~~|{a}|~~~
My guess: the answer is {a}.
Option one failed.|Final answer: {a}
The final answer is "{a}"."""

_WHOLE_LINES = r"""The answer is {a}
The answer is {a}.
The answer is: {a}.
The answer is "{a}".
The answer is **{a}**.
The answer is {a}, whale.
The answer is {a}: whale.
The answer is option {a}.
The answer is letter {a}.
Thus the answer is {a}.
I think the answer is {a}.
The answer is [{a}].
The answer is {a}, because all birds fly.
The answer is {a} because all birds fly.
The answer is therefore {a}.
The answer is simply {a}.
Therefore, the answer is {a}, it follows.
The answer is $\boxed{{\text{{{a}}}}}$.
The answer is \boxed{{{a}}}.
The answer is {a}!
The answer is {a} apples.
The answer is {a} (in total).
The answer is {a}, because 3 + 4 makes 7.
The answer is {a} because 3 + 4 makes 7.
The answer is 99. Wait, no. Final answer: {a}"""
"""What follows "the answer is" is all of the answer there, as in the accepted harness: "option B" is no "(B)"."""


def bbh_forms(corpus: str) -> list[str]:
    """The forms of a corpus that BBH reads as the answer."""
    whole = set(forms(_WHOLE_LINES))
    return [form for form in forms(corpus) if form not in whole]
