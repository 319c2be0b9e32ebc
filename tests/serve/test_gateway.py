"""The HTTP side with a real engine behind it, asked by the official client; no Ray."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from stand_in import DOMAINS, LETTERS_QUESTION, SUMS_QUESTION, SYSTEM, compressed_adapter

from cascade import modifiers
from cascade.benchmarks import get
from cascade.errors import DataError
from cascade.models.chat import prompt_text
from cascade.models.generation import generate
from cascade.models.rows import Request
from cascade.store import Store
from cascade.tasks import Message
from serve.engine import Engine
from serve.events import Delta, Failed, Finished, Started, TokenLogprob, Work
from serve.feedback import FeedbackLog
from serve.gateway import Gateway
from serve.http import build_api
from serve.keys import KeyRing, add_key, read_keys, revoke_key
from serve.live import LiveModifiers, LiveRouter


def ask(model: str, question: str, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 12} | more


@pytest.fixture
def gateway(stand_in, engine, tmp_path) -> Gateway:
    router = LiveRouter(stand_in.store, tmp_path)
    return Gateway(engine, LiveModifiers(stand_in.store), router)


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_api(gateway), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
        yield client


@pytest.fixture
def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://cascade/v1", api_key="none", http_client=http, max_retries=0)


def expected(reference, choice: str, question: str, *, system: str | None = None) -> str:
    messages = [Message("system", system)] if system else []
    return reference(Work(choice, (*messages, Message("user", question)), 12, temperature=0.0))


async def test_a_routed_answer_says_who_gave_it(client, stand_in, reference) -> None:
    for domain, question in zip(DOMAINS, (LETTERS_QUESTION, SUMS_QUESTION), strict=True):
        raw = await client.chat.completions.with_raw_response.create(**ask("cascade", question, temperature=0))
        answer = raw.parse()
        system = SYSTEM if domain == "letters" else None
        assert answer.choices[0].message.content == expected(reference, domain, question, system=system)
        used = answer.usage
        assert answer.choices[0].finish_reason == ("length" if used.completion_tokens == 12 else "stop")
        assert used.total_tokens == used.prompt_tokens + used.completion_tokens > used.prompt_tokens > 20
        assert answer.model == domain
        assert raw.headers["x-cascade-route"] == domain
        assert raw.headers["x-cascade-reason"] == "router"
        assert raw.headers["x-cascade-modifier-version"] == LiveModifiers(stand_in.store).versions()[domain]
        assert 0.5 < float(raw.headers["x-cascade-confidence"]) < 1
        assert float(raw.headers["x-cascade-queue-ms"]) >= float(raw.headers["x-cascade-swap-ms"]) > 0
        assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"


async def test_small_talk_goes_to_the_base_with_low_confidence(client) -> None:
    raw = await client.chat.completions.with_raw_response.create(**ask("cascade", "Tell me a joke about cats."))
    assert raw.headers["x-cascade-route"] == "base"
    assert raw.headers["x-cascade-reason"] == "low-confidence"
    assert float(raw.headers["x-cascade-confidence"]) < 0.2
    assert raw.headers["x-cascade-modifier-version"] == ""


async def test_a_threshold_of_its_own(client) -> None:
    more = {"extra_body": {"router_threshold": 1.0}}
    raw = await client.chat.completions.with_raw_response.create(**ask("cascade", SUMS_QUESTION), **more)
    assert (raw.headers["x-cascade-route"], raw.headers["x-cascade-reason"]) == ("base", "low-confidence")


async def test_an_override_is_obeyed_and_says_what_the_router_thinks_of_it(client) -> None:
    sure = {}
    for model in ("sums", "letters"):
        raw = await client.chat.completions.with_raw_response.create(**ask(model, SUMS_QUESTION))
        assert (raw.headers["x-cascade-route"], raw.headers["x-cascade-reason"]) == (model, "override")
        sure[model] = float(raw.headers["x-cascade-confidence"])
    assert sure["letters"] < 0.3 < 0.5 < sure["sums"]


async def test_streams_come_to_the_same_and_carry_the_headers(client, reference) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        **ask("sums", LETTERS_QUESTION, temperature=0), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in raw.parse()]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(reference, "sums", LETTERS_QUESTION)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert len({c.id for c in chunks}) == 1
    assert raw.headers["x-cascade-route"] == "sums"
    assert raw.headers["x-cascade-reason"] == "override"
    assert raw.headers["x-request-id"]


async def test_the_modifiers_own_system_message_is_put_in_front_only_where_there_is_none(client, reference) -> None:
    body = ask("letters", "hello", temperature=0)
    assert (await client.chat.completions.create(**body)).choices[0].message.content == expected(
        reference, "letters", "hello", system=SYSTEM
    )
    body["messages"] = [{"role": "system", "content": "Shout."}, *body["messages"]]
    assert (await client.chat.completions.create(**body)).choices[0].message.content == expected(
        reference, "letters", "hello", system="Shout."
    )
    base = await client.chat.completions.create(**ask("base", "hello", temperature=0))
    assert base.choices[0].message.content == expected(reference, "base", "hello")


async def test_a_request_without_a_temperature_gets_the_servers(gateway, client, reference) -> None:
    gateway.temperature = 0.0
    answers = [await client.chat.completions.create(**ask("sums", "hello")) for _ in range(2)]
    assert {a.choices[0].message.content for a in answers} == {expected(reference, "sums", "hello")}
    hot = await client.chat.completions.create(**ask("sums", "hello", temperature=1.5))
    assert hot.choices[0].message.content != answers[0].choices[0].message.content


async def test_models_are_listed(client) -> None:
    names = [m.id async for m in client.models.list()]
    assert names == ["cascade", "base", *DOMAINS]
    assert (await client.models.retrieve("sums")).id == "sums"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4")


async def test_an_unknown_model_is_a_404_that_names_those_there_are(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(**ask("../../etc/passwd", "hi"))
    assert caught.value.code == "model_not_found"
    assert "letters" in caught.value.message
    assert caught.value.response.headers["x-request-id"]


async def test_unsupported_parameters_reach_the_client_by_name(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**ask("base", "hi"), presence_penalty=0.5)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "presence_penalty")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/chat/completions", 400)],
)
async def test_every_error_has_the_one_shape(http, method: str, path: str, status: int) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


async def test_a_defect_is_a_500_that_tells_nothing(gateway, http, monkeypatch) -> None:
    def broken(request: object) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(gateway, "_route", broken)
    response = await http.post("/v1/chat/completions", json=ask("base", "hi"))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


class Scripted:
    """A backend that says what it is told to."""

    def __init__(self, *events: object) -> None:
        self.events, self.closed, self.begun = events, False, asyncio.Event()

    async def stream(self, work: Work):
        self.begun.set()
        try:
            for event in self.events:
                yield event
            await asyncio.sleep(60)
        finally:
            self.closed = True

    async def healthy(self) -> bool:
        return False


async def test_overload_is_a_429_with_retry_after_and_the_route(gateway, http, client) -> None:
    gateway.backend = Scripted(Failed(429, "busy", "overloaded", retry_after_s=1))
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(**ask("sums", "hi"))
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-cascade-route"] == "sums"
    assert caught.value.type == "rate_limit_error"


async def test_a_stream_that_breaks_says_so(gateway, client) -> None:
    gateway.backend = Scripted(Started("", 3, 0.0, 0.0), Failed(503, "lost", "engine_lost"))
    stream = await client.chat.completions.create(**ask("base", "hi"), stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        async for _ in stream:
            pass


async def test_a_client_that_leaves_ends_the_work(gateway) -> None:
    """Below HTTP: the ASGI server says that the client has gone."""
    for stream in (False, True):
        gateway.backend = Scripted(Started("", 3, 0.0, 0.0))
        body = httpx.Request("POST", "http://x", json=ask("base", "hi", stream=stream)).read()
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive(messages=messages, gone=gone):
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        path = "/v1/chat/completions"
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [],
            "query_string": b"",
            "http_version": "1.1",
        }
        task = asyncio.create_task(build_api(gateway)(scope, receive, send))
        await asyncio.wait_for(gateway.backend.begun.wait(), 60)
        assert not gateway.backend.closed
        gone.set()
        if not stream:  # Ray Serve cancels the request's task; a stream notices by itself
            task.cancel()
        await asyncio.wait([task], timeout=50)
        assert gateway.backend.closed


async def test_health_is_that_of_the_engine(gateway, http) -> None:
    for path in ("/health", "/ready"):
        assert (await http.get(path)).json() == {"status": "ok"}
    gateway.backend = Scripted()
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/health")).status_code == 503


async def test_without_a_router_the_base_answers(gateway, client, tmp_path, stand_in) -> None:
    gateway.router = LiveRouter(stand_in.store.child("nothing-here"), tmp_path)
    raw = await client.chat.completions.with_raw_response.create(**ask("cascade", SUMS_QUESTION))
    assert (raw.headers["x-cascade-route"], raw.headers["x-cascade-reason"]) == ("base", "no-router")


async def test_a_route_to_a_modifier_that_is_gone_falls_back(gateway) -> None:
    route = gateway.router.route([Message("user", SUMS_QUESTION)], {"letters": "1"}, None)
    assert (route.choice, route.reason) == ("base", "unavailable")


class Bare(Scripted):
    """A backend that has no modifier."""

    async def stream(self, work: Work):
        if work.choice != "base":
            yield Failed(503, "there is none", "modifier_unavailable")
            return
        for event in (Started("", 3, 0.0, 0.0), Delta("yes"), Finished("stop", 1)):
            yield event


@pytest.mark.parametrize("stream", [False, True])
async def test_the_base_stands_in_for_a_modifier_that_the_router_chose_and_no_engine_has(gateway, http, stream) -> None:
    gateway.backend = Bare()
    answer = await http.post("/v1/chat/completions", json=ask("cascade", SUMS_QUESTION, stream=stream))
    assert answer.status_code == 200
    assert "yes" in answer.text
    assert '"model":"base"' in answer.text.replace(" ", "")
    said = {name: answer.headers[f"x-cascade-{name}"] for name in ("route", "reason", "modifier-version")}
    assert said == {"route": "base", "reason": "unavailable", "modifier-version": ""}
    assert float(answer.headers["x-cascade-confidence"]) < 0.5
    named = await http.post("/v1/chat/completions", json=ask("sums", SUMS_QUESTION, stream=stream))
    assert (named.status_code, named.json()["error"]["code"]) == (503, "modifier_unavailable")


async def test_more_answers_than_there_is_ever_room_for_are_refused_by_name(stand_in, make_engine, tmp_path) -> None:
    """A 429 would have clients try again for ever."""
    router = LiveRouter(stand_in.store, tmp_path)
    gateway = Gateway(make_engine(rows=1, waiting=2), LiveModifiers(stand_in.store), router, most_answers=3)
    transport = httpx.ASGITransport(build_api(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as http:
        for prompts, n, param in ((3, 1, None), (1, 3, None), (4, 1, "prompt"), (1, 4, "n"), (2, 2, "n")):
            body = {"model": "base", "prompt": ["hi"] * prompts, "n": n, "max_tokens": 2}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == (400 if param else 200)
            if param:
                error = answer.json()["error"]
                assert error["param"] == param
                assert "rows=" in error["message"]
        assert (await http.post("/v1/chat/completions", json=ask("base", "hi", n=4))).json()["error"]["param"] == "n"


async def test_several_answers_to_one_request(client, reference) -> None:
    body = ask("sums", "hello", temperature=1.0, seed=5)
    answer = await client.chat.completions.create(**body, n=3)
    work = Work("sums", (Message("user", "hello"),), 12, temperature=1.0)
    wanted = [reference(replace(work, seed=5 + i)) for i in range(3)]
    assert [c.message.content for c in answer.choices] == wanted
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens > 12
    texts = ["", "", ""]
    async for chunk in await client.chat.completions.create(**body, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == wanted


async def test_logprobs_are_those_of_the_model(client, loaded) -> None:
    body = ask("base", "hello", temperature=0, logprobs=True, top_logprobs=3)
    answer = await client.chat.completions.create(**body)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert "".join(t.token for t in content) == answer.choices[0].message.content or "\ufffd" in str(content)
    text = prompt_text(loaded.tokenizer, [Message("user", "hello")])
    prompt = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    best = loaded.model(prompt).logits[0, -1].log_softmax(-1).topk(3)
    assert content[0].logprob == pytest.approx(float(best.values[0]), abs=1e-4)
    assert [t.logprob for t in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    streamed = []
    async for chunk in await client.chat.completions.create(**body, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in content], abs=1e-4)


async def test_bytes_of_characters_that_several_tokens_make(client) -> None:
    """A token of this vocabulary is a byte: joined they are the text, though most of them are no character alone."""
    answer = await client.chat.completions.create(
        **ask("base", "hello", temperature=0, logprobs=True, top_logprobs=2) | {"max_tokens": 60}
    )
    (choice,) = answer.choices
    content = choice.logprobs.content
    joined = b"".join(bytes(t.bytes) for t in content)
    assert joined.decode("utf-8", "replace") == choice.message.content
    assert all(len(t.bytes) == 1 for t in content)
    assert {t.token for t in content if t.bytes[0] > 127} == {"\ufffd"}
    assert all(t.top_logprobs[0].bytes == t.bytes for t in content)


async def test_offsets_of_a_completion_go_on_from_event_to_event(gateway, client) -> None:
    deltas = [Delta(t, (TokenLogprob(t, -1.0, ((t, -1.0),)),)) for t in ("ab", "c", "def")]
    gateway.backend = Scripted(Started("", 3, 0.0, 0.0), *deltas, Finished("length", 3))
    asked = {"model": "base", "prompt": "x", "logprobs": 1}
    whole = (await client.completions.create(**asked)).choices[0].logprobs.text_offset
    parts = [c.choices[0].logprobs async for c in await client.completions.create(**asked, stream=True)]
    assert whole == [i for p in parts if p for i in p.text_offset] == [0, 2, 3]


async def test_what_some_take_for_the_end_of_a_line_ends_none(gateway, http) -> None:
    text = "a\x85b\u2028c\u2029d\u00e9\x0b\x1e\n"
    gateway.backend = Scripted(Started("", 3, 0.0, 0.0), Delta(text), Finished("stop", 1))
    async with http.stream("POST", "/v1/completions", json={"model": "base", "prompt": "hi", "stream": True}) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == text


async def test_every_event_of_a_stream_says_whether_usage_comes(http) -> None:
    for more, wanted in (({"stream_options": {"include_usage": True}}, [True, True]), ({}, [False, False])):
        text = (await http.post("/v1/chat/completions", json=ask("base", "hi", stream=True, **more))).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert ["usage" in e for e in (events[0], events[-1])] == wanted
        assert [e["usage"] for e in events[:-1] if "usage" in e] == [None] * (len(events) - 1) * wanted[0]


async def test_completions_continue_raw_text(client, loaded) -> None:
    raw = await client.completions.with_raw_response.create(
        model="base", prompt="Once upon", max_tokens=8, temperature=0, logprobs=1
    )
    answer = raw.parse()
    ids = loaded.tokenizer("Once upon").input_ids
    assert answer.choices[0].text == generate(loaded, [Request(ids, 8)])[0].text
    assert answer.usage.prompt_tokens == len(ids)
    assert len(answer.choices[0].logprobs.tokens) == 8
    assert raw.headers["x-cascade-route"] == "base"
    stream = await client.completions.create(model="base", prompt="Once upon", max_tokens=8, temperature=0, stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == answer.choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_answers_keep_to_a_json_schema(client, temperature: float) -> None:
    """A random model knows no JSON at all."""
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    body = ask("letters", "Where to?", temperature=temperature, response_format=form, seed=3) | {"max_tokens": 60}
    answer = await client.chat.completions.create(**body, n=4)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"


async def test_schemas_that_cannot_be_kept_to_are_refused(client) -> None:
    for schema in (
        {"type": "nonsense"},
        {"$ref": "http://example.com/schema"},
        {"type": "string", "pattern": "(?<=a)b"},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**ask("base", "hi", response_format=form))
        assert caught.value.param == "response_format"


async def test_calls_come_out_as_tool_calls(gateway, client) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    said = (Started("1", 3, 0.0, 0.0), Delta("[add(a=1, "), Delta("b='x')]"), Finished("stop", 9))
    gateway.backend = Scripted(*said)
    answer = await client.chat.completions.create(**ask("base", "hi"), tools=[tool])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": "x"})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    chunks = [c async for c in await client.chat.completions.create(**ask("base", "hi"), tools=[tool], stream=True)]
    deltas = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert deltas[0][0].function.name == "add"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    gateway.backend = Scripted(said[0], Delta("No tool fits."), Finished("stop", 4))
    answer = await client.chat.completions.create(**ask("base", "hi"), tools=[tool])
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == ("No tool fits.", None)


async def test_modes_lean_to_the_base_or_to_modifiers(gateway) -> None:
    model = gateway.router._model
    even = np.array([0.5, 0.5, 0.4])
    assert [model.decide(0.9, even, 0.5, h).choice for h in (0.0, 0.15, -0.15)] == ["base", "base", "letters"]
    ahead = np.array([0.5, 0.6, 0.1])
    assert [model.decide(0.9, ahead, 0.5, h).choice for h in (0.0, 0.15)] == ["letters", "base"]
    assert model.route(SUMS_QUESTION, mode="max-quality").choice == "sums"


async def test_disliked_answers_become_tasks(gateway, client, http, tmp_path) -> None:
    assert (await http.post("/v1/feedback", json={"request_id": "x", "rating": "bad"})).status_code == 404
    store = Store(str(tmp_path / "log"))
    gateway.feedback = FeedbackLog(store)
    raw = await client.chat.completions.with_raw_response.create(**ask("sums", SUMS_QUESTION))
    request_id = raw.headers["x-request-id"]
    said = {"request_id": request_id, "rating": "bad"}
    assert (await http.post("/v1/feedback", json=said)).json()["rating"] == "bad"
    assert store.read_json(f"feedback/open/{request_id}.json")["route"] == "sums"
    assert (await http.post("/v1/feedback", json=said | {"answer": "42"})).status_code == 200
    assert store.list("feedback/open") == []
    options = {"path": store.path("feedback/tasks")}
    (task,) = get("jsonl").load("train", domain="sums", options=options, seed=1, count=None)
    assert (task.prompt, task.messages[-1].content) == (SUMS_QUESTION, SUMS_QUESTION)
    assert (await http.post("/v1/feedback", json=said | {"request_id": "nobody"})).status_code == 404
    assert (await http.post("/v1/feedback", json=said | {"rating": "meh"})).status_code == 400


async def test_a_store_that_hangs_holds_up_the_log_alone(gateway, http, monkeypatch) -> None:
    hangs, gateway.feedback = threading.Event(), FeedbackLog(Store("nowhere"))
    monkeypatch.setattr(gateway.feedback, "keep", lambda *given, **more: hangs.wait(120))
    gateway.backend = Scripted(Started("", 3, 0.0, 0.0), Delta("x"), Finished("stop", 1))
    try:
        for _ in range(40):  # more than threads that are there for everybody
            answer = await asyncio.wait_for(
                http.post("/v1/chat/completions", json=ask("cascade", "Tell me a joke.")), 60
            )
            assert answer.headers["x-cascade-reason"] == "low-confidence"
    finally:
        hangs.set()


async def test_an_answer_that_breaks_off_is_counted(gateway, http, monkeypatch) -> None:
    failures = []
    monkeypatch.setattr(
        gateway,
        "meters",
        SimpleNamespace(
            **{name: (lambda *said: None) for name in ("routed", "started", "finished")}, failed=failures.append
        ),
    )
    gateway.backend = Scripted(Started("", 3, 0.0, 0.0), Failed(503, "lost", "engine_lost"))
    for stream in (False, True):
        await http.post("/v1/chat/completions", json=ask("base", "hi", stream=stream))
    assert failures == [503, 503]


async def test_keys_are_asked_for_once_there_is_one(gateway, tmp_path) -> None:
    store = Store(str(tmp_path / "keys"))
    key = add_key(store, "me", requests_per_minute=3)
    assert key not in store.read_bytes("keys.json").decode()
    transport = httpx.ASGITransport(build_api(gateway, keys=KeyRing(store)))
    async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as http:
        for path in ("/", "/health", "/ready"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/openapi.json", "//v1/models", "/health/../v1/models"):
            for headers in ({}, {"authorization": "Bearer ck-wrong"}, {"authorization": key[:-1]}, {"host": "/health"}):
                refused = await http.get(path, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["x-request-id"]
        mine = {"authorization": f"Bearer {key}"}
        codes = [(await http.get("/v1/models", headers=mine)).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        limited = await http.get("/v1/models", headers=mine)
        assert 1 <= int(limited.headers["retry-after"]) <= 21
    with pytest.raises(DataError, match="taken"):
        add_key(store, "me")
    revoke_key(store, "me")
    assert read_keys(store) == []
    with pytest.raises(DataError, match="no key"):
        revoke_key(store, "me")


async def test_the_openapi_document_describes_the_bodies(http) -> None:
    document = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "Feedback", "ChatMessage"} <= set(schemas)
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used <= set(schemas)


class Several(Scripted):
    """A backend whose answers differ: the second one fails, the others go on until they are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.running = 0
        self.all_there = asyncio.Event()

    async def stream(self, work: Work):
        self.asked += 1
        if self.asked == 4:
            self.all_there.set()
        fails, self.running = self.asked == 2, self.running + 1
        try:
            yield Started("", 3, 0.0, 0.0)
            await self.all_there.wait()
            if fails:
                yield Failed(503, "lost", "engine_lost")
            else:
                yield Delta("x")
                await asyncio.sleep(60)
        finally:
            self.running -= 1


