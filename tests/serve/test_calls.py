"""The official client's tool loop, from the first question to the answer that the tools' results lead to; no Ray."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Literal

import httpx
import jsonschema
import llguidance
import openai
import pytest
from stand_in import StandIn

from cascade.routing.model import queries_of
from cascade.tasks import Message, Route
from serve.compiles import compiled
from serve.events import Delta, Finished, Started, TokenLogprob, Work
from serve.gateway import Gateway
from serve.http import build_api
from serve.live import LiveModifiers, LiveRouter
from serve.protocol import ChatRequest, parse

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Saint-Denis", 'the "old" town']},
        "user-id": {"type": "integer"},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 1},
        "exact": {"type": ["boolean", "null"]},
    },
    "required": ["city", "user-id"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {
                "in": {"enum": ["a", "b"]},
                "next": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
            },
            "required": ["in"],
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "get-weather", "description": None, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "3d", "parameters": {"type": "object", "properties": {}}}},
]
PLAN = {
    "type": "object",
    "properties": {"stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}, "minItems": 1, "maxItems": 2}},
    "required": ["stops"],
    "additionalProperties": False,
    "$defs": {"stop": {"enum": ["Oslo", "Rome"]}},
}
ASK = {"model": "letters", "messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 250, "tools": TOOLS}


@pytest.fixture
def gateway(stand_in: StandIn, loaded, make_engine, tmp_path, monkeypatch) -> Gateway:
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 8192)  # a token is a letter, and tools are long
    return Gateway(make_engine(), LiveModifiers(stand_in.store), LiveRouter(stand_in.store, tmp_path))


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx.ASGITransport(build_api(gateway), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as http:
        yield openai.AsyncOpenAI(base_url="http://cascade/v1", api_key="none", http_client=http, max_retries=0)


class Says:
    """A backend that answers with certain texts, one after the other, and keeps what it was asked."""

    def __init__(self, *texts: str, finish: Literal["stop", "length"] = "stop") -> None:
        self.texts, self.finish, self.asked = list(texts), finish, list[Work]()

    async def stream(self, work: Work):
        self.asked.append(work)
        text = self.texts.pop(0)
        yield Started("1", 3, 0.0, 0.0)
        yield Delta(text, (TokenLogprob(text, -0.5),) if work.logprobs is not None else ())
        yield Finished(self.finish, 1)

    async def healthy(self) -> bool:
        return True


async def test_the_documented_loop(gateway, client) -> None:
    """What the assistant said goes back as it came: with all that the client's classes hold."""
    gateway.backend = says = Says("[get_weather(city='Oslo', user_id=7), _3d()]", "It rains in Oslo.")
    messages: list[object] = [{"role": "user", "content": "Weather?"}]
    first = await client.chat.completions.create(model="letters", messages=messages, tools=TOOLS)
    messages.append(first.choices[0].message)
    calls = first.choices[0].message.tool_calls
    assert [c.function.name for c in calls] == ["get-weather", "3d"]
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo", "user-id": 7}
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "rain"} for c in calls]
    second = await client.chat.completions.create(model="letters", messages=messages, tools=TOOLS)
    messages.append(second.choices[0].message)
    assert second.choices[0].message.content == "It rains in Oslo."
    assert "[get_weather(city='Oslo', user_id=7), _3d()]" in [m.content for m in says.asked[1].messages]
    says.texts = ["You are welcome."]
    await client.chat.completions.create(model="letters", messages=[*messages, {"role": "user", "content": "Thanks"}])


