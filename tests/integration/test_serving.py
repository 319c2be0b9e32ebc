"""The real Ray Serve application on a stand-in store, asked through the official client over HTTP."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import ray
import torch
from ray import serve as ray_serve
from stand_in import (
    DOMAINS,
    LETTERS_QUESTION,
    SUMS_QUESTION,
    SYSTEM,
    StandIn,
    build_stand_in,
    compressed_adapter,
    free_port,
)

from cascade import modifiers
from cascade.compression.apply import LoraSlot
from cascade.errors import ConfigError
from cascade.models.base import load_base
from cascade.models.generation import generate
from cascade.models.rows import Request
from cascade.tasks import Message
from serve.app import build
from serve.arguments import checked
from serve.events import Finished, Work
from serve.ingress import RemoteEngine
from serve.middleware import NO_ROUTE
from serve.proxy import CALLBACK_VARIABLE, ROOM_VARIABLE, install

pytestmark = pytest.mark.integration

TOKENS = 16


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return build_stand_in(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def address(stand_in: StandIn) -> Iterator[str]:
    # As strings, which is how the command line of Ray Serve hands them over.
    arguments = {"config": str(stand_in.config_path), "threads": "1", "rows": "4", "waiting": "12", "patience_s": "0.5"}
    with pytest.MonkeyPatch.context() as environment:  # put back what `install` sets, whatever comes
        environment.setenv(CALLBACK_VARIABLE, "")
        environment.setenv(ROOM_VARIABLE, "")
        install(checked(arguments).most_room)
        yield from serve_it(arguments)


def serve_it(arguments: dict[str, str]) -> Iterator[str]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(build(arguments), name="cascade", blocking=False)
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone(stand_in: StandIn) -> dict[tuple[str, str], str]:
    """What each model answers to each question, computed with nothing of the server."""
    torch.set_num_threads(1)
    loaded = load_base(stand_in.config.base, torch.device("cpu"))
    slot = LoraSlot(loaded.model)
    answers = {}
    for choice in ("base", *DOMAINS):
        slot.clear()
        if choice != "base":
            slot.fill(modifiers.load_current(stand_in.store, choice)[1])
        for question in (LETTERS_QUESTION, SUMS_QUESTION):
            system = [{"role": "system", "content": SYSTEM}] if choice == "letters" else []
            messages = [*system, {"role": "user", "content": question}]
            text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = loaded.tokenizer(text, add_special_tokens=False).input_ids
            answers[choice, question] = generate(loaded, [Request(prompt, TOKENS)])[0].text
    return answers


def ask(client: openai.OpenAI, model: str, question: str, *, stream: bool = False) -> tuple[str, httpx.Headers]:
    """Text and headers of a greedy answer."""
    messages = [{"role": "user", "content": question}]
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=TOKENS, temperature=0, stream=stream
    )
    if stream:
        return "".join(c.choices[0].delta.content or "" for c in raw.parse()), raw.headers
    return raw.parse().choices[0].message.content, raw.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("domain", "question"), [("letters", LETTERS_QUESTION), ("sums", SUMS_QUESTION)])
def test_routed(client, stand_in, alone, domain: str, question: str, stream: bool) -> None:
    text, headers = ask(client, "cascade", question, stream=stream)
    assert text == alone[domain, question]
    assert headers["x-cascade-route"] == domain
    assert headers["x-cascade-reason"] == "router"
    assert headers["x-cascade-modifier-version"] == modifiers.current(stand_in.store, domain).version
    assert 0.5 < float(headers["x-cascade-confidence"]) < 1
    assert float(headers["x-cascade-queue-ms"]) >= 0
    assert float(headers["x-cascade-swap-ms"]) >= 0
    assert len(headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["base", *DOMAINS])
def test_overridden(client, alone, model: str, stream: bool) -> None:
    for question in (LETTERS_QUESTION, SUMS_QUESTION):
        text, headers = ask(client, model, question, stream=stream)
        assert text == alone[model, question]
        assert (headers["x-cascade-route"], headers["x-cascade-reason"]) == (model, "override")


def test_many_at_once_get_their_own_modifier(client, alone) -> None:
    pieces = [list(alone)[i % len(alone)] for i in range(36)]

    def one(i: int) -> bool:
        return ask(client, *pieces[i], stream=i % 2 == 0)[0] == alone[pieces[i]]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(len(pieces))))


def test_models_health_and_page(client, address: str) -> None:
    assert [m.id for m in client.models.list()] == ["cascade", "base", *DOMAINS]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    page = httpx.get(address)
    assert page.headers["content-type"].startswith("text/html")
    assert "Cascade" in page.text


def test_errors(client, address: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "gpt-4", "hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="base", messages=message, presence_penalty=0.5)
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "presence_penalty")
    with pytest.raises(openai.BadRequestError) as invalid:
        client.chat.completions.create(model="base", messages=message, temperature=9)
    assert invalid.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.value.code == "context_length_exceeded"
    response = httpx.post(f"{address}/v1/chat/completions", content=b"{")
    assert response.status_code == 400
    assert httpx.get(f"{address}/v1/nowhere").json()["error"]["type"] == "invalid_request_error"
    # The last one is answered by Ray Serve's proxy itself.
    for other in (
        response,
        missing.value.response,
        httpx.get(f"{address}/v1/nowhere"),
        httpx.get(f"{address}/-/healthz"),
    ):
        assert {name: other.headers.get_list(name) for name in NO_ROUTE} == {n: [v] for n, v in NO_ROUTE.items()}
        assert len(other.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_make_room(client, address: str, stream: bool) -> None:
    """Sixteen fill the engine's rows and its queue; were their work still computed, the next one would wait for it."""
    body = {"model": "sums", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    url = f"{address}/v1/chat/completions"
    with httpx.Client(timeout=60) as one, concurrent.futures.ThreadPoolExecutor(16) as pool:

        def seconds(tokens: int) -> float:
            """Until it is answered, refusals for want of room included."""
            began = time.monotonic()
            while (code := one.post(url, json=body | {"max_tokens": tokens}).status_code) == 429:
                time.sleep(0.02)
            assert code == 200
            return time.monotonic() - began

        def leave(_: int) -> None:
            more = {"max_tokens": 450, "stream": stream}
            with contextlib.suppress(httpx.TimeoutException), one.stream("POST", url, json=body | more, timeout=0.1):
                pass

        whole = seconds(450)
        list(pool.map(leave, range(16)))
        assert seconds(1) < 2 * whole, "all of it, in turns of four, would have taken more than four times as long"


def test_overload_is_refused_with_429_and_nothing_breaks(address: str) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "temperature": 0.5}

    def one(_: int) -> httpx.Response:
        return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        responses = list(pool.map(one, range(30)))
    codes = [r.status_code for r in responses]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 10
    assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 429)
    assert all(r.json()["error"]["code"] == "overloaded" for r in responses if r.status_code == 429)
    for response in responses:
        assert all(len(response.headers.get_list(name)) == 1 for name in ("x-request-id", *NO_ROUTE))


