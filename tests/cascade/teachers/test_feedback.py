"""What a teacher is told of a failed answer never holds the right one, whichever scorer judged it."""

from __future__ import annotations

import json
import random

import pytest

from cascade import benchmarks
from cascade.tasks import Completion, Message, Task, Verdict
from cascade.teachers.answer_key import wrong_answer
from cascade.teachers.feedback import feedback, has_few_answers


def jsonl(kind: str, prompt: str = "Do it.", **reference: object) -> Task:
    return Task("jsonl/x/1", "jsonl", "d", "train", (Message("user", prompt),), {"kind": kind, **reference})


def judged(task: Task, text: str) -> Verdict:
    return benchmarks.get(task.benchmark).score(task, Completion(task.id, "t", "", text))


def told(task: Task, text: str) -> str | None:
    verdict = judged(task, text)
    assert not verdict.passed
    return feedback(task, verdict)


ADD = jsonl(
    "unit_tests",
    "Write add(a, b).",
    tests='assert add(1, 2) == 377\nassert add(2, 2) == 404, "wanted 404"',
    setup="",
    solution="",
)


def test_a_wrong_program_is_told_the_call_and_not_what_it_should_give() -> None:
    text = told(ADD, "```python\ndef add(a, b):\n    return 377 if a == 1 else 0\n```")
    assert text is not None
    assert "add(2, 2) gives a wrong result" in text
    assert "404" not in text


def test_a_program_that_raises_is_told_its_own_error() -> None:
    text = told(ADD, "```python\ndef add(a, b):\n    return a + None\n```")
    assert text is not None
    assert "add(1, 2) raised TypeError" in text
    assert "377" not in text
    raised = told(ADD, "```python\ndef add(a, b):\n    raise ValueError('no such sum')\n```")
    assert raised is not None
    assert "no such sum" in raised


def test_a_program_that_cannot_run_is_told_why() -> None:
    text = told(ADD, "```python\nimport nothing_of_that_name\ndef add(a, b):\n    return 1\n```")
    assert text is not None
    assert "nothing_of_that_name" in text


def test_an_input_that_is_also_the_expected_value_is_not_shown() -> None:
    task = jsonl("unit_tests", "Write echo(x).", tests="assert echo(913) == 913", setup="", solution="")
    text = told(task, "```python\ndef echo(x):\n    return 0\n```")
    assert text is not None
    assert "hidden test fails" in text
    assert "913" not in text


def test_the_words_of_an_assertion_are_not_passed_on() -> None:
    tests = "def check(x):\n    assert x == 5512, 'expected 5512'\ncheck(f(3))"
    task = jsonl("unit_tests", "Write f(x).", tests=tests, setup="", solution="")
    text = told(task, "```python\ndef f(x):\n    return 1\n```")
    assert text is not None
    assert "5512" not in text


def test_an_error_that_a_test_words_itself_is_not_passed_on() -> None:
    tests = "if f(3) != 5512:\n    raise ValueError('should be 5512')"
    task = jsonl("unit_tests", "Write f(x).", tests=tests, setup="", solution="")
    assert "5512" not in str(told(task, "```python\ndef f(x):\n    return 1\n```"))


def test_a_wrong_text_is_told_how_it_was_read() -> None:
    text = told(jsonl("exact", answers=["blue whale"]), "grey seal")
    assert text is not None
    assert "grey seal" in text
    assert "whale" not in text


@pytest.mark.parametrize(
    ("answer", "expected_in", "never"),
    [
        ('[weather(city="Rome")]', "parameter 'city' is not the right one", "Oslo"),
        ("[weather(city=3)]", "not of type string", "Oslo"),
        ("[weather()]", "'city' is missing", "Oslo"),
        ('[weather(city="Oslo", when="now")]', "'when'", "Oslo"),
        ('[weather(city="Rome"), weather(city="Paris")]', "does not fit", "Oslo"),
        ('[forecast(city="Rome")]', "does not fit", "weather"),
    ],
)
def test_wrong_calls_are_told_what_is_wrong_and_not_what_is_right(answer: str, expected_in: str, never: str) -> None:
    schema = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
    functions = [{"name": n, "parameters": schema} for n in ("weather", "forecast")]
    task = jsonl(
        "calls", "Call it. " + json.dumps(functions), functions=functions, expected=[{"weather": {"city": ["Oslo"]}}]
    )
    text = told(task, answer)
    assert text is not None
    assert expected_in in text
    assert never not in text


def test_wrong_is_not_said_where_few_answers_are_left() -> None:
    choice = jsonl("multiple_choice", choices=["a", "b", "c"], answer=1)
    assert has_few_answers(choice)
    assert told(choice, "(A)") is None
    assert "form" in str(told(choice, "Hm."))
    assert told(jsonl("exact", answers=["Yes"]), "No") is None
    assert told(jsonl("exact", answers=["(B)"]), "The answer is (C)") is None


def test_broken_scorers_and_slow_programs() -> None:
    assert feedback(ADD, Verdict(ADD.id, "t", "", "error", evidence="the sandbox broke")) is None
    assert "time" in str(feedback(ADD, Verdict(ADD.id, "t", "", "timeout", evidence="over 10 s")))


def test_no_feedback_on_procedural_tasks_holds_the_answer() -> None:
    """Over many families: whatever wrong answer is given, the right one is in what is told only if it was said."""
    families = ("chain_sum", "gcd", "word_sequence_reversal", "letter_counting")
    options = {"generators": [{"name": n} for n in families]}
    told_of = 0
    tasks = benchmarks.get("reasoning_gym").load("train", domain="d", options=options, seed=17, count=40)
    for number, task in enumerate(tasks):
        right = benchmarks.get(task.benchmark).reference_answer(task)
        wrong = wrong_answer(right, (), random.Random(number))
        verdict = judged(task, wrong)
        if verdict.passed or (text := feedback(task, verdict)) is None:
            continue
        told_of += 1
        own_words = text.replace(verdict.answer, "")
        assert right not in own_words.split(), (task.id, text)
        assert "expected" not in own_words
    assert told_of > 20
