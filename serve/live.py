"""What is current in the store, followed while serving: a new version goes live without a restart.

A version that cannot be used is refused once, with a line in the log, and the last good one goes on serving.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cascade import modifiers
from cascade.artifacts import Store
from cascade.compression.flat import FlatAdapter
from cascade.errors import CascadeError
from cascade.modifiers import Canary, Modifier
from cascade.routing import model as routers
from cascade.routing.model import BASE, Mode, RouterModel
from cascade.tasks import Message, Route
from serve.events import Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Live:
    """A version in use. `form` is what a slot is filled with; None where nothing is computed."""

    modifier: Modifier
    form: FlatAdapter | None = None


class LiveModifiers:
    """The modifiers of a store that are in use: of each domain the current version, and a canary beside it.

    The store is read when this is made, on `refresh`, and after `watch` every so often in a thread of its own, which
    also prepares new versions; asking what is in use reads memory alone. Safe for threads.
    """

    def __init__(self, store: Store, open_form: Callable[[Modifier], FlatAdapter] | None = None) -> None:
        """Read the store.

        Args:
            open_form: makes a version ready to be computed with, or raises a CascadeError; None on the HTTP side.
        """
        self._store, self._open_form = store, open_form
        self._in_use: dict[tuple[str, Variant], Live] = {}
        self._shares: dict[str, float] = {}
        self._refused: set[str] = set()
        self._refreshing = threading.Lock()
        self._closed = threading.Event()
        self.refresh()

    def versions(self) -> dict[str, str]:
        """Version in use per domain, canaries left out."""
        return {d: live.modifier.version for (d, variant), live in self._in_use.items() if variant == "current"}

    def get(self, domain: str, variant: Variant = "current") -> Live | None:
        """What is in use of a domain; the current version where there is no canary; None if it has no modifier."""
        return self._in_use.get((domain, variant)) or self._in_use.get((domain, "current"))

    def in_use(self) -> list[Live]:
        """All that is in use, canaries included."""
        return list(self._in_use.values())

    def pick(self, domain: str, key: str) -> Variant:
        """Which variant a request gets, by the canary's share; the same key always gets the same."""
        point = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
        return "canary" if point < self._shares.get(domain, 0.0) else "current"

    def system(self, domain: str, variant: Variant = "current") -> str | None:
        """System message that a domain's modifier was trained under; None for none, or no such domain."""
        live = self.get(domain, variant)
        return None if live is None else live.modifier.system

    def watch(self, every_s: float = 1.0) -> None:
        """Keep following the store until `close`."""
        threading.Thread(target=self._watch, args=(every_s,), name="registry", daemon=True).start()

    def close(self) -> None:
        """End watching."""
        self._closed.set()

    def refresh(self) -> None:
        """Read the store once. A version that cannot be used is refused, and the one before it stays in use."""
        with self._refreshing:
            found: dict[tuple[str, Variant], Live] = {}
            shares: dict[str, float] = {}
            for domain in modifiers.list_domains(self._store):
                live = self._usable(domain, "current", partial(modifiers.current, self._store, domain))
                if live is None:
                    continue
                found[domain, "current"] = live
                canary = self._canary(domain)
                beside = self._usable(domain, "canary", partial(_version, self._store, domain, canary))
                if canary is not None and beside is not None:
                    found[domain, "canary"], shares[domain] = beside, canary.share
            self._in_use, self._shares = found, shares

    def _canary(self, domain: str) -> Canary | None:
        try:
            return modifiers.canary(self._store, domain)
        except CascadeError as error:
            logger.error("the canary of %s cannot be read: %s", domain, error)
            return None

    def _watch(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self.refresh()
            except Exception:  # a store that cannot be reached now may be again
                logger.exception("the registry cannot be read; what is in use stays")

    def _usable(self, domain: str, variant: Variant, read: Callable[[], Modifier | None]) -> Live | None:
        """What shall be in use now: as the store says, or what was before where that is bad."""
        before = self._in_use.get((domain, variant))
        try:
            modifier = read()
        except CascadeError as error:
            logger.error("the %s modifier of %s cannot be read: %s", variant, domain, error)
            return before
        if modifier is None or (before is not None and before.modifier == modifier):
            return before if modifier is not None else None
        if modifier.sha256 in self._refused:
            return before
        try:
            return Live(modifier, self._open_form(modifier) if self._open_form else None)
        except CascadeError as error:
            logger.error("modifier %s is refused: %s", modifier.name, error)
            self._refused.add(modifier.sha256)
            return before


def _version(store: Store, domain: str, canary: Canary | None) -> Modifier | None:
    return None if canary is None else modifiers.get(store, domain, canary.version)


class LiveRouter:
    """The current router of a store. Safe for threads."""

    def __init__(self, store: Store, cache: Path, *, refresh_s: float = 1.0) -> None:
        self._store, self._cache, self._refresh_s = store, cache, refresh_s
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._version: str | None = None
        self._model: RouterModel | None = None

    def route(
        self, messages: list[Message], available: dict[str, str], threshold: float | None, mode: Mode = "default"
    ) -> Route:
        """Who answers a conversation.

        Args:
            available: the modifiers that can be had; a router trained when there were others may choose one that is
                gone, and then the base answers ("unavailable").
        """
        model = self._refreshed()
        if model is None:
            return Route(BASE, 0.0, "no-router")
        route = model.route(messages, threshold, mode)
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
