"""The words of the house: Task, Completion, Verdict, Example, Route, and how each is stored.

Every record is a frozen dataclass. `schema_of` derives its one Arrow schema from the annotations, and
`to_table` / `from_table` convert lists of records to Arrow tables and back without loss. Fields that are
free-form JSON (`Task.reference`) are stored as JSON text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import pyarrow as pa

from cascade.errors import DataError

Split = Literal["train", "validation", "test"]
Form = Literal["chat", "completion", "likelihood"]
Outcome = Literal["pass", "fail", "timeout", "unparsed", "error"]
FinishReason = Literal["stop", "length", "error"]
Json = Any
"""Anything `json.dumps` takes."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. A final message of role `assistant` in a task is a prefill to be continued."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """As the OpenAI protocol and chat templates want it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to solve, with everything needed to ask it and to score the answer.

    Attributes:
        id: unique over all benchmarks, stable over runs: "<benchmark>/<its own id>".
        benchmark: name in `cascade.benchmarks`; its scorer judges completions of this task.
        domain: the domain it trains or tests, e.g. "code".
        split: only "train" tasks may become examples.
        messages: the conversation to answer. For form "completion" a single message whose content is the raw prompt.
        reference: what the scorer compares with; its shape belongs to the benchmark. Any JSON value.
        difficulty: 1 is easiest; the scale belongs to the benchmark.
        category: subject or family within the benchmark; reports break down by it.
        form: "chat" applies the model's chat template, "completion" continues raw text, "likelihood" compares
            `choices`.
        choices: for "likelihood": the continuations whose log-likelihoods are compared.
        stop: strings that end the answer (they are cut off).
        max_tokens: the most tokens an answer may have.
        max_turns: answers that the model may give in one conversation. Above 1, the benchmark's `reply` says what
            follows each answer (see `cascade.benchmarks.Conversational`).
    """

    id: str
    benchmark: str
    domain: str
    split: Split
    messages: tuple[Message, ...]
    reference: Json
    difficulty: int = 1
    category: str = ""
    form: Form = "chat"
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    max_turns: int = 1

    @property
    def prompt(self) -> str:
        """The text of the last user message: what a person would call the question."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered to one task.

    Attributes:
        model: name of the base or teacher model.
        modifier: version of the modifier in use, "" for the base alone.
        text: the answer, stop string and end token removed, a prefill not included; of several turns, the last one.
        turns: for tasks of several turns all that was said after the task's messages: answers and replies in order.
        choice_logprobs: for form "likelihood": sum of token log-probabilities (nats) of each choice, in order.
        choice_tokens: for form "likelihood": number of tokens of each choice.
        seconds: wall time spent on it; in a batch, the batch's time divided by its size.
    """

    task_id: str
    model: str
    modifier: str
    text: str
    finish_reason: FinishReason = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    choice_logprobs: tuple[float, ...] = ()
    choice_tokens: tuple[int, ...] = ()
    turns: tuple[Message, ...] = ()

    @property
    def said(self) -> tuple[Message, ...]:
        """What follows the task's messages: the one answer, or the whole conversation."""
        return self.turns or (Message("assistant", self.text),)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the scorer says of one completion.

    Attributes:
        outcome: "unparsed" means that no answer could be found in the text, which is not the same as a wrong one;
            "error" means that the scorer or the model broke, which says nothing of the answer.
        answer: what was read out of the completion, "" if nothing was.
        evidence: why, in words that help a person or a teacher to mend the answer (failing test, expected form).
    """

    task_id: str
    model: str
    modifier: str
    outcome: Outcome
    answer: str = ""
    evidence: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "pass"


@dataclass(frozen=True, slots=True)
class Example:
    """Chat messages to train on, the last one the assistant's, with where they came from.

    Attributes:
        teacher: model that wrote the answer. A teacher that replays known answers says so in its name.
        tier: 1, 2 or 3; 0 for a replayed answer of the student itself.
        cost_usd: what this answer cost, failed attempts for the same task and tier included.
        prompt_hash: `message_hash` of the messages sent to the teacher.
        repairs: how many times the answer had been sent back before it was verified.
        judge: the model that accepted the answer, where the task has no exact scorer; "" if the scorer verified it.
    """

    task_id: str
    benchmark: str
    domain: str
    category: str
    difficulty: int
    messages: tuple[Message, ...]
    teacher: str
    tier: int
    cost_usd: float = 0.0
    prompt_hash: str = ""
    repairs: int = 0
    judge: str = ""

    @classmethod
    def from_answer(
        cls,
        task: Task,
        answer: str | Sequence[Message],
        verdict: Verdict,
        *,
        teacher: str,
        tier: int,
        cost_usd: float,
        prompt_hash: str,
        repairs: int = 0,
        judge: str = "",
    ) -> Example:
        """A verified answer as an example; refuses test and validation tasks and answers that did not pass.

        Args:
            answer: the text, or all that was said in a conversation (`Completion.said`).

        Raises:
            DataError: the task is not of the training split, the verdict is not a pass, or it judges another task.
        """
        if task.split != "train":
            raise DataError(f"task {task.id} is of the {task.split} split and must not become a training example")
        if verdict.task_id != task.id or not verdict.passed:
            raise DataError(f"answer to {task.id} has no passing verdict ({verdict.task_id}: {verdict.outcome})")
        return cls(
            task_id=task.id,
            benchmark=task.benchmark,
            domain=task.domain,
            category=task.category,
            difficulty=task.difficulty,
            messages=(*task.messages, *([Message("assistant", answer)] if isinstance(answer, str) else answer)),
            teacher=teacher,
            tier=tier,
            cost_usd=cost_usd,
            prompt_hash=prompt_hash,
            repairs=repairs,
            judge=judge,
        )


@dataclass(frozen=True, slots=True)
class Route:
    """The router's decision for one request.

    Attributes:
        choice: "base" or a modifier's domain.
        confidence: calibrated probability that the choice answers correctly.
        reason: "router", "follow-up" (an earlier message of the conversation decided), "override", "low-confidence"
            (fell back to base), "unavailable" (the choice cannot be used now) or "no-router".
        probabilities: calibrated probability of a right answer, per candidate.
    """

    choice: str
    confidence: float
    reason: str
    probabilities: dict[str, float] = field(default_factory=dict)


def message_hash(messages: Iterable[Message]) -> str:
    """SHA-256 (hex) over roles and contents of a conversation."""
    text = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- storage

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_ARROW: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    float | None: pa.float64(),
    tuple[Message, ...]: _MESSAGES,
    tuple[str, ...]: pa.list_(pa.string()),
    tuple[int, ...]: pa.list_(pa.int64()),
    tuple[float, ...]: pa.list_(pa.float64()),
    dict[str, float]: pa.map_(pa.string(), pa.float64()),
    Json: pa.string(),
}
Record = TypeVar("Record")
KEYS = {
    "Task": ("id",),
    "Completion": ("task_id", "model", "modifier"),
    "Verdict": ("task_id", "model", "modifier"),
    "Example": ("task_id", "tier"),
    "Judgement": ("task_id", "attempt", "round"),
    "Sent": ("task_id",),
    "DatasetRow": ("task_id", "tier"),
    "Answer": ("task_id", "attempt", "round", "step"),
    "StepReport": ("step",),
    "Attempt": ("number",),
    "Refused": ("task_id",),
    "Look": ("step",),
    "Stage": ("params", "share"),
    "Trial": ("params",),
}
"""What a row is about, per record: rows that a killed job wrote twice are known by it (see `cascade.artifacts`)."""


def _field_types(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def schema_of(record: type) -> pa.Schema:
    """The Arrow schema of a record class, derived from its annotations."""
    fields = []
    for name, kind in _field_types(record).items():
        if getattr(kind, "__origin__", None) is Literal:
            kind = str
        fields.append(pa.field(name, _ARROW[kind], nullable=type(None) in get_args(kind)))
    key = json.dumps(KEYS.get(record.__name__, ()))
    return pa.schema(fields, metadata={"record": record.__name__, "key": key})


def to_table(record: type[Record], rows: Sequence[Record]) -> pa.Table:
    """Records as an Arrow table of `schema_of(record)`, one row each, in order."""
    schema, types = schema_of(record), _field_types(record)
    columns = {}
    for name, kind in types.items():
        values = [getattr(row, name) for row in rows]
        if kind is Json:
            values = [json.dumps(v, ensure_ascii=False) for v in values]
        elif kind == tuple[Message, ...]:
            values = [[m.as_dict() for m in v] for v in values]
        elif kind == dict[str, float]:
            values = [list(v.items()) for v in values]
        columns[name] = pa.array(values, schema.field(name).type)
    return pa.table(columns, schema=schema)


def from_table(record: type[Record], table: pa.Table) -> list[Record]:
    """The records of an Arrow table. Columns that the record does not have are ignored.

    Raises:
        DataError: a column of the record is missing in the table.
    """
    types = _field_types(record)
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    missing = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    missing -= set(table.column_names)
    if missing:
        raise DataError(f"table of {record.__name__} lacks the columns {sorted(missing)}")
    columns = {}
    for name, kind in types.items():
        if name not in table.column_names:
            continue
        values = table.column(name).to_pylist()
        if kind is Json:
            values = [json.loads(v) for v in values]
        elif kind == tuple[Message, ...]:
            values = [tuple(Message(**m) for m in v) for v in values]
        elif kind == dict[str, float]:
            values = [dict(v) for v in values]
        elif getattr(kind, "__origin__", None) is tuple:
            values = [tuple(v) for v in values]
        columns[name] = values
    return [record(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
