"""ASGI middleware: headers that every response carries, and the door at which excess requests are refused.

Imports little, because Ray Serve's proxy runs it too; see `serve.proxy`.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

logger = logging.getLogger("ray.serve")

REQUEST_ID = "x-request-id"
NO_ROUTE = {
    "x-cascade-route": "none",
    "x-cascade-modifier-version": "",
    "x-cascade-confidence": "0.0000",
    "x-cascade-reason": "not-routed",
    "x-cascade-queue-ms": "0.0",
    "x-cascade-swap-ms": "0.0",
}
"""What a response says that has no route, or as far as it has none: errors before routing, pages, lists."""
GENERATING = ("/v1/chat/completions", "/v1/completions")
"""How the paths end whose requests take room in an engine; the application may be served under a prefix."""
RETRY_AFTER_S = 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class ResponseHeaders:
    """Gives every request an id, and every response the headers in `NO_ROUTE` and the id, where it has not set them.

    A request that brings an id (`x-request-id`) keeps it, if it can be one.

    A defect is answered here, with a 500 that tells nothing, so that this response has them too.

    Args:
        proxied: whether it runs behind Ray Serve's proxy, which sends the ids itself.
    """

    def __init__(self, app: ASGIApp, proxied: bool = False) -> None:
        self._app, self._proxied = app, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        promised = NO_ROUTE if self._proxied else NO_ROUTE | {REQUEST_ID: request_id}
        begun = False

        async def send_complete(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": _completed(message.get("headers", ()), promised)}
            await send(message)

        try:
            await self._app(scope, receive, send_complete)
        except Exception:
            if begun:
                raise
            logger.exception("request %s could not be answered", request_id)
            error = ApiError(500, "the server could not answer; its log says why", code="internal_error")
            await error.response()(scope, receive, send_complete)


def _completed(headers: Iterable[tuple[bytes, bytes]], promised: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """The headers of a response with those that it lacks."""
    found = list(headers)
    there = {name.lower() for name, _ in found}
    return found + [(n.encode(), v.encode()) for n, v in promised.items() if n.encode() not in there]


class Admission:
    """Refuses what there is no room for with a 429 at once: its body is not read, nor is it routed or handed on.

    Args:
        most: says how many requests for answers may be here at one time, streams until their end.
        refused: told of every refusal.
    """

    def __init__(self, app: ASGIApp, most: Callable[[], int], refused: Callable[[], None]) -> None:
        self._app, self._most, self._refused = app, most, refused
        self._here = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith(GENERATING):
            await self._app(scope, receive, send)
            return
        if self._here >= self._most():
            self._refused()
            message = "the server is busy, try again shortly"
            error = ApiError(429, message, code="overloaded", retry_after_s=RETRY_AFTER_S)
            await error.response()(scope, receive, send)
            return
        self._here += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._here -= 1
