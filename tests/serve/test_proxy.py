"""What Ray Serve's proxy answers itself, made by the very functions of Ray that its proxy answers with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import httpx
import pytest
from ray.exceptions import RayActorError
from ray.serve._private.http_util import (
    _apply_middlewares,
    convert_object_to_asgi_messages,
    get_http_response_status,
    send_http_response_on_exception,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.middleware import NO_ROUTE
from serve.proxy import ROOM_VARIABLE, middlewares

CHAT = "/v1/chat/completions"
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


class FakeProxy:
    """Says certain messages, as Ray's proxy hands them on, and then ends."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self.messages, self.headers = list(messages), httpx.Headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = httpx.Headers(scope["headers"])
        for message in self.messages:
            await send(message)


def upon(error: BaseException, *, begun: bool = False) -> list[Message]:
    return send_http_response_on_exception(get_http_response_status(error, 5.0, "id"), begun)


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROOM_VARIABLE, "1")


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    """As the proxy is built: the app with Ray's own middleware and then ours around it."""
    transport = httpx.ASGITransport(_apply_middlewares(app, middlewares()), raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://cascade")


def assert_complete(response: httpx.Response) -> None:
    for name in ("x-request-id", *NO_ROUTE):
        assert len(response.headers.get_list(name)) == 1, name


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        (upon(BackPressureError(num_queued_requests=200, max_queued_requests=200, status_code=429)), 429, "overloaded"),
        (upon(BackPressureError(num_queued_requests=200, max_queued_requests=200)), 503, "not_ready"),
        (upon(DeploymentUnavailableError("gateway")), 503, "not_ready"),
        (convert_object_to_asgi_messages("Path '/' not found. Ping …", status_code=404), 503, "not_ready"),
        (convert_object_to_asgi_messages("This node is being drained.", status_code=503), 503, "not_ready"),
        (upon(TimeoutError()), 408, "timeout"),
        (upon(RayActorError()), 503, "gateway_lost"),
        (upon(RuntimeError("secret")), 503, "gateway_lost"),
    ],
)
async def test_the_proxys_own_errors_have_openais_shape(messages, status: int, code: str) -> None:
    async with client_of(FakeProxy(messages)) as http:
        response = await http.post(CHAT, json={}, headers={"x-request-id": "mine"})
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], set(error)) == (code, {"message", "type", "param", "code"})
    assert "secret" not in response.text
    assert "queued" not in response.text
    assert ("retry-after" in response.headers) == (status != 408)
    assert response.headers["x-request-id"] == "mine"
    assert_complete(response)


async def test_what_the_gateway_and_healthy_proxies_say_is_left_alone() -> None:
    refusal = {"error": {"message": "no", "type": "server_error", "param": None, "code": "its_own"}}
    app = Starlette()
    app.add_route("/json", lambda _: JSONResponse(refusal, 503, headers={"retry-after": "9"}))
    app.add_route("/-/healthz", lambda _: PlainTextResponse("success"))
    async with client_of(app) as http:
        refused, well = await http.get("/json"), await http.get("/-/healthz")
    assert (refused.status_code, refused.json(), refused.headers["retry-after"]) == (503, refusal, "9")
    assert (well.status_code, well.text) == (200, "success")
    assert_complete(refused)
    assert_complete(well)


@pytest.mark.parametrize("whole", [True, False])
async def test_a_stream_that_breaks_off_says_so(whole: bool) -> None:
    parts = [{"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}]
    end = [{"type": "http.response.body", "body": b"data: [DONE]\n\n"}] if whole else upon(RayActorError(), begun=True)
    async with client_of(FakeProxy([STREAM, *parts, *end])) as http:
        response = await http.post(CHAT, json={})
    assert response.status_code == 200
    assert ("gateway_lost" in response.text) == (not whole)
    assert response.text.endswith("\n\n")
    assert response.text.count("data: ") == 2


async def test_refusals_at_the_door_keep_the_requests_id() -> None:
    is_in, let_go = asyncio.Event(), asyncio.Event()

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        is_in.set()
        await let_go.wait()
        await JSONResponse({})(scope, receive, send)

    async with client_of(waits) as http:
        inside = asyncio.create_task(http.post(CHAT, json={}))
        await is_in.wait()
        refused = await http.post(CHAT, json={}, headers={"x-request-id": "mine"})
        let_go.set()
        assert (await inside).status_code == 200
    assert (refused.status_code, refused.headers["x-request-id"]) == (429, "mine")
    assert_complete(refused)


async def test_clients_give_ray_no_orders() -> None:
    """Ray would read each of these; one that is not UTF-8 would end in a 500."""
    orders = {
        "x-request-timeout-seconds": b"0.001",
        "x-request-disconnect-disabled": b"?1",
        "serve_multiplexed_model_id": b"\xff",
        "Serve-Multiplexed-Model-Id": b"other",
        "X-Session-Id": b"\xff",
        "x-request-id": b"\xff\xfe",
        "authorization": b"Bearer key",
    }
    proxy = FakeProxy(convert_object_to_asgi_messages({"fine": True}))
    async with client_of(proxy) as http:
        response = await http.post(CHAT, json={}, headers=orders)
    assert response.status_code == 200
    assert not {"x-request-timeout-seconds", "serve_multiplexed_model_id", "x-session-id"} & set(proxy.headers)
    assert "x-request-disconnect-disabled" not in proxy.headers
    assert "serve-multiplexed-model-id" not in proxy.headers
    assert proxy.headers["authorization"] == "Bearer key"
    assert proxy.headers.get_list("x-request-id") == [response.headers["x-request-id"]]
    assert response.headers["x-request-id"].isalnum()
