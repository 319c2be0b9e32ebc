"""What a teacher is sent and what of its answer is kept: pure functions over messages and text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cascade.config import Teacher
from cascade.tasks import Message, Task

_HEAD = 1024
_REASONING_MODEL = re.compile(r"(^|[/:])(gpt-[5-9]|o[1-9])")
_THINK = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINK_END = re.compile(r"^.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
_THINK_OPEN = re.compile(r"<(?:think|thinking|reasoning)>.*$", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_FINAL = re.compile(r"^[ \t]*(?:#+[ \t]*)?\**final answer\**[ \t]*:\**[ \t]*(?=\S)", re.MULTILINE | re.IGNORECASE)


def teacher_messages(task: Task, teacher: Teacher) -> tuple[Message, ...]:
    """The conversation that a teacher is asked to continue.

    One system message at most (the teacher's, then the task's). A prefilled beginning of the answer, which hosted
    models do not continue, becomes an instruction there; the user's messages stay as they are.
    """
    system = [teacher.system] if teacher.system else []
    system += [m.content for m in task.messages if m.role == "system"]
    rest = [m for m in task.messages if m.role != "system"]
    if rest and rest[-1].role == "assistant":
        system.append(f"Begin your answer with exactly this text and go on from there:\n{rest.pop().content}")
    head = [Message("system", "\n\n".join(system))] if system else []
    return (*head, *rest)


def order_by_head(tasks: Iterable[Task], teacher: Teacher) -> list[int]:
    """Positions of the tasks, those whose conversations begin alike one after the other: endpoints cache beginnings.

    The beginning is all messages but the last, and of a longer last one its first 1,024 characters. Among those that
    begin alike, and of the groups by their first task, the order stays.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, task in enumerate(tasks):
        *head, last = (m.content for m in teacher_messages(task, teacher))
        beginning = json.dumps([*head, last[:_HEAD] if len(last) > _HEAD else ""])
        groups[hashlib.sha256(beginning.encode()).digest()].append(position)
    return [position for alike in groups.values() for position in alike]


def without_prefill(task: Task, text: str) -> str:
    """An answer with the task's prefilled beginning taken off if the teacher repeated it."""
    last = task.messages[-1] if task.messages else None
    if last is not None and last.role == "assistant" and text.lstrip().startswith(last.content.strip()):
        return text.lstrip()[len(last.content.strip()) :]
    return text


def request_parameters(teacher: Teacher, attempt: int) -> dict[str, Any]:
    """The parameters of the API call besides model and messages.

    The models that reason before they answer take `max_completion_tokens` in place of `max_tokens`. An answer-key
    teacher gets the attempt as its `seed`, which makes its answers reproducible.
    """
    limit = "max_completion_tokens" if _REASONING_MODEL.search(teacher.name.lower()) else "max_tokens"
    parameters: dict[str, Any] = {limit: teacher.max_tokens}
    if teacher.temperature is not None:
        parameters["temperature"] = teacher.temperature
    if teacher.is_answer_key:
        parameters["seed"] = attempt
    return parameters


def request_key(
    endpoint: str, model: str, messages: Sequence[Message], parameters: Mapping[str, Any], attempt: int = 0
) -> str:
    """SHA-256 (hex) over all that decides an answer: it names the request in the ledger.

    Args:
        endpoint: base_url as the config has it (for the offline teacher the word `answer-key`, whatever its port).
        messages: the whole conversation as sent, the system message included.
        parameters: of the API call; a changed one is another request.
        attempt: further samples of one task are requests of their own.
    """
    content = [[m.role, m.content] for m in messages]
    text = json.dumps([endpoint, model, content, dict(parameters), attempt], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def final_answer(text: str, keep_reasoning: bool) -> str:
    """What of a teacher's text is verified and trained on; applying it twice changes nothing.

    Args:
        text: the whole answer; reasoning stands in <think>, <thinking> or <reasoning>, or before "</think>".
        keep_reasoning: keep everything. Otherwise the reasoning goes, and if the rest marks its answer with
            <answer>…</answer> or a line "Final answer: …", only that stays.

    Returns:
        The answer without surrounding white space; "" if the text never came to an end of its reasoning.
    """
    previous, current = None, text.strip()
    while not keep_reasoning and current != previous:
        previous, current = current, _without_reasoning(current)
    return current


def _without_reasoning(text: str) -> str:
    text = _THINK_OPEN.sub("", _THINK_END.sub("", _THINK.sub("", text)))
    if marked := _ANSWER.findall(text):
        text = marked[-1]
    elif finals := list(_FINAL.finditer(text)):
        text = text[finals[-1].end() :]
    return text.strip()


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has: four characters each, at least one unless it is empty."""
    return -(-len(text) // 4)


def estimate_prompt_tokens(messages: Iterable[Message]) -> int:
    """About how many tokens a conversation has, four for the frame of each message included."""
    return sum(4 + estimate_tokens(m.content) for m in messages)


def most_prompt_tokens(messages: Iterable[Message]) -> int:
    """More tokens than any byte-level tokenizer makes of a conversation: one per byte of UTF-8, 16 per frame."""
    return sum(16 + len(m.role) + len(m.content.encode()) for m in messages) + 16
