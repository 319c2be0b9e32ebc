"""The records: what becomes an example, and that storage loses nothing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import DataError
from cascade.tasks import (
    Completion,
    Example,
    Message,
    Route,
    Task,
    Verdict,
    from_table,
    message_hash,
    schema_of,
    to_table,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
MESSAGES = st.lists(st.builds(Message, TEXT, TEXT), max_size=3).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
WHOLE = st.integers(0, 2**40)
TASKS = st.builds(
    Task,
    id=TEXT,
    benchmark=TEXT,
    domain=TEXT,
    split=st.sampled_from(["train", "validation", "test"]),
    messages=MESSAGES,
    reference=JSON,
    difficulty=WHOLE,
    category=TEXT,
    form=st.sampled_from(["chat", "completion", "likelihood"]),
    choices=st.lists(TEXT, max_size=3).map(tuple),
    stop=st.lists(TEXT, max_size=3).map(tuple),
    max_tokens=WHOLE,
)
COMPLETIONS = st.builds(
    Completion,
    task_id=TEXT,
    model=TEXT,
    modifier=TEXT,
    text=TEXT,
    finish_reason=st.sampled_from(["stop", "length", "error"]),
    prompt_tokens=WHOLE,
    completion_tokens=WHOLE,
    seconds=NUMBER,
    choice_logprobs=st.lists(NUMBER, max_size=3).map(tuple),
    choice_tokens=st.lists(WHOLE, max_size=3).map(tuple),
)
VERDICTS = st.builds(
    Verdict,
    task_id=TEXT,
    model=TEXT,
    modifier=TEXT,
    outcome=st.sampled_from(["pass", "fail", "timeout", "unparsed", "error"]),
    answer=TEXT,
    evidence=TEXT,
)
EXAMPLES = st.builds(
    Example,
    task_id=TEXT,
    benchmark=TEXT,
    domain=TEXT,
    category=TEXT,
    difficulty=WHOLE,
    messages=MESSAGES,
    teacher=TEXT,
    tier=st.integers(0, 3),
    cost_usd=NUMBER,
    prompt_hash=TEXT,
)
ROUTES = st.builds(
    Route, choice=TEXT, confidence=NUMBER, reason=TEXT, probabilities=st.dictionaries(TEXT, NUMBER, max_size=3)
)


@pytest.mark.parametrize(
    ("record", "rows"),
    [(Task, TASKS), (Completion, COMPLETIONS), (Verdict, VERDICTS), (Example, EXAMPLES), (Route, ROUTES)],
    ids=["Task", "Completion", "Verdict", "Example", "Route"],
)
def test_a_record_survives_arrow_and_parquet(record, rows):
    @settings(max_examples=40, deadline=None, database=None)
    @given(st.lists(rows, max_size=4))
    def round_trip(sample):
        table = to_table(record, sample)
        assert table.schema == schema_of(record)
        assert from_table(record, table) == sample
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        assert from_table(record, pq.read_table(pa.BufferReader(sink.getvalue()))) == sample

    round_trip()


@dataclass(frozen=True)
class Measured:
    name: str
    value: float | None = None


def test_a_figure_that_was_not_measured_stays_unmeasured():
    rows = [Measured("a", 0.5), Measured("b", None)]
    table = to_table(Measured, rows)
    assert table.column("value").null_count == 1
    assert from_table(Measured, table) == rows
    assert not schema_of(Measured).field("name").nullable


def test_a_table_from_before_a_field_with_a_default_is_still_read():
    table = to_table(Route, [Route("base", 0.5, "router", {"base": 0.5})]).drop_columns(["probabilities"])
    assert from_table(Route, table) == [Route("base", 0.5, "router")]


def test_a_missing_column_is_named():
    table = to_table(Verdict, [Verdict("t", "m", "", "pass")]).drop_columns(["outcome"])
    with pytest.raises(DataError, match=r"Verdict lacks the columns \[.outcome.\]"):
        from_table(Verdict, table)


def test_columns_of_another_record_are_ignored():
    verdict = Verdict("t", "m", "", "pass")
    table = to_table(Verdict, [verdict]).append_column("assignment", pa.array(["x"]))
    assert from_table(Verdict, table) == [verdict]


def _task(split="train"):
    return Task("mbpp/1", "mbpp", "code", split, (Message("user", "2+2?"),), {"answer": "4"}, 2, "sums")


def _example(task, verdict):
    return Example.from_answer(task, "4", verdict, teacher="t", tier=1, cost_usd=0.1, prompt_hash="h")


def test_a_passing_answer_to_a_training_task_becomes_an_example():
    example = _example(_task(), Verdict("mbpp/1", "t", "", "pass"))
    assert example.messages == (Message("user", "2+2?"), Message("assistant", "4"))
    assert (example.task_id, example.benchmark, example.domain) == ("mbpp/1", "mbpp", "code")
    assert (example.category, example.difficulty, example.tier, example.teacher) == ("sums", 2, 1, "t")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_tasks_of_other_splits_never_become_examples(split):
    with pytest.raises(DataError, match=f"{split} split"):
        _example(_task(split), Verdict("mbpp/1", "t", "", "pass"))


@pytest.mark.parametrize("outcome", ["fail", "timeout", "unparsed", "error"])
def test_answers_that_did_not_pass_never_become_examples(outcome):
    with pytest.raises(DataError, match=outcome):
        _example(_task(), Verdict("mbpp/1", "t", "", outcome))


def test_the_verdict_on_another_task_does_not_count():
    with pytest.raises(DataError, match="mbpp/2"):
        _example(_task(), Verdict("mbpp/2", "t", "", "pass"))


def test_message_hash_tells_roles_and_borders_apart():
    hashes = {
        message_hash([Message("user", "ab")]),
        message_hash([Message("system", "ab")]),
        message_hash([Message("user", "a"), Message("user", "b")]),
        message_hash([Message("user", 'a"], ["user", "b')]),
    }
    assert len(hashes) == 4
    assert message_hash([Message("user", "ab")]) == message_hash((Message("user", "ab"),))


def test_the_prompt_is_the_last_user_message():
    task = _task()
    dialogue = (
        Message("user", "first"),
        Message("assistant", "?"),
        Message("user", "second"),
        Message("assistant", ""),
    )
    assert dataclasses.replace(task, messages=dialogue).prompt == "second"
    assert dataclasses.replace(task, messages=()).prompt == ""


def test_references_are_stored_as_json_text():
    column = to_table(Task, [_task()]).column("reference")
    assert json.loads(column[0].as_py()) == {"answer": "4"}
