"""What the result files of a batch say of its requests."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from cascade.config import Teacher
from cascade.teachers.batch_record import Record
from cascade.teachers.budget import price_usd
from cascade.teachers.endpoint import REFUSED_IN_A_ROW, Failure, read_response
from cascade.teachers.ledger import LedgerEntry

Outcome = tuple[LedgerEntry, Failure | None]
"""The ledger's row of a request, and why it has no response, if it has none."""
Row = dict[str, Any]
_UNUSABLE = (401, 402, 404)


def read_rows(text: str) -> tuple[dict[str, Row], int]:
    """The lines of a result file by request key, and how many cannot be read."""
    rows, unreadable = {}, 0
    for line in text.split("\n"):
        try:
            if line.strip():
                row = json.loads(line)
                rows[str(row["custom_id"])] = row
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return rows, unreadable


def failure_of(row: Row) -> Failure | None:
    """Why a request of a batch has no response, None if it has one."""
    response = row.get("response") or {}
    status, said = response.get("status_code"), str(row.get("error") or response.get("body"))[:300]
    if status == 200:
        return None
    detail = f"in a batch: {status}: {said}"
    if status in _UNUSABLE:
        return Failure("unusable", detail)
    return Failure("refused" if status and 400 <= status < 500 and status not in (408, 429) else "broken", detail)


def refusal_of(rows: Collection[Row]) -> str:
    """What is wrong with all requests of a batch, as the first row says; "" if some were taken, or there are few.

    A parameter that the model does not take is refused with every single request, in a batch that was "completed".
    """
    failures = [failure_of(row) for row in rows]
    refused = [f.detail for f in failures if f and f.kind in ("refused", "unusable")]
    if len(refused) < max(len(rows), REFUSED_IN_A_ROW):
        return ""
    return f"all {len(refused)} requests of a batch were refused, the first one so: {refused[0]}"


def outcome_of(teacher: Teacher, record: Record, key: str, row: Row | None, missing: Failure) -> Outcome:
    """What became of one request of a batch.

    Args:
        row: its line of the result files, if there is one.
        missing: why there is none.
    """
    identity = record.requests[key] | {"batch": record.id, "created": time.time()}
    failure = missing if row is None else failure_of(row)
    if row is not None and failure is None:
        try:
            tokens = record.prompt_tokens.get(key, 0)  # none in records of before they were kept
            result = read_response(row["response"].get("body"), tokens, time.time() - record.created)
        except ValueError as error:
            failure = Failure("broken", f"nonsense in a batch: {error}"[:300])
        else:
            price = price_usd(teacher, result.prompt_tokens, result.completion_tokens, result.cached_tokens)
            return LedgerEntry(**identity, **asdict(result), price_usd=price), None
    return LedgerEntry(**identity, outcome="error", detail=failure.detail if failure else ""), failure
