from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.tasks import Message, Task
from cascade.teachers.conversation import (
    estimate_tokens,
    final_answer,
    most_prompt_tokens,
    order_by_head,
    request_key,
    request_parameters,
    teacher_messages,
    without_prefill,
)

_text = st.text(max_size=40)
_tagged = st.lists(
    st.one_of(_text, st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\nFinal answer: ", "\n"])),
    max_size=8,
).map("".join)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("42", "42"),
        ("<think>6*7</think>\n42", "42"),
        ("6*7 is easy</think>42", "42"),
        ("<think>never ends 42", ""),
        ("I add.\n**Final answer:** 42\n", "42"),
        ("Final answer: 1\nNo.\nFinal answer: 42", "42"),
        ("So <answer>42</answer> it is", "42"),
        ("The final answer: nothing of this line is a marker", "The final answer: nothing of this line is a marker"),
    ],
)
def test_reasoning_goes_and_the_answer_stays(text: str, kept: str) -> None:
    assert final_answer(text, keep_reasoning=False) == kept
    assert final_answer(text, keep_reasoning=True) == text.strip()


@given(_tagged, st.booleans())
def test_reading_an_answer_twice_changes_nothing(text: str, keep: bool) -> None:
    once = final_answer(text, keep)
    assert final_answer(once, keep) == once


def test_teacher_gets_one_system_message_and_no_prefill(make_task, make_teacher) -> None:
    task = make_task(1)
    messages = (Message("system", "Be short."), *task.messages, Message("assistant", "The sum is"))
    task = dataclasses.replace(task, messages=messages)
    sent = teacher_messages(task, make_teacher("http://x/v1", system="Be right."))
    assert [m.role for m in sent] == ["system", "user"]
    assert sent[0].content.startswith("Be right.\n\nBe short.")
    assert "The sum is" in sent[0].content
    assert sent[1] == task.messages[1]
    assert without_prefill(task, "The sum is 2.") == " 2."
    assert without_prefill(task, "2") == "2"


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        ("gpt-5", "max_completion_tokens"),
        ("openai/gpt-5-mini", "max_completion_tokens"),
        ("o3", "max_completion_tokens"),
        ("ft:o4-mini-2025-04-16:somebody", "max_completion_tokens"),
        ("gpt-4o", "max_tokens"),
        ("qwen/qwen3-coder-480b", "max_tokens"),
    ],
)
def test_parameters_suit_the_model(make_teacher, model: str, limit: str) -> None:
    assert request_parameters(make_teacher("http://x/v1", name=model), 0) == {limit: 50}
    assert request_parameters(make_teacher("http://x/v1", name=model, temperature=0.5), 0)["temperature"] == 0.5


_messages = st.lists(st.builds(Message, st.sampled_from(["system", "user"]), _text), max_size=3)


@given(_messages, _messages, st.integers(0, 3), st.integers(0, 3))
def test_key_is_equal_exactly_for_equal_requests(a, b, first: int, second: int) -> None:
    same = (a, first) == (b, second)
    key = request_key("u", "m", a, {"max_tokens": 5, "temperature": 0}, first)
    assert (key == request_key("u", "m", b, {"temperature": 0, "max_tokens": 5}, second)) == same
    assert key != request_key("u", "m", a, {"max_tokens": 6, "temperature": 0}, first)
    assert key != request_key("v", "m", a, {"max_tokens": 5, "temperature": 0}, first)


@given(_text)
def test_worst_case_of_tokens_is_above_one_per_byte(text: str) -> None:
    assert most_prompt_tokens([Message("user", text)]) > len(text.encode()) >= estimate_tokens(text)


def test_tasks_that_begin_alike_stand_together_and_keep_their_order(make_task, make_teacher) -> None:
    def task(number: int, *said: str) -> Task:
        roles = ("system", "user")[-len(said) :]
        messages = tuple(Message(role, text) for role, text in zip(roles, said, strict=True))
        return dataclasses.replace(make_task(number), messages=messages)

    long = "x" * 2000
    tasks = [task(0, "a", "?"), task(1, long + "1"), task(2, "b", "?"), task(3, "a", "!"), task(4, long + "2")]
    for teacher in (make_teacher("http://x/v1"), make_teacher("http://x/v1", system="Be right.")):
        assert order_by_head(tasks, teacher) == [0, 3, 1, 4, 2]
        assert order_by_head([make_task(n) for n in (3, 1, 2)], teacher) == [0, 1, 2]