def test_each_of_two_engines_keeps_a_modifier(address: str, stand_in: StandIn) -> None:
    """Asked in turn for two modifiers, each engine swaps one in and is asked for that one from then on."""
    arguments = {"config": str(stand_in.config_path), "threads": "1", "replicas": "2"}
    ray_serve.run(build(arguments), name="two", route_prefix="/two", blocking=False)
    engines = RemoteEngine(ray_serve.get_deployment_handle("engine", app_name="two"))

    async def swaps(choice: str) -> bool:
        work = Work(choice, (Message("user", LETTERS_QUESTION),), max_tokens=4, temperature=0)
        events = [event async for event in engines.stream(work)]
        assert isinstance(events[-1], Finished)
        return events[0].swap_ms > 0

    async def in_turn() -> list[bool]:
        return [await swaps(choice) for choice in DOMAINS * 4]

    found = asyncio.run(in_turn())
    ray_serve.delete("two")
    assert found == [True, True] + [False] * (len(found) - 2)


def test_clients_give_ray_serve_no_orders(client, address: str) -> None:
    """Ray Serve's proxy would time out upon the first, and break upon the second, which is not UTF-8."""
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    for name, value in (("x-request-timeout-seconds", b"0.0001"), ("serve_multiplexed_model_id", b"\xff")):
        assert httpx.post(f"{address}/v1/chat/completions", json=body, headers={name: value}).status_code == 200


