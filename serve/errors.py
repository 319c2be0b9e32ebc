"""Errors as OpenAI's clients expect them. Imports little: Ray Serve's proxy uses it too."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    Attributes:
        status: HTTP status.
        param: name of the parameter at fault, if one is.
        code: OpenAI's word for it.
        retry_after_s: sent as Retry-After.
        known_headers: what was known of the route when it failed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _sendable(message), code
        self.param = None if param is None else _sendable(param)
        self.retry_after_s = retry_after_s
        self.known_headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers={**self.known_headers, **self.headers()})


def _sendable(text: str) -> str:
    """A text without what UTF-8 has not got: lone surrogates, which JSON can bring in."""
    return text.encode("utf-8", "replace").decode()
