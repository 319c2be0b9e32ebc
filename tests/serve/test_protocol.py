"""Requests: what is taken, and that everything else is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cascade.benchmarks.jsonl import BENCHMARK as JSONL
from cascade.benchmarks.offered_functions import describes_functions
from cascade.scoring.calls import MAX_CHARS
from cascade.tasks import Message
from serve.protocol import MAX_BODY_BYTES, MAX_CHOICES, MAX_SCHEMA, ApiError, ChatRequest, CompletionRequest, parse
from serve.tools import MAX_DESCRIBED, Function, Tool, Toolbox

GOOD = {"model": "cascade", "messages": [{"role": "user", "content": "hi"}]}


def refused(**changes: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, json.dumps(GOOD | changes).encode())
    return caught.value


def test_a_full_request() -> None:
    body = GOOD | {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 5,
        "temperature": 0,
        "top_p": 1,
        "stop": ["x", "y"],
        "seed": -3,
        "user": "me",
        "metadata": {"a": "b"},
    }
    request = parse(ChatRequest, json.dumps(body).encode())
    assert request.conversation == [Message("system", "be brief"), Message("user", "ab")]
    assert (request.limit, request.stops, request.seed) == (5, ("x", "y"), -3)
    assert request.stream_options is not None
    assert request.stream_options.include_usage


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {"1": 5}),
        ("presence_penalty", 0.5),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
    ],
)
def test_unsupported_parameters_are_refused_by_name(name: str, value: object) -> None:
    error = refused(**{name: value})
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", name)
    assert name in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 1), ("tools", []), ("response_format", {"type": "text"}), ("logprobs", False), ("logit_bias", None)],
)
def test_values_that_ask_for_nothing_are_taken(name: str, value: object) -> None:
    parse(ChatRequest, json.dumps(GOOD | {name: value}).encode())


def test_unknown_parameters_are_refused_by_name() -> None:
    error = refused(temprature=0)
    assert (error.code, error.param) == ("unknown_parameter", "temprature")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "../x"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"title": "x" * MAX_SCHEMA}},
                }
            },
            "response_format",
        ),
        ({"router_mode": "warp"}, "router_mode"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content"),
        ({"stream_options": {"foo": 1}}, "stream_options.foo"),
        ({"router_threshold": 1.5}, "router_threshold"),
    ],
)
def test_bad_values_name_the_parameter(changes: dict[str, object], param: str) -> None:
    error = refused(**changes)
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith(param)


def test_missing_parameters_are_named() -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, b'{"model": "base"}')
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "messages")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"temperature": Infinity}'],
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400


def test_lone_surrogates_are_refused() -> None:
    body = b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}'
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400


def test_a_parameter_whose_name_is_no_text_is_refused_in_text() -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, b'{"model": "base", "messages": [], "\\ud800": 1}')
    assert (caught.value.status, caught.value.param) == (400, "?")
    assert b"Unrecognized request argument supplied: ?" in caught.value.response().body


def test_bodies_that_are_too_large() -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, b" " * (MAX_BODY_BYTES + 1))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_completions_take_texts_and_token_ids(prompt: object, prompts: list[object]) -> None:
    body = json.dumps({"model": "base", "prompt": prompt, "logprobs": 2, "n": 2})
    request = parse(CompletionRequest, body.encode())
    assert (request.prompts, request.limit, request.rivals) == (prompts, 16, 2)


@pytest.mark.parametrize("prompt", [[], None, [[]], ["a", 1], [-1], [1.5], ["a"] * 17, {"a": 1}])
def test_prompts_that_are_none_are_refused(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, json.dumps({"model": "base", "n": 2, "prompt": prompt}).encode())
    assert caught.value.param.startswith("prompt")


MANY = 600_000
HEAD = b'{"model": "base", "messages": [{"role": "user", "content": '


@pytest.mark.parametrize(
    "body",
    [
        HEAD + b"[" + b"{}," * MANY + b"{}]}]}",
        HEAD + b"[" + b"{}," * 150_000 + b"{}]}]}",
        b'{"model": "base", "messages": [], "stop": [' + b"1," * MANY + b"1]}",
        b'{"model": "base", "messages": [{' + b",".join(b'"%x": 0' % i for i in range(200_000)) + b"}]}",
        b'{"model": "base", "messages": [' + b"{}," * 150_000 + b"{}]}",
        b'{"model": "base", "tools": [' + b"{}," * 150_000 + b"{}]}",
        b'{"model": "base", "messages": [{"role": "assistant", "tool_calls": [' + b"{}," * 150_000 + b"{}]}]}",
    ],
    ids=range(7),
)
def test_bodies_of_very_many_values_are_refused_at_once(body: bytes) -> None:
    start = time.process_time()
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400
    assert time.process_time() - start < 1.5


def test_tools_are_described_in_front_and_calls_read_back() -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    body = GOOD | {
        "tools": [tool],
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        ],
    }
    request = parse(ChatRequest, json.dumps(body).encode())
    system, *rest = request.conversation
    assert system.content.endswith("Be kind.")
    assert '"name": "get_weather"' in system.content
    assert rest == [
        Message("user", "Weather?"),
        Message("assistant", "[get_weather(city='Oslo')]"),
        Message("user", "Rain."),
    ]
    (made,) = request.box.read("[get_weather(city='Oslo', days=2)]")
    assert json.loads(made.function.arguments) == {"city": "Oslo", "days": 2}
    for text in ("It rains.", "[get_time()]", "[get_weather(city=__import__('os'))]", "[]", "["):
        calls = request.box.read(text)
        assert all(json.loads(c.function.arguments) == {"city": "__import__('os')"} for c in calls)
    off = parse(ChatRequest, json.dumps(body | {"tool_choice": "none"}).encode())
    assert off.conversation[0] == Message("system", "Be kind.")


def test_tasks_of_ones_own_offer_functions_as_requests_do(tmp_path: Path) -> None:
    """Else a modifier is trained and tested under another prompt than it is served with."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather.get", "description": "Weather of a city: 20 °C.", "parameters": parameters}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Rome?"}]
    line = {"id": 1, "kind": "calls", "functions": [function], "expected": [{"weather.get": {"city": ["Rome"]}}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line | {"messages": messages}))
    (task,) = JSONL.load("train", domain="d", options={"path": str(tmp_path)}, seed=0, count=None)
    body = {"model": "base", "messages": messages, "tools": [{"type": "function", "function": function}]}
    request = parse(ChatRequest, json.dumps(body).encode())
    assert list(task.messages) == request.conversation
    assert describes_functions(task.messages[0])


