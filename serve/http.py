"""The FastAPI application around a `Gateway`: paths, errors in OpenAI's shape, and what every request passes first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException

from serve.errors import ApiError
from serve.gateway import Gateway
from serve.keys import OWNER, KeyRing, RequireKey
from serve.middleware import Admission, ResponseHeaders
from serve.protocol import MAX_BODY_BYTES, ChatRequest, CompletionRequest, Feedback

_STILL_S, _BODY_S = 30.0, 300.0
"""How long a body may stand still, and take in all: while it comes, its request has a place at the door."""


async def _read_body(request: Request) -> bytes:
    """The body, read no further and waited for no longer than allowed.

    Raises:
        ApiError: 413 if it is too large, 408 if it does not come.
    """
    now = asyncio.get_running_loop().time
    body, latest = bytearray(), now() + _BODY_S
    try:
        async with asyncio.timeout(_STILL_S) as limit:
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    message = f"the request body has more than {MAX_BODY_BYTES} bytes"
                    raise ApiError(413, message, code="request_too_large")
                limit.reschedule(min(now() + _STILL_S, latest))
    except TimeoutError:
        message = f"the request body did not come: it may stand still for {_STILL_S:g} s and take {_BODY_S:g} s in all"
        raise ApiError(408, message, code="timeout") from None
    return bytes(body)


def _owner(request: Request) -> str:
    """Name of the API key that asks, "" where none is asked for."""
    return str(request.scope["state"].get(OWNER, ""))


def build_api(
    gateway: Gateway, *, keys: KeyRing | None = None, room: Callable[[], int] | None = None, proxied: bool = False
) -> FastAPI:
    """The FastAPI application.

    Args:
        keys: who is let in; None lets everybody in.
        room: says how many requests for answers may be in work or wait at one time, more get a 429 at once; None: any
            number.
        proxied: whether it runs behind Ray Serve's proxy; see `ResponseHeaders`.
    """
    api = FastAPI(title="Cascade", description="OpenAI-compatible chat with routed modifiers", version="1")
    _answer_looks(api, gateway)
    _answer_requests(api, gateway)
    _describe_bodies(api)
    _shape_errors(api)
    # The last one added is the first that a request meets.
    if room is not None:
        api.add_middleware(Admission, most=room, refused=partial(gateway.meters.failed, 429))
    if keys is not None:
        api.add_middleware(RequireKey, ring=keys)
    api.add_middleware(ResponseHeaders, proxied=proxied)
    return api


def _answer_looks(api: FastAPI, gateway: Gateway) -> None:
    """The chat page, whether it works, and which models there are."""
    page = resources.files("serve").joinpath("static/index.html").read_text(encoding="utf-8")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> str:
        return page

    @api.get("/health")
    async def health() -> JSONResponse:
        healthy = await gateway.healthy()
        return JSONResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

    @api.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = await gateway.ready()
        return JSONResponse({"status": "ok" if is_ready else "unavailable"}, 200 if is_ready else 503)

    @api.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(await gateway.models())

    @api.get("/v1/models/{name}")
    async def model(name: str) -> JSONResponse:
        listed = await gateway.models()
        entries = listed["data"]
        assert isinstance(entries, list)
        found = next((e for e in entries if e["id"] == name), None)
        if found is None:
            raise ApiError(404, f"The model {name[:80]!r} does not exist.", code="model_not_found", param="model")
        return JSONResponse(found)


def _answer_requests(api: FastAPI, gateway: Gateway) -> None:
    """What costs something or keeps something."""

    @api.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        return await gateway.chat(await _read_body(request), request.scope["state"]["request_id"], _owner(request))

    @api.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def complete(request: Request) -> Response:
        return await gateway.complete(await _read_body(request), request.scope["state"]["request_id"], _owner(request))

    @api.post("/v1/feedback", openapi_extra=_body_of(Feedback))
    async def feedback(request: Request) -> JSONResponse:
        return JSONResponse(await gateway.judge(await _read_body(request), _owner(request)))


_BODIES = (ChatRequest, CompletionRequest, Feedback)


def _body_of(kind: type[BaseModel]) -> dict[str, object]:
    """OpenAPI's description of a body that the gateway reads itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def _describe_bodies(api: FastAPI) -> None:
    """Put the schemas that `_body_of` refers to into the OpenAPI document."""
    kinds: list[tuple[type[BaseModel], JsonSchemaMode]] = [(kind, "validation") for kind in _BODIES]
    _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    plain = api.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
        return document

    api.openapi = described  # type: ignore[method-assign]


def _shape_errors(api: FastAPI) -> None:
    """Give every refusal OpenAI's shape; `ResponseHeaders` does so with defects."""

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @api.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers=error.headers)
