"""The HTTP side, without Ray: requests in OpenAI's shape are routed, handed to a backend, and answered.

Every answer, errors and streams included, carries `x-request-id`; once it is known who answers, also
`x-cascade-route`, `-modifier-version`, `-confidence`, `-reason`, `-queue-ms` and `-swap-ms`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from cascade.routing.model import BASE
from cascade.tasks import Message, Route
from serve.events import Backend, Delta, Event, Failed, Finished, Started, Variant, Work
from serve.live import LiveModifiers, LiveRouter
from serve.protocol import (
    DONE,
    MAX_BODY_BYTES,
    ROUTED,
    AnswerShape,
    ApiError,
    ChatRequest,
    Usage,
    model_list,
    parse_chat_request,
    route_headers,
    sse,
)

HEALTH_TIMEOUT_S = 5.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gateway:
    """Routes requests and shapes answers.

    The system message that a modifier was trained under is put in front of requests that have none: without it the
    modifier would see prompts unlike those it learned from.

    Attributes:
        temperature: for requests that name none.
    """

    def __init__(
        self,
        backend: Backend,
        modifiers: LiveModifiers,
        router: LiveRouter,
        *,
        temperature: float = 1.0,
    ) -> None:
        self.backend, self.modifiers, self.router = backend, modifiers, router
        self.temperature = temperature
        self.started = int(time.time())

    async def chat(self, body: bytes, request_id: str) -> Response:
        """Answer a chat completion request.

        Raises:
            ApiError: the request is refused, with the headers known by then.
        """
        request = parse_chat_request(body)
        route = await asyncio.to_thread(self._route, request)
        headers = route_headers(route)
        variant = self.modifiers.pick(route.choice, request_id)
        events = self.backend.stream(self._work(request, route, variant))
        try:
            first = await anext(events)
            if isinstance(first, Failed):
                raise _as_error(first, headers)
            assert isinstance(first, Started)
            headers |= {
                "x-cascade-modifier-version": first.version,
                "x-cascade-queue-ms": f"{first.queue_ms:.1f}",
                "x-cascade-swap-ms": f"{first.swap_ms:.1f}",
            }
            shape = AnswerShape.new(request_id, route.choice)
            if not request.stream:
                return await self._whole(events, first, shape, headers)
        except BaseException:
            await events.aclose()
            raise
        usage = request.stream_options is not None and request.stream_options.include_usage
        stream = _sse_stream(events, first, shape, usage)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return _ClosingStream(stream, media_type="text/event-stream", headers=headers)

    async def models(self) -> dict[str, object]:
        """The answer of /v1/models."""
        return model_list(await asyncio.to_thread(self.modifiers.versions), self.started)

    async def healthy(self) -> bool:
        """Whether a request would be answered."""
        try:
            return await asyncio.wait_for(self.backend.healthy(), HEALTH_TIMEOUT_S)
        except TimeoutError:
            return False

    def _route(self, request: ChatRequest) -> Route:
        available = self.modifiers.versions()
        if request.model == ROUTED:
            return self.router.route(request.conversation, available, request.router_threshold)
        if request.model == BASE or request.model in available:
            return self.router.override(request.conversation, request.model)
        names = ", ".join([ROUTED, BASE, *sorted(available)])
        message = f"The model {request.model[:80]!r} does not exist; there are {names}."
        raise ApiError(404, message, code="model_not_found", param="model")

    def _work(self, request: ChatRequest, route: Route, variant: Variant) -> Work:
        messages = request.conversation
        system = self.modifiers.system(route.choice, variant)
        if system and all(m.role != "system" for m in messages):
            messages = [Message("system", system), *messages]
        return Work(
            choice=route.choice,
            messages=tuple(messages),
            max_tokens=request.limit,
            stop=request.stops,
            temperature=self.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
            variant=variant,
            stream=bool(request.stream),
        )

    async def _whole(
        self, events: AsyncIterator[Event], first: Started, shape: AnswerShape, headers: dict[str, str]
    ) -> Response:
        text: list[str] = []
        async for event in events:
            if isinstance(event, Failed):
                raise _as_error(event, headers)
            if isinstance(event, Delta):
                text.append(event.text)
            if isinstance(event, Finished):
                usage = Usage.of(first.prompt_tokens, event.completion_tokens)
                return JSONResponse(shape.whole("".join(text), event.finish_reason, usage), headers=headers)
        raise _as_error(Failed(500, "the answer broke off", "internal_error"), headers)


class _ClosingStream(StreamingResponse):
    """Closes its iterator however it ends, so that the work of a client who has gone is cancelled at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _sse_stream(
    events: AsyncGenerator[Event, None], first: Started, shape: AnswerShape, usage: bool
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. Being closed (the client has gone) closes the work."""
    async with aclosing(events):
        yield shape.chunk({"role": "assistant", "content": ""})
        async for event in events:
            if isinstance(event, Delta):
                yield shape.chunk({"content": event.text})
            elif isinstance(event, Finished):
                yield shape.chunk({}, event.finish_reason)
                if usage:
                    yield shape.usage_chunk(Usage.of(first.prompt_tokens, event.completion_tokens))
                yield DONE
                return
            elif isinstance(event, Failed):
                yield sse(_as_error(event, {}).body())
                return


def _as_error(failure: Failed, headers: Mapping[str, str]) -> ApiError:
    error = ApiError(
        failure.status,
        failure.message,
        code=failure.code,
        param=failure.param,
        retry_after_s=failure.retry_after_s,
    )
    error.known_headers = dict(headers)
    return error


async def _read_body(request: Request) -> bytes:
    """The body, read no further than allowed."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the request body has more than {MAX_BODY_BYTES} bytes", code="request_too_large")
    return bytes(body)


def build_api(gateway: Gateway, *, proxied: bool = False) -> FastAPI:
    """The FastAPI application.

    Args:
        proxied: whether it runs behind Ray Serve's proxy; see `RequestIds`.
    """
    api = FastAPI(title="Cascade", description="OpenAI-compatible chat with routed modifiers", version="1")
    page = resources.files("serve").joinpath("static/index.html").read_text(encoding="utf-8")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> str:
        return page

    @api.get("/health")
    async def health() -> JSONResponse:
        healthy = await gateway.healthy()
        return JSONResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

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

    schema = {"requestBody": {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}}

    @api.post("/v1/chat/completions", openapi_extra=schema)
    async def chat(request: Request) -> Response:
        return await gateway.chat(await _read_body(request), request.scope["state"]["request_id"])

    _shape_errors(api)
    api.add_middleware(RequestIds, proxied=proxied)
    return api


def _shape_errors(api: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers={**error.known_headers, **error.headers()})

    @api.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers=error.headers)

    @api.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        message = "the server could not answer; its log says why"
        return JSONResponse(ApiError(500, message, code="internal_error").body(), 500)


class RequestIds:
    """ASGI middleware: gives every request an id, and every response the header `x-request-id`.

    Ray Serve's proxy does both itself: behind it (`proxied`) its id is taken over and no second header added.
    """

    def __init__(self, app: ASGIApp, proxied: bool) -> None:
        self._app, self._proxied = app, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "") if self._proxied else ""
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start" and not self._proxied:
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)