def tool(name: str, *properties: str, **more: object) -> Tool:
    parameters = {"type": "object", "properties": {p: {"type": "string"} for p in properties}, **more}
    return Tool(type="function", function=Function(name=name, parameters=parameters if properties else None))


@pytest.mark.parametrize("name", ["get-weather", "3d", "class", "a.b-c", "None", "-", "get_weather"])
def test_every_name_can_be_called(name: str) -> None:
    """The model writes calls as Python: a name that Python cannot read goes by another one there."""
    box = Toolbox([tool(name, "user-id", "from", "plain", required=["user-id"])])
    (system,) = box.introduce([])
    (described,) = json.loads(system.content[system.content.index("[\n") :])
    assert described["parameters"]["required"] == ["user_id"]
    written = ", ".join(f"{p}='{i}'" for i, p in enumerate(described["parameters"]["properties"]))
    (call,) = box.read(f"[{described['name']}({written})]")
    assert call.function.name == name
    assert json.loads(call.function.arguments) == {"user-id": "0", "from": "1", "plain": "2"}
    assert box.shown([call]) == f"[{described['name']}({written})]"


def test_descriptions_that_nesting_makes_long_are_refused_at_once() -> None:
    """Each of these zeros stands in a line of its own behind 740 blanks."""
    nested: object = [0] * 199_000
    for _ in range(180):
        nested = [nested]
    deep = {"type": "function", "function": {"name": "f", "parameters": {"x": nested}}}
    request = parse(ChatRequest, json.dumps(GOOD | {"tools": [deep]}).encode())
    start = time.process_time()
    with pytest.raises(ApiError) as caught:
        _ = request.conversation
    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert time.process_time() - start < 1.5