def is_gateway(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "ServeReplica:cascade:gateway" in " ".join(process.cmdline())
    return False


def test_a_lost_gateway_is_answered_in_openais_shape_and_returns(client, address: str) -> None:
    """Those that it was answering are told so, streams too, and the next one is answered."""
    body = {"model": "sums", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 450, "temperature": 0}
    url = f"{address}/v1/chat/completions"
    (gateway,) = [p for p in psutil.Process().children(recursive=True) if is_gateway(p)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, url, json=body, timeout=60)
        time.sleep(0.1)
        with httpx.stream("POST", url, json=body | {"stream": True}) as stream:
            parts = stream.iter_text()
            text = next(parts)
            gateway.kill()
            text += "".join(parts)
        lost = waiting.result()
    said = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")]
    assert said[-1]["error"]["code"] == lost.json()["error"]["code"] == "gateway_lost"
    assert (lost.status_code, lost.headers["retry-after"]) == (503, "1")
    assert all(len(lost.headers.get_list(name)) == 1 for name in ("x-request-id", *NO_ROUTE))
    assert openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=8, timeout=60).models.list().data


def test_a_new_version_goes_live_without_a_restart(client, stand_in, alone) -> None:
    old = modifiers.current(stand_in.store, "sums")
    path = Path(stand_in.config.base.model)
    new = modifiers.publish(stand_in.store, "sums", compressed_adapter(path, seed=99), fp16_size=10_000)
    assert new.version != old.version
    assert once_served(client, new.version) != alone["sums", SUMS_QUESTION]
    modifiers.set_current(stand_in.store, "sums", old.version)
    assert once_served(client, old.version) == alone["sums", SUMS_QUESTION]


def once_served(client: openai.OpenAI, version: str) -> str:
    """The first answer that a version gives."""
    deadline = time.monotonic() + 60
    while True:
        text, headers = ask(client, "sums", SUMS_QUESTION)
        if headers["x-cascade-modifier-version"] == version:
            return text
        assert time.monotonic() < deadline, f"{version} does not go live"
        time.sleep(0.1)


def test_without_a_modifier_it_says_what_to_run(stand_in: StandIn, tmp_path: Path) -> None:
    text = stand_in.config_path.read_text().replace(stand_in.config.storage, str(tmp_path / "empty"))
    config = tmp_path / "new.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match="arguments are config"):
        build({"confg": str(config)})
    with pytest.raises(ConfigError, match="make run"):
        build({"config": str(config)})


def test_the_chat_page(address: str, alone) -> None:
    browser = pytest.importorskip("browser")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    asked = "document.querySelectorAll('.answer').length"
    running = "document.querySelectorAll('.answer.running').length"
    last = "[...document.querySelectorAll('.answers:last-child .answer {}')].map(e => e.textContent)"

    def ask(page, question: str, cards: int) -> None:
        page.run(f"$('question').value = {json.dumps(question)}, $('form').requestSubmit()")
        page.wait_for(f"{asked} == {cards} && {running} == 0")

    with browser.Browser(address) as page:
        page.wait_for("$('model').options.length == 4")
        ask(page, SUMS_QUESTION, 1)
        assert "chosen by the router" in page.run(last.format(".facts"))[0]
        assert page.run(last.format(".who")) == ["sums"]
        assert page.run(last.format(".text"))[0].startswith(alone["sums", SUMS_QUESTION].rstrip("�"))

        page.run("$('clear').click(), $('model').value = 'letters', $('compare').click()")
        ask(page, LETTERS_QUESTION, 2)
        assert page.run(last.format(".who")) == ["base", "letters"]
        base, letters = page.run(last.format(".text"))
        assert base.startswith(alone["base", LETTERS_QUESTION].rstrip("�"))
        assert letters.startswith(alone["letters", LETTERS_QUESTION].rstrip("�"))

        page.run("$('clear').click(), $('compare').click(), $('temperature').value = '9'")
        ask(page, "hi", 1)
        assert "temperature" in page.run(last.format(".error"))[0]
