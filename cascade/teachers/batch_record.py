"""What the store knows of the batches of a domain, so that a later process finds them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from cascade.store import Store

FOLDER = "batches"


@dataclass
class Record:
    """One batch: enough to find it, and to write its rows.

    Attributes:
        remote: its id at the endpoint, "" as long as nobody knows whether it was created.
        file: the endpoint's id of the uploaded requests, "" as long as nobody knows it.
        requests: key -> identity of the ledger row.
        prompt_tokens: key -> about how many its prompt has, for where the endpoint does not say.
    """

    id: str
    tier: int
    model: str
    endpoint: str
    requests: dict[str, dict[str, Any]]
    remote: str = ""
    file: str = ""
    done: bool = False
    created: float = field(default_factory=time.time)
    prompt_tokens: dict[str, int] = field(default_factory=dict)


class Records:
    """The records of a domain's batches."""

    def __init__(self, store: Store, domain: str) -> None:
        self._store, self._folder = store, f"{FOLDER}/{domain}"

    def keep(self, record: Record) -> None:
        """Store it as it is now."""
        self._store.write_json(self._path(record), asdict(record))

    def uri(self, record: Record) -> str:
        """Where it is, for people."""
        return self._store.uri_of(self._path(record))

    def _path(self, record: Record) -> str:
        return f"{self._folder}/{record.id}.json"

    def unfinished(self, model: str, endpoint: str) -> list[Record]:
        """Those of a model at an endpoint whose rows are not all written, whatever the model's tier is by now."""
        names = (n for n in self._store.list(self._folder) if n.endswith(".json"))
        found = [Record(**self._store.read_json(f"{self._folder}/{n}")) for n in names]
        return [r for r in found if not r.done and (r.model, r.endpoint) == (model, endpoint)]
