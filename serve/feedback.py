"""The opt-in log: requests that the router was unsure of, or whose answers users disliked, become new tasks.

    feedback/open/<request id>.json          what was asked and answered; nobody has said what would have been right
    feedback/tasks/train-<request id>.jsonl  a task for `benchmark: jsonl`, with the right answer that a user gave

`test_domain` reads the second folder with `{benchmark: jsonl, options: {path: <storage>/feedback/tasks}}`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

from cascade.artifacts import Store
from cascade.tasks import Message, Route

FOLDER = "feedback"
_REMEMBERED = 10_000
"""Requests that can still be rated; older ones are forgotten."""


class FeedbackLog:
    """Remembers answers for a while, and writes down those worth learning from. Safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._answered: OrderedDict[str, dict[str, object]] = OrderedDict()

    def answered(self, request_id: str, messages: Sequence[Message], answer: str, route: Route) -> None:
        """Remember an answer. One that the router was unsure of is for `keep_unsure`."""
        entry: dict[str, object] = {
            "request_id": request_id,
            "messages": [m.as_dict() for m in messages],
            "answer": answer,
            "route": route.choice,
            "reason": route.reason,
            "confidence": route.confidence,
        }
        with self._lock:
            self._answered[request_id] = entry
            while len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)

    def keep(self, request_id: str, **more: object) -> bool:
        """Write down a remembered answer; returns whether it is remembered."""
        with self._lock:
            entry = self._answered.get(request_id)
        if entry is not None:
            self._store.write_json(f"{FOLDER}/open/{request_id}.json", entry | more)
        return entry is not None

    def rate(self, request_id: str, rating: str, comment: str | None = None, right: str | None = None) -> bool:
        """Take down a rating; returns whether there was such a request.

        Args:
            right: the answer that would have been right.
        """
        with self._lock:
            entry = self._answered.get(request_id)
        if entry is None:
            return False
        if right is not None:
            task = {"id": request_id, "kind": "exact", "messages": entry["messages"], "answer": right}
            line = json.dumps(task, ensure_ascii=False) + "\n"
            self._store.write_bytes(f"{FOLDER}/tasks/train-{request_id}.jsonl", line.encode())
            self._store.delete(f"{FOLDER}/open/{request_id}.json")
        elif rating == "bad":
            self.keep(request_id, rating=rating, comment=comment)
        return True
