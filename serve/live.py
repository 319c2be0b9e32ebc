"""What is current in the store, followed while serving: a new version goes live without a restart.

A version that cannot be used is refused, with a line in the log, and the last good one goes on serving; where there is
none yet, the newest older one in the store. Now and then it is tried again: its file may have been mended.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cascade import modifiers
from cascade.compression.flat import FlatAdapter
from cascade.errors import CascadeError
from cascade.modifiers import Canary, Modifier
from cascade.routing import model as routers
from cascade.routing.model import BASE, Mode, RouterModel
from cascade.store import Store
from cascade.tasks import Message, Route
from serve.events import Variant
from serve.watched import Watched

logger = logging.getLogger(__name__)

_RETRY_S = 30.0
"""A version that was refused is tried again after so long."""


@dataclass(frozen=True, eq=False)
class Live:
    """A version in use. `form` is what a slot is filled with; None where nothing is computed."""

    modifier: Modifier
    form: FlatAdapter | None = None

    def introduce(self, messages: Sequence[Message]) -> Sequence[Message]:
        """A conversation as the modifier learned them: under its system message, where it brings none of its own."""
        system = self.modifier.system
        if not system or any(m.role == "system" for m in messages):
            return messages
        return [Message("system", system), *messages]


class LiveModifiers(Watched):
    """The modifiers of a store that are in use: of each domain the current version, and a canary beside it.

    The store is read when this is made, on `refresh`, and after `watch` every so often in a thread of its own, which
    also prepares new versions; asking what is in use reads memory alone. Safe for threads.
    """

    def __init__(self, store: Store, open_form: Callable[[Modifier], FlatAdapter | None] | None = None) -> None:
        """Read the store.

        Args:
            open_form: makes a version ready to be computed with, or only looks whether it is whole; raises a
                CascadeError for one that is not to be used. None takes them all.
        """
        super().__init__()
        self._store, self._open_form = store, open_form
        self._in_use: dict[tuple[str, Variant], Live] = {}
        self._shares: dict[str, float] = {}
        self._refused: dict[str, float] = {}  # sha256 of a version's file, and when to try it again
        self._refreshing = threading.Lock()
        self.refresh()

    def versions(self) -> dict[str, str]:
        """Version in use per domain, canaries left out."""
        return {d: live.modifier.version for (d, variant), live in self._in_use.items() if variant == "current"}

    def get(self, domain: str, variant: Variant = "current", version: str = "") -> Live | None:
        """What is in use of a domain: the version that is named; where it is not in use, or none is named, the variant,
        and the current one where there is no canary. None if the domain has no modifier."""
        in_use = self._in_use
        found = [live for (name, _), live in in_use.items() if name == domain and live.modifier.version == version]
        return found[0] if found else in_use.get((domain, variant)) or in_use.get((domain, "current"))

    def in_use(self) -> list[Live]:
        """All that is in use, canaries included."""
        return list(self._in_use.values())

    def pick(self, domain: str, key: str) -> Variant:
        """Which variant a request gets, by the canary's share; the same key always gets the same."""
        point = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
        return "canary" if point < self._shares.get(domain, 0.0) else "current"

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

    def _usable(self, domain: str, variant: Variant, read: Callable[[], Modifier | None]) -> Live | None:
        """What shall be in use now: as the store says, or what was before where that is bad."""
        before = self._in_use.get((domain, variant))
        modifier = None
        try:
            modifier = read()
            if modifier is None:
                return None
        except CascadeError as error:
            logger.error("the %s modifier of %s cannot be read: %s", variant, domain, error)
        if modifier is not None:
            if before is not None and before.modifier == modifier:
                return before
            if (opened := self._opened(modifier)) is not None:
                return opened
        return before or (self._newest_older(domain, modifier) if variant == "current" else None)

    def _newest_older(self, domain: str, bad: Modifier | None) -> Live | None:
        """The newest version that can be used, of those made before the bad one if that can be told."""
        for modifier in reversed(modifiers.list_modifiers(self._store, domain, skip_damaged=True)):
            older = bad is None or modifier.created < bad.created
            if older and (opened := self._opened(modifier)) is not None:
                logger.error("the current modifier of %s cannot be used: %s answers instead", domain, modifier.name)
                return opened
        return None

    def _opened(self, modifier: Modifier) -> Live | None:
        """A version made ready; None if it is refused."""
        if time.monotonic() < self._refused.get(modifier.sha256, 0.0):
            return None
        try:
            opened = Live(modifier, self._open_form(modifier) if self._open_form else None)
        except Exception as error:  # files of any content, a disk that is full
            logger.error("modifier %s is refused: %r", modifier.name, error)
            self._refused[modifier.sha256] = time.monotonic() + _RETRY_S
            return None
        self._refused.pop(modifier.sha256, None)
        return opened


def _version(store: Store, domain: str, canary: Canary | None) -> Modifier | None:
    return None if canary is None else modifiers.get(store, domain, canary.version)


def stand_in(route: Route) -> Route:
    """The base's route, where what was chosen cannot be used now."""
    return Route(BASE, route.probabilities.get(BASE, 0.0), "unavailable", route.probabilities)


class LiveRouter(Watched):
    """The current router of a store, read when this is made, on `refresh`, and after `watch` every so often in a thread
    of its own: routing reads memory alone. Safe for threads.
    """

    def __init__(self, store: Store, cache: Path) -> None:
        super().__init__()
        self._store, self._cache = store, cache
        self._refused: tuple[str | None, float] = None, 0.0
        self._version: str | None = None
        self._model: RouterModel | None = None
        self.refresh()

    def route(
        self, messages: list[Message], available: dict[str, str], threshold: float | None, mode: Mode = "default"
    ) -> Route:
        """Who answers a conversation.

        Args:
            available: the modifiers that can be had; a router trained when there were others may choose one that is
                gone, and then the base answers ("unavailable").
        """
        model = self._model
        if model is None:
            return Route(BASE, 0.0, "no-router")
        route = model.route(messages, threshold, mode)
        if route.choice != BASE and route.choice not in available:
            return stand_in(route)
        return route

    def override(self, messages: list[Message], choice: str) -> Route:
        """The route to a candidate that the client named, with what the router thinks of it (0 if nothing)."""
        model = self._model
        probabilities = model.route(messages).probabilities if model else {}
        return Route(choice, probabilities.get(choice, 0.0), "override", probabilities)

    def refresh(self) -> None:
        """Read the store once. Whatever goes wrong, the router that was in use stays."""
        version: str | None = None
        try:
            version = routers.current_version(self._store)
            refused, until = self._refused
            if version == self._version or (version == refused and time.monotonic() < until):
                return
            found = routers.load_current(self._store, self._cache)
        except Exception as error:  # a store that is away, files of any content
            logger.error("the router %s cannot be used: %r", version, error)
            self._refused = version, time.monotonic() + _RETRY_S
            return
        self._version, self._model = found or (None, None)
