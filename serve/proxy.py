"""What Ray Serve's HTTP proxy runs around every request, where `python -m serve` starts Ray itself.

Requests beyond the engines' room are refused in the proxy, before they cost a call to any other process; and what the
proxy itself answers (no replica is up, say) carries the headers that all responses do. A Ray that runs already has
proxies of its own making: there the gateway does the same one step later, for all that reaches it.
"""

from __future__ import annotations

import os

from ray.util.metrics import Counter
from starlette.middleware import Middleware

from serve.middleware import Admission, ResponseHeaders

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ROOM_VARIABLE = "CASCADE_SERVE_ROOM"


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
    admission = Middleware(Admission, most=room, refused=lambda: failures.inc(1, {"status": "429"}))
    return [admission, Middleware(ResponseHeaders)]
