"""What Ray Serve's HTTP proxy runs around every request, where `python -m serve` starts Ray itself.

Requests beyond the engines' room are refused in the proxy, before they cost a call to any other process; and what the
proxy itself says (no replica is up, say) gets OpenAI's error shape and the headers that all responses have. A Ray that
runs already has proxies of its own making: there the gateway does the same one step later, for all that reaches it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ray.util.metrics import Counter
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.middleware import REQUEST_ID, RETRY_AFTER_S, Admission, ResponseHeaders

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ROOM_VARIABLE = "CASCADE_SERVE_ROOM"

_ORDERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
    }
)
"""Headers by which Ray Serve lets a client change how its request is handled, with hyphens."""


def install(room: int) -> None:
    """Let proxies of a Ray that this process starts from now on call `middlewares`.

    Args:
        room: requests for answers that may be in work or wait at one time.
    """
    os.environ[CALLBACK_VARIABLE] = f"{__name__}:middlewares"
    os.environ[ROOM_VARIABLE] = str(room)


def middlewares() -> list[Middleware]:
    """For Ray Serve, which puts each around those before it."""
    failures = Counter("cascade_failures", "requests refused or broken off", ("status",))
    room = int(os.environ[ROOM_VARIABLE])
    admission = Middleware(Admission, most=lambda: room, refused=lambda: failures.inc(1, {"status": "429"}))
    return [Middleware(ProxyErrors), admission, Middleware(ResponseHeaders)]


class ProxyErrors:
    """Gives what Ray Serve's proxy says itself OpenAI's error shape, and keeps from it what only Ray is to decide.

    The proxy answers in plain text, which no error of the gateway is; or, where the gateway's replica was lost, it
    says nothing at all, and a stream just breaks off. Clients could turn off that they are missed when they leave
    (`x-request-disconnect-disabled`), and more: such headers are taken away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["state"]["request_id"]  # from `ResponseHeaders`
        answer = _Answer(send)
        await self._app({**scope, "headers": _cleaned(scope, request_id)}, receive, answer.send)
        if not answer.begun:
            error = answer.instead or _lost()
            error.known_headers = {REQUEST_ID: request_id}
            await error.response()(scope, receive, send)
        elif answer.streams and not answer.ended:
            event = f"data: {json.dumps(_lost().body())}\n\n"
            await send({"type": "http.response.body", "body": event.encode()})


class _Answer:
    """What comes of a request: the gateway's answer is sent on, what the proxy says is only noted.

    Attributes:
        instead: what is to be said in place of the proxy's own answer, if it gave one.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.streams = self.ended = False
        self.instead: ApiError | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=list(map(tuple, message["headers"]))).get("content-type", "")
            if message["status"] >= 400 and kind.startswith("text/plain"):
                self.instead = _proxy_error(message["status"])
            self.begun, self.streams = self.instead is None, kind.startswith("text/event-stream")
        if self.begun:
            self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)


def _proxy_error(status: int) -> ApiError:
    """What is said in place of an answer of the proxy's own."""
    if status == 408:
        return ApiError(408, "the answer took longer than this server allows", code="timeout")
    if status == 429:
        return ApiError(429, "the server is busy, try again shortly", code="overloaded", retry_after_s=RETRY_AFTER_S)
    if status in (404, 503):  # the application has every path: where one is not found, there is no application
        message = "the server is starting or stopping, try again shortly"
        return ApiError(503, message, code="not_ready", retry_after_s=RETRY_AFTER_S)
    return ApiError(status, "the server could not answer; its log says why", code="internal_error")


def _lost() -> ApiError:
    return ApiError(503, "the gateway was lost, try again", code="gateway_lost", retry_after_s=RETRY_AFTER_S)


def _cleaned(scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    """The request's headers without orders to Ray, and with the one id that the request has."""
    taken = _ORDERS | {REQUEST_ID.encode()}
    kept: list[Any] = [(n, v) for n, v in scope["headers"] if n.replace(b"_", b"-") not in taken]
    return [*kept, (REQUEST_ID.encode(), request_id.encode())]
