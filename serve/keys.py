"""API keys: made, listed and revoked here, hashed at rest, each with limits of its own.

    python -m serve.keys STORAGE add NAME [--requests-per-minute N]     prints the key, once
    python -m serve.keys STORAGE list
    python -m serve.keys STORAGE revoke NAME

As long as a storage has never had a key, its server asks for none. Once it has had one it stays closed: with the last
key revoked nobody is let in. A key is 32 random bytes, so that its SHA-256 tells nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cascade.errors import CascadeError, DataError, FormatError
from cascade.store import Store
from serve.errors import ApiError
from serve.watched import Watched

logger = logging.getLogger(__name__)

FILE = "keys.json"
OWNER = "key_name"
"""Where a request's state has the name of its key."""
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that need no key; everything else does."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Key(BaseModel):
    """What is stored of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=rf"^{_NAME.pattern}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int = Field(600, ge=1)
    created: float


_KEYS = TypeAdapter(list[Key])


def read_keys(store: Store) -> list[Key] | None:
    """The keys of a storage; None if it has never had one, which is not the same as having none left.

    Raises:
        FormatError: the file is damaged.
    """
    try:
        return _KEYS.validate_json(store.read_bytes(FILE))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise FormatError(f"{store.uri_of(FILE)} is damaged: {error.errors()[0]['msg']}") from None


def add_key(store: Store, name: str, requests_per_minute: int = 600) -> str:
    """Make a key.

    Returns:
        The key itself, which is stored nowhere.

    Raises:
        DataError: the name is taken or not allowed, or there is no such limit.
    """
    if requests_per_minute < 1:
        raise DataError(f"a key may ask once a minute at least, not {requests_per_minute} times")
    key = f"ck-{secrets.token_urlsafe(32)}"
    with _changing(store) as keys:
        if not _NAME.fullmatch(name) or any(k.name == name for k in keys):
            raise DataError(f"{name[:80]!r} is taken, or no name for a key: allowed is {_NAME.pattern}")
        made = Key(name=name, sha256=_digest(key), requests_per_minute=requests_per_minute, created=time.time())
        keys.append(made)
    return key


def revoke_key(store: Store, name: str) -> None:
    """
    Raises:
        DataError: there is no such key.
    """
    with _changing(store) as keys:
        if all(k.name != name for k in keys):
            raise DataError(f"there is no key {name[:80]!r}; there are {', '.join(k.name for k in keys) or 'none'}")
        keys[:] = [k for k in keys if k.name != name]


@contextlib.contextmanager
def _changing(store: Store) -> Iterator[list[Key]]:
    """The keys, to be changed within and then written; one change at a time, as far as the storage can tell.

    Raises:
        DataError: somebody else changed them meanwhile, in an object store, which knows no locks.
    """
    lock = FileLock(f"{store.path(FILE)}.lock") if store.is_local else contextlib.nullcontext()
    if store.is_local:
        os.makedirs(store.path(), exist_ok=True)
    with lock:
        before = read_keys(store)
        keys = list(before or ())
        yield keys
        if read_keys(store) != before:
            raise DataError(f"{store.uri_of(FILE)} was changed by somebody else just now: try again")
        store.write_bytes(FILE, _KEYS.dump_json(keys, indent=2))
        if not store.is_local and read_keys(store) != keys:
            raise DataError(f"{store.uri_of(FILE)} was changed by somebody else just now: see `list`, and try again")


@dataclass
class _Bucket:
    """What a key has left: filled evenly, at most a minute's worth."""

    left: float
    filled: float = field(default_factory=time.monotonic)

    def take(self, per_minute: int) -> float:
        """Take one request; returns 0, or the seconds until there is one to take."""
        now = time.monotonic()
        self.left = min(per_minute, self.left + (now - self.filled) * per_minute / 60)
        self.filled = now
        if self.left < 1:
            return (1 - self.left) * 60 / per_minute
        self.left -= 1
        return 0.0


class KeyRing(Watched):
    """The keys of a storage. Safe for threads.

    They are read when this is made, and after `watch` every few seconds in a thread of its own: letting requests in
    reads memory alone. What cannot be read, or is not there any more, opens nothing: keys known before are asked for.
    """

    def __init__(self, store: Store) -> None:
        """
        Raises:
            FormatError: the file of the keys is damaged.
        """
        super().__init__()
        self._store, self._lock = store, threading.Lock()
        self._keys = read_keys(store)
        self._buckets: dict[str, _Bucket] = {}

    def refresh(self) -> None:
        """Read the storage once.

        Raises:
            FormatError: the file of the keys is damaged.
        """
        found = read_keys(self._store)
        if found is None and self._keys is not None:
            logger.error("%s/%s is gone; the keys known before are asked for", self._store.uri, FILE)
            return
        self._keys = found

    def admit(self, authorization: str | None) -> str:
        """Let a request in.

        Args:
            authorization: the header of that name.

        Returns:
            The name of its key; "" where the storage has never had one.

        Raises:
            ApiError: 401 without a key that is known, 429 beyond its limit.
        """
        keys = self._keys
        if keys is None:
            return ""
        given = re.sub(r"^bearer ", "", authorization or "", flags=re.IGNORECASE).strip()
        digest = _digest(given)
        key = next((k for k in keys if hmac.compare_digest(k.sha256, digest)), None)
        if key is None:
            said = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise ApiError(401, f"{said} Send it as 'Authorization: Bearer KEY'.", code="invalid_api_key")
        with self._lock:
            bucket = self._buckets.setdefault(key.sha256, _Bucket(key.requests_per_minute))
            wait = bucket.take(key.requests_per_minute)
        if wait:
            message = f"This key may ask {key.requests_per_minute} times a minute."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=int(wait) + 1)
        return key.name


class RequireKey:
    """ASGI middleware: lets in who has a key, and notes whose it is (`OWNER`).

    Looks at the path as the application does, never at the Host header.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app, self._ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and get_route_path(scope) not in OPEN_PATHS:
            try:
                owner = self._ring.admit(Headers(scope=scope).get("authorization"))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            scope.setdefault("state", {})[OWNER] = owner
        await self._app(scope, receive, send)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def command_line() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description=__doc__)
    parser.add_argument("storage", help="folder or URI, as in the config")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and print it, once")
    add.add_argument("name", help="whose it is; letters, digits, dot, dash and underscore")
    add.add_argument("--requests-per-minute", type=int, default=600, help="requests that it may make a minute")
    commands.add_parser("revoke", help="end a key; servers follow within seconds").add_argument(
        "name", help="whose it is"
    )
    commands.add_parser("list", help="show names and limits")
    return parser


def main() -> int:
    options = command_line().parse_args()
    store = Store(options.storage)
    try:
        if options.command == "add":
            print(add_key(store, options.name, options.requests_per_minute))
        elif options.command == "revoke":
            revoke_key(store, options.name)
        for key in (read_keys(store) or []) if options.command == "list" else []:
            print(f"{key.name}  {key.requests_per_minute} requests a minute")
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.storage} cannot be used as a storage: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
