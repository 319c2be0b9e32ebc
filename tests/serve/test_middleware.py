"""What every response carries, and the door: with a real gateway, and a backend that says and waits as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from itertools import repeat
from pathlib import Path

import httpx
import pytest
import uvicorn
from engine_events import until
from served import served
from stand_in import SUMS_QUESTION, StandIn

from cascade import modifiers
from cascade.store import Store
from serve.events import Delta, Event, Failed, Finished, Started, Work
from serve.gateway import Gateway
from serve.http import build_api
from serve.keys import KeyRing, add_key
from serve.live import LiveModifiers, LiveRouter
from serve.middleware import NO_ROUTE, Admission, ResponseHeaders
from serve.protocol import MAX_BODY_BYTES

CHAT = "/v1/chat/completions"
PROMISED = {"x-request-id", *NO_ROUTE}


class Told:
    """A backend that says certain events, but only once it may."""

    def __init__(self, *events: Event) -> None:
        self.events, self.may, self.asked = events, asyncio.Event(), 0
        self.arrived = asyncio.Semaphore(0)

    async def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        self.asked += 1
        self.arrived.release()
        await self.may.wait()
        for event in self.events:
            yield event

    async def healthy(self) -> bool:
        return True


ANSWER = (Started("v1", 3, 20.0, 4.0), Delta("Hello."), Finished("stop", 2))


def ask(model: str = "base", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": SUMS_QUESTION}]} | more


@pytest.fixture
def gateway(stand_in: StandIn, tmp_path: Path) -> Gateway:
    backend = Told(*ANSWER)
    backend.may.set()
    return Gateway(backend, LiveModifiers(stand_in.store), LiveRouter(stand_in.store, tmp_path))


@pytest.fixture
def client(gateway: Gateway) -> httpx.AsyncClient:
    return client_of(build_api(gateway))


def client_of(app: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://cascade")


def assert_complete(response: httpx.Response) -> None:
    """All promised headers are there, each once."""
    for name in PROMISED:
        assert len(response.headers.get_list(name)) == 1, (name, response.status_code)
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/", None, 200),
        ("GET", "/health", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/openapi.json", None, 200),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/models/nobody", None, 404),
        ("GET", CHAT, None, 405),
        ("POST", CHAT, b"{", 400),
        ("POST", CHAT, b"[]", 400),
        ("POST", CHAT, b'{"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}', 404),
        ("POST", CHAT, b'{"model": "base", "messages": [], "presence_penalty": 1}', 400),
        ("POST", CHAT, b" " * (MAX_BODY_BYTES + 1), 413),
        ("POST", "/v1/feedback", b'{"request_id": "x", "rating": "bad"}', 404),
    ],
)
async def test_responses_without_a_route_carry_every_header(client, method, path, content, status) -> None:
    response = await client.request(method, path, content=content)
    assert response.status_code == status
    assert_complete(response)
    assert {name: response.headers[name] for name in NO_ROUTE} == NO_ROUTE


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_carry_their_own(client, stream: bool) -> None:
    response = await client.post(CHAT, json=ask("sums", stream=stream))
    assert response.status_code == 200
    assert_complete(response)
    said = {name.removeprefix("x-cascade-"): response.headers[name] for name in NO_ROUTE}
    assert said.pop("confidence") > "0.5"
    assert said == {
        "route": "sums",
        "modifier-version": "v1",
        "reason": "override",
        "queue-ms": "20.0",
        "swap-ms": "4.0",
    }


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_failures_behind_the_router_say_who_should_have_answered(client, gateway, stand_in, status: int) -> None:
    gateway.backend = Told(Failed(status, "no", "code", retry_after_s=7))
    gateway.backend.may.set()
    response = await client.post(CHAT, json=ask("sums"))
    assert (response.status_code, response.headers["retry-after"]) == (status, "7")
    assert_complete(response)
    assert response.headers["x-cascade-route"] == "sums"
    assert response.headers["x-cascade-modifier-version"] == modifiers.current(stand_in.store, "sums").version
    assert response.headers["x-cascade-queue-ms"] == "0.0"


async def test_a_defect_is_a_500_with_every_header(client, gateway, monkeypatch) -> None:
    monkeypatch.setattr(gateway, "_route", None)
    response = await client.post(CHAT, json=ask())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert_complete(response)


async def test_refused_keys_get_every_header(gateway, tmp_path) -> None:
    store = Store(str(tmp_path / "keys"))
    key = add_key(store, "me", requests_per_minute=1)
    async with client_of(build_api(gateway, keys=KeyRing(store))) as http:
        mine = {"authorization": f"Bearer {key}"}
        answers = [await http.get("/v1/models", headers=headers) for headers in ({}, mine, mine)]
    assert [a.status_code for a in answers] == [401, 200, 429]
    for answer in answers:
        assert_complete(answer)


async def test_behind_the_proxy_its_request_id_is_taken_over_and_sent_once(gateway) -> None:
    app = ResponseHeaders(build_api(gateway, proxied=True))  # as `serve.proxy` puts it around
    async with client_of(app) as http:
        inner = client_of(build_api(gateway, proxied=True))
        response = await inner.post(CHAT, json=ask(), headers={"x-request-id": "abc"})
        assert response.json()["id"] == "chatcmpl-abc"
        assert "x-request-id" not in response.headers
        for response in (await http.get("/nowhere"), await http.post(CHAT, json=ask())):
            assert_complete(response)


@pytest.fixture
async def crowd(gateway: Gateway) -> AsyncIterator[tuple[httpx.AsyncClient, Told]]:
    """A server with room for two, and its backend, which lets nobody go yet."""
    gateway.backend = Told(*ANSWER)
    async with client_of(build_api(gateway, room=lambda: 2)) as http:
        yield http, gateway.backend


async def until_asked(backend: Told, more: int) -> None:
    """Wait until so many more have come to the backend."""
    async with asyncio.timeout(10):
        for _ in range(more):
            await backend.arrived.acquire()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_excess_is_refused_before_anything_is_done_for_it(crowd, stream: bool) -> None:
    http, backend = crowd
    inside = [asyncio.create_task(http.post(CHAT, json=ask(stream=stream))) for _ in range(2)]
    await until_asked(backend, 2)
    for body in (b"{", b"x" * 10_000_000):  # bodies that would be refused otherwise, were they read
        refused = await http.post(CHAT, content=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        assert_complete(refused)
    assert (await http.get("/health")).status_code == (await http.get("/v1/models")).status_code == 200
    assert (await http.post("/v1/completions", json={})).status_code == 429
    backend.may.set()
    assert [r.status_code for r in await asyncio.gather(*inside)] == [200, 200]
    assert backend.asked == 2
    assert (await http.post(CHAT, json=ask())).status_code == 200


async def test_room_is_given_back_however_a_request_ends(crowd, gateway) -> None:
    http, backend = crowd
    for _ in range(3):
        leaving = asyncio.create_task(http.post(CHAT, json=ask()))
        await until_asked(backend, 1)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert (await http.post(CHAT, content=b"{")).status_code == 400
    backend.may.set()
    backend.events = (Failed(503, "lost", "engine_lost"),)
    assert [(await http.post(CHAT, json=ask())).status_code for _ in range(3)] == [503] * 3
    backend.events = (ANSWER[0],)  # breaks off
    assert [(await http.post(CHAT, json=ask())).status_code for _ in range(3)] == [500] * 3


async def test_a_client_that_sends_headers_and_no_body_gives_its_place_back(gateway, monkeypatch) -> None:
    monkeypatch.setattr("serve.http._STILL_S", 2.0)
    at_the_door: list[int] = []
    api = build_api(gateway, room=lambda: at_the_door.append(1) or 1)
    web = uvicorn.Server(uvicorn.Config(api, log_level="error"))
    with served(web) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: cascade\r\nContent-Length: 100\r\n\r\n".encode())
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http, asyncio.timeout(30):
            await until(lambda: bool(at_the_door))
            assert (await http.post(CHAT, json=ask())).status_code == 429
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            error = json.loads(await reader.readexactly(size))["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "timeout")
            assert (await http.post(CHAT, json=ask())).status_code == 200
        writer.close()


async def in_parts(parts, pause_s: float) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(pause_s)
        yield part


async def test_a_body_may_come_slowly_but_not_without_end(client, monkeypatch) -> None:
    monkeypatch.setattr("serve.http._STILL_S", 1.0)
    body = json.dumps(ask()).encode()
    parts = [body[i : i + len(body) // 6] for i in range(0, len(body), len(body) // 6)]
    assert (await client.post(CHAT, content=in_parts(parts, 0.2))).status_code == 200  # more than a second in all
    monkeypatch.setattr("serve.http._BODY_S", 1.5)
    for endless in (in_parts(repeat(b" "), 0.2), in_parts(repeat(b""), 0.2)):
        refused = await client.post(CHAT, content=endless)
        assert refused.status_code == 408
        assert_complete(refused)


async def test_refusals_are_counted() -> None:
    told: list[int] = []

    async def nothing(*_: object) -> None:
        raise AssertionError("let in")

    async with client_of(ResponseHeaders(Admission(nothing, lambda: 0, lambda: told.append(1)))) as http:
        assert [(await http.post(CHAT)).status_code for _ in range(3)] == [429] * 3
    assert len(told) == 3


@pytest.mark.parametrize("path", ["/prefix/v1/chat/completions", "/v1/completions/", "/a/b/v1/completions"])
async def test_the_door_stands_under_any_prefix(path: str) -> None:
    async def nothing(*_: object) -> None:
        raise AssertionError("let in")

    async with client_of(ResponseHeaders(Admission(nothing, lambda: 0, lambda: None))) as http:
        assert (await http.post(path)).status_code == 429


async def test_room_grows_with_the_engines(gateway: Gateway) -> None:
    gateway.backend = Told(*ANSWER)
    engines = 1
    async with client_of(build_api(gateway, room=lambda: engines)) as http:
        inside = [asyncio.create_task(http.post(CHAT, json=ask()))]
        await until_asked(gateway.backend, 1)
        assert (await http.post(CHAT, json=ask())).status_code == 429
        engines = 2
        inside.append(asyncio.create_task(http.post(CHAT, json=ask())))
        await until_asked(gateway.backend, 1)
        assert (await http.post(CHAT, json=ask())).status_code == 429
        gateway.backend.may.set()
        assert [r.status_code for r in await asyncio.gather(*inside)] == [200, 200]
