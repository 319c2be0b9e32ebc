"""What is current in the store, followed while serving: a new version goes live without a restart.

A version that cannot be used is refused once, with a line in the log, and the last good one goes on serving.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cascade import modifiers
from cascade.artifacts import Store
from cascade.compression.packed import CompressedAdapter
from cascade.errors import CascadeError, DataError
from cascade.modifiers import Modifier
from cascade.routing import model as routers
from cascade.routing.model import BASE, RouterModel
from cascade.tasks import Message, Route

logger = logging.getLogger(__name__)


class LiveModifiers:
    """The current modifiers of a store, read again when older than `refresh_s` seconds. Safe for threads."""

    def __init__(self, store: Store, *, base_sha256: str | None = None, refresh_s: float = 1.0) -> None:
        self._store, self._base_sha256, self._refresh_s = store, base_sha256, refresh_s
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._current: dict[str, Modifier] = {}
        self._good: dict[str, Modifier] = {}
        self._refused: set[str] = set()

    def versions(self) -> dict[str, str]:
        """Version in use per domain."""
        return {domain: self._usable(m).version for domain, m in self._snapshot().items()}

    def version(self, domain: str) -> str | None:
        """Version in use of one domain, None if it has none."""
        return self.versions().get(domain)

    def put(self, domain: str, fill: Callable[[CompressedAdapter], None]) -> Modifier:
        """Read the domain's modifier and hand it to `fill`; falls back to the last good version.

        Raises:
            DataError: no version can be used.
        """
        wanted = self._snapshot().get(domain)
        if wanted is None:
            raise DataError(f"there is no modifier {domain!r}")
        chosen, good = self._usable(wanted), self._good.get(domain)
        problem: CascadeError | None = None
        for modifier in [chosen] if good in (None, chosen) else [chosen, good]:
            assert modifier is not None
            try:
                # The file's own hash is compared every time, the expanded numbers when it is new.
                content = modifiers.load(self._store, modifier, base_sha256=self._base_sha256, verify=modifier != good)
                fill(content)
            except CascadeError as error:
                logger.error("modifier %s is refused: %s", modifier.name, error)
                self._refused.add(modifier.sha256)
                problem = error
                continue
            self._good[domain] = modifier
            return modifier
        raise DataError(f"no version of the modifier {domain!r} can be used: {problem}")

    def _usable(self, modifier: Modifier) -> Modifier:
        """The modifier, or the last good one of its domain if it was refused."""
        return self._good.get(modifier.domain, modifier) if modifier.sha256 in self._refused else modifier

    def _snapshot(self) -> dict[str, Modifier]:
        with self._lock:
            if time.monotonic() - self._read_at >= self._refresh_s:
                self._current = self._read()
                self._read_at = time.monotonic()
            return self._current

    def _read(self) -> dict[str, Modifier]:
        found = {}
        for domain in modifiers.list_domains(self._store):
            try:
                modifier = modifiers.current(self._store, domain)
            except CascadeError as error:
                logger.error("the current modifier of %s cannot be read: %s", domain, error)
                modifier = self._current.get(domain)
            if modifier is not None:
                found[domain] = modifier
        return found


class LiveRouter:
    """The current router of a store. Safe for threads."""

    def __init__(self, store: Store, cache: Path, *, refresh_s: float = 1.0) -> None:
        self._store, self._cache, self._refresh_s = store, cache, refresh_s
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._version: str | None = None
        self._model: RouterModel | None = None

    def route(self, messages: list[Message], available: dict[str, str], threshold: float | None) -> Route:
        """Who answers a conversation.

        Args:
            available: the modifiers that can be had; a router trained when there were others may choose one that is
                gone, and then the base answers ("unavailable").
        """
        model = self._refreshed()
        if model is None:
            return Route(BASE, 0.0, "no-router")
        route = model.route(messages, threshold)
        if route.choice != BASE and route.choice not in available:
            return Route(BASE, route.probabilities[BASE], "unavailable", route.probabilities)
        return route

    def override(self, messages: list[Message], choice: str) -> Route:
        """The route to a candidate that the client named, with what the router thinks of it (0 if nothing)."""
        model = self._refreshed()
        probabilities = model.route(messages).probabilities if model else {}
        return Route(choice, probabilities.get(choice, 0.0), "override", probabilities)

    def _refreshed(self) -> RouterModel | None:
        with self._lock:
            if time.monotonic() - self._read_at >= self._refresh_s:
                self._read_at = time.monotonic()
                self._reload()
            return self._model

    def _reload(self) -> None:
        version = routers.current_version(self._store)
        if version == self._version:
            return
        self._version = version  # a bad one is not tried again and again
        try:
            found = routers.load_current(self._store, self._cache)
        except CascadeError as error:
            logger.error("the router %s is refused: %s", version, error)
            return
        self._model = found[1] if found else None