def test_long_descriptions_are_taken() -> None:
    long = Function(name="f", description="x" * (MAX_DESCRIBED - 1000))
    (system,) = Toolbox([Tool(type="function", function=long)]).introduce([])
    assert "x" * (MAX_DESCRIBED - 1000) in system.content


def test_names_stay_apart_and_names_that_can_be_written_stay() -> None:
    box = Toolbox([tool("get-weather"), tool("get_weather"), tool("get.weather")])
    calls = box.read("[get_weather(), get_weather_2(), get.weather()]")
    assert [c.function.name for c in calls] == ["get_weather", "get-weather", "get.weather"]


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1e308*10", "b'x'", "2j", "{(1, 2): 3}"])
def test_what_json_has_not_got_is_no_argument(value: str) -> None:
    assert Toolbox([tool("f", "x")]).read(f"[f(x={value})]") == []


@pytest.mark.parametrize(
    "arguments",
    [
        "'Oslo'",
        "*['Oslo']",
        "**{'x': 'Oslo'}",
        "'Oslo', x='a'",
        "x={**{'a': 1}}",
        "x=g(1, a=2)",
        "x=[g(**{'a': 1})]",
        "x=+5",
    ],
)
def test_a_call_of_which_an_argument_would_be_lost_or_altered_is_none(arguments: str) -> None:
    assert Toolbox([tool("f", "x")]).read(f"[f({arguments})]") == []


def test_arguments_that_are_kept_as_text_are_kept() -> None:
    (call,) = Toolbox([tool("f", "x")]).read("[f(x=date(2024, 1, 2))]")
    assert json.loads(call.function.arguments) == {"x": "date(2024, 1, 2)"}


def test_a_text_that_is_too_long_to_be_read_is_no_call() -> None:
    assert Toolbox([tool("f", "x")]).read("f(x='a'), " + " " * MAX_CHARS + "f(x='b')") == []


def test_one_call_where_one_is_wanted() -> None:
    text = "[f(x='a'), f(x='b')]"
    assert len(Toolbox([tool("f", "x")]).read(text)) == 2
    body = GOOD | {"tools": [tool("f", "x").model_dump()], "parallel_tool_calls": False}
    (call,) = parse(ChatRequest, json.dumps(body).encode()).box.read(text)
    assert json.loads(call.function.arguments) == {"x": "a"}


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"tool_calls": [{"id": "c", "type": "function", "index": 0, "function": {"name": "3d-x", "arguments": "{}"}}]},
        {"tool_calls": None},
    ],
)
def test_what_clients_send_back_of_an_answer_is_taken(more: dict[str, object]) -> None:
    said = {"role": "assistant", "content": "Hello."} | more
    tools = [{"type": "function", "function": {"name": "3d-x", "description": None, "parameters": None}}]
    request = parse(ChatRequest, json.dumps(GOOD | {"messages": [said], "tools": tools}).encode())
    assert request.conversation[-1].content.startswith("Hello.")


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "function", "function": {"name": "g"}}, "tool_choice"),
        ({"type": "function"}, "tool_choice"),
        ("any", "tool_choice"),
    ],
)
def test_a_choice_of_no_tool_is_refused(choice: object, param: str) -> None:
    error = refused(tools=[tool("f", "x").model_dump()], tool_choice=choice)
    assert (error.status, error.param) == (400, param)
