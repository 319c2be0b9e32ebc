"""The log of requests: what is remembered, for whom, and how much of it."""

from __future__ import annotations

import json

import pytest

from cascade.benchmarks import get
from cascade.store import Store
from cascade.tasks import Message, Route
from serve import feedback
from serve.errors import ApiError
from serve.feedback import FeedbackLog
from serve.protocol import Feedback, parse

ROUTE = Route("sums", 0.9, "router")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def test_what_one_key_has_asked_nobody_else_can_rate_or_overwrite(store) -> None:
    log = FeedbackLog(store)
    log.answered("r1", [Message("user", "mine")], "A", ROUTE, owner="alice")
    log.answered("r1", [Message("user", "theirs")], "B", ROUTE, owner="bob")
    assert not log.rate("r1", "bad", owner="eve")
    assert not log.rate("r1", "bad")
    assert log.rate("r1", "bad", owner="alice")
    assert store.read_json("feedback/open/alice~r1.json")["answer"] == "A"
    assert log.rate("r1", "bad", right="4", owner="bob")
    assert store.list("feedback/open") == ["alice~r1.json"]
    options = {"path": store.path("feedback/tasks")}
    (task,) = get("jsonl").load("train", domain="sums", options=options, seed=1, count=None)
    assert task.prompt == "theirs"


@pytest.mark.parametrize("letter", ["\u2028", "\x85", "\x1c", "é"])
def test_tasks_can_be_read_whatever_letters_are_in_them(store, letter) -> None:
    """Some readers of lines take more than a line feed for the end of one."""
    log = FeedbackLog(store)
    log.answered("r1", [Message("user", f"a{letter}b")], "A", ROUTE)
    assert log.rate("r1", "bad", right=f"4{letter}2")
    options = {"path": store.path("feedback/tasks")}
    (task,) = get("jsonl").load("train", domain="sums", options=options, seed=1, count=None)
    assert task.prompt == f"a{letter}b"


@pytest.mark.parametrize("blank", ["", " \n"])
def test_of_a_blank_answer_no_task_is_made(blank) -> None:
    """Nobody could load it, nor any other task in its folder."""
    with pytest.raises(ApiError) as caught:
        parse(Feedback, json.dumps({"request_id": "r1", "rating": "bad", "answer": blank}).encode())
    assert caught.value.param == "answer"


def test_what_is_remembered_is_bounded_in_bytes(store, monkeypatch) -> None:
    monkeypatch.setattr(feedback, "_REMEMBERED_BYTES", 100_000)
    log = FeedbackLog(store)
    for i in range(100):
        log.answered(f"r{i}", [Message("user", "x" * 1000)], "y", ROUTE)
    kept = [i for i in range(100) if log.rate(f"r{i}", "good")]
    assert kept == list(range(100 - len(kept), 100))
    assert 10 < len(kept) < 20
    log.answered("huge", [Message("user", "x" * 1_000_000)], "y", ROUTE)
    assert not log.rate("huge", "good")
    assert [i for i in range(100) if log.rate(f"r{i}", "good")] == kept
    for _ in range(1000):  # the same one again and again is remembered once
        log.answered("r99", [Message("user", "x" * 1000)], "y", ROUTE)
    assert [i for i in range(100) if log.rate(f"r{i}", "good")] == kept