async def test_where_one_of_several_answers_fails_the_others_are_ended(gateway, http) -> None:
    gateway.backend = Several()
    response = await http.post("/v1/chat/completions", json=ask("base", "hi", n=4))
    assert response.status_code == 503
    assert (gateway.backend.asked, gateway.backend.running) == (4, 0)


async def test_completions_of_several_prompts_and_of_token_ids(client, loaded) -> None:
    texts = ["Once upon", "Two and two"]
    ids = [loaded.tokenizer(t).input_ids for t in texts]
    alone = [generate(loaded, [Request(i, 8)])[0].text for i in ids]
    more = {"model": "base", "max_tokens": 8, "temperature": 0}
    for prompt in (texts, ids):
        answer = await client.completions.create(prompt=prompt, n=2, **more)
        assert [c.text for c in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
        assert [c.index for c in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert (await client.completions.create(prompt=ids[0], **more)).choices[0].text == alone[0]
    for prompt, model in (([10**6], "base"), (ids[0], "cascade")):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(**more | {"model": model}, prompt=prompt)
        assert caught.value.param == ("prompt" if model == "base" else "model")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(**more | {"max_tokens": 5000}, prompt=texts[0])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


async def test_gateway_and_engine_speak_of_the_same_version(loaded, stand_in, tmp_path) -> None:
    """Whatever the gateway believes: what is said to have answered is what did, under its own system message."""
    shutil.copytree(stand_in.store.path(), tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    engine = Engine(loaded, store, tmp_path / "forms")
    gateway = Gateway(engine, LiveModifiers(store), LiveRouter(store, tmp_path))
    asked = ask("letters", "hello", temperature=0)
    transport = httpx.ASGITransport(build_api(gateway))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as http:
            before = await http.post("/v1/chat/completions", json=asked)
            content = compressed_adapter(Path(stand_in.config.base.model), 77)
            new = modifiers.publish(store, "letters", content, fp16_size=10_000, system="In verse.").version
            gateway.modifiers.refresh()  # ahead of the engine, which is asked for what it has not got
            behind = await http.post("/v1/chat/completions", json=asked)
            engine.modifiers.refresh()
            after = await http.post("/v1/chat/completions", json=asked)
    finally:
        engine.close()
    old = before.headers["x-cascade-modifier-version"]
    assert [r.headers["x-cascade-modifier-version"] for r in (behind, after)] == [old, new]
    assert behind.json()["usage"] == before.json()["usage"]  # the old one's system message, not the new one's
    assert behind.json()["choices"] == before.json()["choices"]
    assert after.json()["usage"]["prompt_tokens"] != before.json()["usage"]["prompt_tokens"]


async def test_feedback_is_taken_from_the_key_that_asked(gateway, tmp_path) -> None:
    store = Store(str(tmp_path / "keys"))
    gateway.feedback, gateway.backend = FeedbackLog(store), Scripted(Started("", 3, 0.0, 0.0), Finished("stop", 1))
    keys = {name: {"authorization": f"Bearer {add_key(store, name)}", "x-request-id": "r1"} for name in ("me", "eve")}
    transport = httpx.ASGITransport(build_api(gateway, keys=KeyRing(store)))
    async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as http:
        await http.post("/v1/chat/completions", json=ask("base", "hi"), headers=keys["me"])
        said = {"request_id": "r1", "rating": "bad"}
        codes = [(await http.post("/v1/feedback", json=said, headers=keys[k])).status_code for k in ("eve", "me")]
    assert codes == [404, 200]
