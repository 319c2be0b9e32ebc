"""What a batch may hold: requests, bytes, and prompt tokens in the queue of the endpoint's Batch API.

The first two are the API's. The third is the account's, for all its batches that have not ended; nobody can ask for
it, but an endpoint whose queue is full says what it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types import Batch, BatchError

from cascade.tasks import Message
from cascade.teachers.conversation import estimate_prompt_tokens

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
QUEUE_FULL = "token_limit_exceeded"
"""The error code of a batch for which there is no room in the queue."""
_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_LIMIT = re.compile(r"\blimit(?::| of)\s*(\d[\d,]*(?:\.\d+)?)\s?([KMB]?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class BatchRequest:
    """One request of a batch.

    Attributes:
        key: `conversation.request_key`; its name in the batch.
        identity: the fields of its ledger row that are known before it is sent.
        worst_usd: the most that it can cost, at the price of a batch.
    """

    key: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    identity: Mapping[str, Any]
    worst_usd: float

    @property
    def prompt_tokens(self) -> int:
        """About how many tokens its prompt has."""
        return estimate_prompt_tokens(self.messages)

    def line(self, model: str) -> bytes:
        """Its line of the file that is uploaded."""
        body = {"model": model, "messages": [m.as_dict() for m in self.messages], **self.parameters}
        call = {"custom_id": self.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(call).encode() + b"\n"


def tokens_of(requests: Iterable[BatchRequest]) -> int:
    """About how many tokens the requests take in the queue: their prompts."""
    return sum(r.prompt_tokens for r in requests)


def cut(requests: Iterable[BatchRequest], model: str, most_tokens: float) -> Iterator[list[BatchRequest]]:
    """The requests in their order, in as few batches as the limits allow. One beyond them is alone in its batch."""
    part: list[BatchRequest] = []
    size, tokens = 0, 0
    for request in requests:
        more, more_tokens = len(request.line(model)), tokens_of([request])
        full = len(part) == MOST_REQUESTS or size + more > MOST_BYTES or tokens + more_tokens > most_tokens
        if part and full:
            yield part
            part, size, tokens = [], 0, 0
        part.append(request)
        size, tokens = size + more, tokens + more_tokens
    if part:
        yield part


def _errors(batch: Batch) -> Sequence[BatchError]:
    return (batch.errors.data if batch.errors else None) or ()


def error_of(batch: Batch) -> str:
    """What the endpoint says is wrong with a batch, "" if nothing."""
    return ", ".join(e.message or e.code or "" for e in _errors(batch))


def found_no_room(batch: Batch) -> bool:
    """Whether a batch failed because the queue was full. Nothing of it was worked on, and it costs nothing."""
    return batch.status == "failed" and any(e.code == QUEUE_FULL for e in _errors(batch))


def stated_limit(said: str) -> float:
    """The limit of the queue in tokens that an error message names ("Limit: 90,000", "limit of 30K"), else infinity."""
    found = _LIMIT.search(said)
    return float(found[1].replace(",", "")) * _UNITS[found[2].upper()] if found else math.inf
