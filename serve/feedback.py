"""The opt-in log: requests that the router was unsure of, or whose answers users disliked, become new tasks.

    feedback/open/<request>.json          what was asked and answered; nobody has said what would have been right
    feedback/tasks/train-<request>.jsonl  a task for `benchmark: jsonl`, with the right answer that a user gave

A request is named by its id, after the name of the API key that asked it and a tilde where keys are asked for.
`test_domain` reads the second folder with `{benchmark: jsonl, options: {path: <storage>/feedback/tasks}}` where the
storage is a path. From an object store the folder is copied to one first.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cascade.store import Store
from cascade.tasks import Message, Route

FOLDER = "feedback"
_REMEMBERED_BYTES = 64_000_000
"""Of requests that can still be rated, their answers included; older ones are forgotten."""
_LARGEST = 256_000
"""Bytes of one beyond which it is not remembered: no task is made of that much."""


@dataclass(frozen=True)
class _Answered:
    """What is remembered of a request.

    Attributes:
        content: as it is written down.
        size: bytes.
    """

    content: dict[str, object]
    size: int


class FeedbackLog:
    """Remembers answers for a while, and writes down those worth learning from. Safe for threads.

    Request ids are chosen by clients: what one API key has asked is there for that key alone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._answered: OrderedDict[str, _Answered] = OrderedDict()
        self._bytes = 0

    def answered(
        self, request_id: str, messages: Sequence[Message], answer: str, route: Route, *, owner: str = ""
    ) -> None:
        """Remember an answer, if it is not too large. One that the router was unsure of is for `keep`.

        Args:
            owner: name of the API key that asked, "" for none.
        """
        content: dict[str, object] = {
            "request_id": request_id,
            "messages": [m.as_dict() for m in messages],
            "answer": answer,
            "route": route.choice,
            "reason": route.reason,
            "confidence": route.confidence,
        }
        # A character takes up to four bytes.
        size = 4 * (sum(len(m.content) for m in messages) + len(answer)) + 1000 * (1 + len(messages))
        with self._lock:
            self._forget(_name(request_id, owner))
            if size > _LARGEST:
                return
            self._answered[_name(request_id, owner)] = _Answered(content, size)
            self._bytes += size
            while self._bytes > _REMEMBERED_BYTES:
                self._forget(next(iter(self._answered)))

    def keep(self, request_id: str, *, owner: str = "", **more: object) -> bool:
        """Write down a remembered answer; returns whether it is remembered."""
        content = self._content(request_id, owner)
        if content is not None:
            self._store.write_json(f"{FOLDER}/open/{_name(request_id, owner)}.json", content | more)
        return content is not None

    def rate(
        self, request_id: str, rating: str, comment: str | None = None, right: str | None = None, *, owner: str = ""
    ) -> bool:
        """Take down a rating; returns whether that key has asked such a request.

        Args:
            right: the answer that would have been right.
        """
        content, name = self._content(request_id, owner), _name(request_id, owner)
        if content is None:
            return False
        if right is not None:
            task = {"id": name, "kind": "exact", "messages": content["messages"], "answer": right}
            line = json.dumps(task) + "\n"  # in ASCII, which has no letter that some reader takes for a new line
            self._store.write_bytes(f"{FOLDER}/tasks/train-{name}.jsonl", line.encode())
            self._store.delete(f"{FOLDER}/open/{name}.json")
        elif rating == "bad":
            self.keep(request_id, owner=owner, rating=rating, comment=comment)
        return True

    def _content(self, request_id: str, owner: str) -> dict[str, object] | None:
        with self._lock:
            found = self._answered.get(_name(request_id, owner))
        return None if found is None else found.content

    def _forget(self, name: str) -> None:
        """The lock is held."""
        gone = self._answered.pop(name, None)
        self._bytes -= gone.size if gone else 0


def _name(request_id: str, owner: str) -> str:
    """By which a request is known here and in file names; no key's name and no request id has a tilde."""
    return f"{owner}~{request_id}" if owner else request_id
