"""The bare questions of tasks: what is asked, without what a benchmark puts around it.

Contamination is of questions, not of prompts: a question that somebody copied into a training answer stands there
without "Question:", worked examples, lettered choices or unit tests. Every wrapping that a benchmark here adds is known
in this one place, so that it is found in tasks and in examples alike.
"""

from __future__ import annotations

import re

from cascade.tasks import Task

_BRACKETED = r"(?:\n\([A-Z0-9]\) [^\n]*){2,26}"
_LETTERED = r"\nA\. .*?\nB\. .*?\nC\. .*?\nD\. .*?"
_WRAPPINGS = {
    "arc": [rf"(?:\A|.*\n\n)Question: (?P<q>.*?)(?:{_BRACKETED})?\n(?:Answer:|Answer with the letter [^\n]*)\Z"],
    "mmlu": [
        rf"(?:.*\nAnswer: [A-D]\n\n|The following are multiple choice[^\n]*\n\n)(?P<q>.*){_LETTERED}\nAnswer:\Z",
        r"(?:.*\n)?Question: (?P<q>.*)\nAnswer:\Z",
    ],
    "mbpp": [r".*here is your task: (?P<q>.*?) Your code should pass these tests:"],
    "bbh": [r"(?:.*\n\n)?Q: (?P<q>.*?)\nA:(?: Let's think step by step\.)?\s*\Z"],
    "humaneval": [r".*(?P<mark>\"\"\"|\'\'\')(?P<q>.*?)(?:>>>|\n\s*(?:For e|E)xamples?\b|(?P=mark))"],
    "livecodebench": [r".*### Question:\n(?P<q>.*?)\n\n### Format:"],
    "jsonl": [rf"(?P<q>.*?){_BRACKETED}\Z"],
}
"""Benchmark -> how its prompts hold the question `q`; prompts of the others are bare already."""
_PATTERNS = {name: [re.compile(p, re.DOTALL) for p in patterns] for name, patterns in _WRAPPINGS.items()}


def unwrapped(benchmark: str, text: str) -> str:
    """The question in a prompt of that benchmark, the text itself if it is not wrapped."""
    found = next((match for p in _PATTERNS.get(benchmark, ()) if (match := p.match(text))), None)
    return (found["q"] if found else text).strip()


def questions(task: Task) -> list[str]:
    """All that a task asks: its bare question, and what a conversation with several turns asks later."""
    later = task.reference.get("questions", []) if isinstance(task.reference, dict) and task.max_turns > 1 else []
    return list(dict.fromkeys([unwrapped(task.benchmark, task.prompt), *(q for turn in later for q in turn)]))