async def test_a_tool_loop_is_routed_by_its_question_however_long_it_is(gateway, client, monkeypatch) -> None:
    read, route = [], gateway.router.route

    def routed(asked: list[Message], *more: object) -> Route:
        read.append(queries_of(asked))
        return route(asked, *more)

    monkeypatch.setattr(gateway.router, "route", routed)
    gateway.backend = says = Says(*["[_3d()]"] * 10)
    messages: list[object] = [{"role": "user", "content": "Weather?"}]
    for i in range(10):
        answer = await client.chat.completions.create(model="cascade", messages=messages, tools=TOOLS)
        said = answer.choices[0].message
        messages += [said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": f"rain, {i} mm"}]
    assert len(read) == 10
    assert all(queries == read[0] for queries in read)
    assert [query.splitlines()[0] for query in read[0]] == ["Weather?"]
    assert says.asked[1].messages[-1] == Message("user", "rain, 0 mm")


async def test_a_stream_put_together_can_be_sent_back(gateway, client) -> None:
    gateway.backend = Says("[get_weather(city='Oslo', user_id=7)]", "Rain.")
    async with client.chat.completions.stream(**ASK) as stream:
        async for _ in stream:
            pass
        message = (await stream.get_final_completion()).choices[0].message
    assert message.tool_calls[0].function.name == "get-weather"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    answer = await client.chat.completions.create(**ASK | {"messages": [*ASK["messages"], message, result]})
    assert answer.choices[0].message.content == "Rain."


@pytest.mark.parametrize("text", ["[get_weather(city='Oslo', user_id=7)]", "No tool fits."])
async def test_streams_with_tools_carry_log_probabilities(gateway, client, text: str) -> None:
    gateway.backend = Says(text)
    stream = await client.chat.completions.create(**ASK, stream=True, logprobs=True)
    found = [c.choices[0].logprobs async for c in stream if c.choices]
    assert [t.logprob for f in found if f for t in f.content] == [-0.5]


async def test_one_call_where_parallel_ones_are_not_wanted(gateway, client) -> None:
    gateway.backend = Says("[_3d(), get_weather(city='Oslo', user_id=7)]")
    answer = await client.chat.completions.create(**ASK, parallel_tool_calls=False)
    assert [c.function.name for c in answer.choices[0].message.tool_calls] == ["3d"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "whole"),
    [("[_3d()]", True), ("```\n[_3d()]\n```", True), ("[_3d(),", False), ("[_3d()", False), ("_3d()", False)],
)
async def test_a_list_that_was_cut_off_is_told_as_such(gateway, client, text: str, whole: bool, stream: bool) -> None:
    """Another call may have been to come, or another argument."""
    gateway.backend = Says(text, finish="length")
    if stream:
        async with client.chat.completions.stream(**ASK) as events:
            said = [event.chunk.choices[0] async for event in events if event.type == "chunk"]
        content = "".join(choice.delta.content or "" for choice in said)
        calls, reason = [choice for choice in said if choice.delta.tool_calls], said[-1].finish_reason
    else:
        choice = (await client.chat.completions.create(**ASK)).choices[0]
        content, calls, reason = choice.message.content or "", choice.message.tool_calls, choice.finish_reason
    assert reason == ("tool_calls" if whole else "length")
    assert bool(calls) is whole
    assert content == ("" if whole else text)


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("required", True, {"get-weather", "3d"}),
        ("required", False, {"get-weather", "3d"}),
        ({"type": "function", "function": {"name": "get-weather"}}, True, {"get-weather"}),
        ({"type": "function", "function": {"name": "3d"}}, True, {"3d"}),
    ],
)
async def test_a_call_can_be_required(client, choice: object, parallel: bool, names: set[str]) -> None:
    """Of a random model, which would never write one by itself."""
    body = ASK | {"tool_choice": choice, "parallel_tool_calls": parallel, "temperature": 0.7}
    for seed in range(4):
        answer = await client.chat.completions.create(**body, seed=seed)
        said = answer.choices[0]
        if said.finish_reason == "length":  # a random model may write lists without end
            continue
        calls = said.message.tool_calls
        assert calls, said
        assert {c.function.name for c in calls} <= names
        assert parallel or len(calls) == 1
        for call in calls:
            if call.function.name == "get-weather":
                jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"stops":["Oslo","Rome"]}', True),
        ("[3d()]", False),  # goes by another name between us and the model
        ("[_3d()]", True),
        ("[_3d(), _3d()]", True),
        ('{"stops":["Paris"]}', False),
        ('{ "stops":["Oslo"]}', False),
        ("Oslo", False),
    ],
)
def test_with_a_response_format_an_answer_is_a_call_or_json_of_it(text: str, taken: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "plan", "schema": PLAN}}
    grammar = parse(ChatRequest, json.dumps(ASK | {"response_format": form}).encode()).grammar
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), compiled(grammar.kind, grammar.text), log_level=0)
    assert not matcher.get_error()
    whole = matcher.try_consume_tokens(list(text.encode())) == len(text)
    assert (whole and matcher.is_accepting()) is taken
