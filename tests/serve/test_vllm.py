"""The optional vLLM backend, beside a server that keeps vLLM's rules."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from engine_events import until
from mock_vllm import MockVllm, running
from stand_in import random_adapter

from cascade import modifiers
from cascade.compression.adapter import load_peft_folder
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress, expand
from cascade.errors import ConfigError
from serve.events import Delta, Failed, Finished, Grammar, Started
from serve.ingress import EngineReplica
from serve.limits import Limits
from serve.vllm import VllmBackend, name_of


@pytest.fixture
def server(stand_in):
    mock = MockVllm(stand_in.config.base.model)
    with running(mock) as mock.url:
        yield mock


@pytest.fixture
async def backend(server, stand_in, tmp_path):
    made = VllmBackend(server.url, stand_in.config.base, stand_in.store, tmp_path / "vllm", Limits())
    yield made
    await made.close()


async def ask(backend, wanted):
    return [event async for event in backend.stream(wanted)]


async def test_every_version_in_use_is_loaded_under_a_name_that_holds_its_hash(backend, server, stand_in):
    current = {d: modifiers.current(stand_in.store, d) for d in modifiers.list_domains(stand_in.store)}
    assert set(server.adapters) == {name_of(m) for m in current.values()}
    for modifier in current.values():
        folder = server.adapters[name_of(modifier)]
        exact = expand(modifiers.load(stand_in.store, modifier)).layers
        held = load_peft_folder(folder).layers
        assert {n: held[n].b.shape for n in held} == {n: exact[n].b.shape for n in exact}
        assert all(np.allclose(held[n].b, exact[n].b, rtol=1e-3, atol=1e-4) for n in exact)


async def test_an_answer_is_of_the_modifier_that_was_chosen(backend, server, stand_in, work):
    modifier = modifiers.current(stand_in.store, "sums")
    events = await ask(backend, work("sums", max_tokens=6, stop=("x",), temperature=0.3, top_p=0.9, seed=4))
    assert isinstance(events[0], Started)
    assert events[0].version == modifier.version
    assert "".join(e.text for e in events if isinstance(e, Delta)) == name_of(modifier)[:6]
    assert events[-1] == Finished("length", 6)
    sent = server.requests[-1]
    expected = {"model": name_of(modifier), "max_tokens": 6, "temperature": 0.3, "top_p": 0.9, "seed": 4, "stop": ["x"]}
    assert {k: sent[k] for k in expected} == expected
    assert events[0].prompt_tokens == len(sent["prompt"])


async def test_the_base_answers_without_an_adapter(backend, server, work):
    events = await ask(backend, work("base", max_tokens=100))
    assert events[0].version == ""
    assert events[-1] == Finished("stop", len("the-base"))
    assert server.requests[-1]["model"] == "the-base"


async def test_log_probabilities_and_grammars_are_asked_for(backend, server, work):
    events = await ask(backend, work("base", max_tokens=1, logprobs=2))
    token = events[1].tokens[0]
    assert (token.token, token.logprob, token.rivals) == ("t", -0.5, (("t", -0.5), ("?", -1.5)))
    await ask(backend, work("base", grammar=Grammar("json_schema", '{"type": "string"}', "response_format")))
    assert server.requests[-1]["structured_outputs"] == {"json": {"type": "string"}}
    await ask(backend, work("base", grammar=Grammar("lark", 'start: "a"', "tool_choice")))
    assert server.requests[-1]["structured_outputs"] == {"grammar": 'start: "a"'}


async def test_what_some_take_for_the_end_of_a_line_is_text(backend, server, work):
    server.text = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"
    events = await ask(backend, work("base", max_tokens=100))
    assert "".join(e.text for e in events if isinstance(e, Delta)) == server.text
    assert events[-1] == Finished("stop", len(server.text))


@pytest.mark.parametrize("said", ["data: {\n\n", "data: []\n\n", 'data: {"choices": [{}]}\n\n', "data: 1\n\n"])
async def test_an_answer_that_cannot_be_read_is_told_as_such(backend, monkeypatch, said, work):
    monkeypatch.setattr("mock_vllm.line", lambda chunk: said)
    *_, last = await ask(backend, work("base"))
    assert (last.status, last.code) == (502, "engine_unreadable")


async def test_a_client_that_leaves_ends_its_request(backend, server, work):
    server.stands_after = 3
    events = backend.stream(work("base", max_tokens=8))
    async for event in events:
        if isinstance(event, Delta):
            break
    await events.aclose()
    await until(lambda: server.ended == 1)


async def test_a_server_that_was_started_anew_is_given_the_adapter_again(backend, server, work):
    server.adapters.clear()
    events = await ask(backend, work("letters", max_tokens=4))
    assert isinstance(events[-1], Finished)
    assert len(server.adapters) == 1


@pytest.mark.parametrize(
    ("status", "told"), [(400, (400, "invalid_value")), (429, (429, "overloaded")), (500, (503, "engine_lost"))]
)
async def test_refusals_are_told(backend, server, status, told, work):
    server.script.append((status, "no"))
    (event,) = await ask(backend, work("base"))
    assert isinstance(event, Failed)
    assert (event.status, event.code) == told


async def test_a_prompt_beyond_the_servers_context_is_refused(backend, work):
    (event,) = await ask(backend, work("base", question="a" * 400))
    assert (event.status, event.code) == (400, "context_length_exceeded")


async def test_a_server_that_is_gone_is_unhealthy_and_its_work_fails(stand_in, tmp_path, work):
    mock = MockVllm(stand_in.config.base.model)
    with running(mock) as url:
        backend = VllmBackend(url, stand_in.config.base, stand_in.store, tmp_path, Limits())
        assert await backend.healthy()
    assert not await backend.healthy()
    (event,) = await ask(backend, work("base"))
    assert (event.status, event.code) == (503, "engine_lost")
    await backend.close()


async def test_a_new_version_is_loaded_beside_the_old_one(backend, server, stand_in, work):
    before = modifiers.current(stand_in.store, "sums")
    try:
        adapter = random_adapter(Path(stand_in.config.base.model), 9)
        new = modifiers.publish(stand_in.store, "sums", compress(adapter, Recipe()), fp16_size=adapter)
        await asyncio.to_thread(backend.modifiers.refresh)
        events = await ask(backend, work("sums", max_tokens=3))
        assert events[0].version == new.version
        assert {name_of(before), name_of(new)} <= set(server.adapters)
    finally:
        modifiers.set_current(stand_in.store, "sums", before.version)


async def test_a_replica_that_ends_closes_its_connections(backend, server, work):
    await ask(backend, work("base", max_tokens=2))
    assert server.connections == 1
    replica = object.__new__(EngineReplica.func_or_class)
    replica._engine = backend
    await replica.__del__()
    await until(lambda: server.connections == 0)
    assert replica.__del__() is None  # Python's own call, later


def test_a_server_of_another_base_is_refused(server, stand_in, tmp_path):
    server.base = "/somewhere/else"
    with pytest.raises(ConfigError, match=r"serves /somewhere/else, but base.model is .*: start it with `vllm serve"):
        VllmBackend(server.url, stand_in.config.base, stand_in.store, tmp_path, Limits())


def test_nobody_at_the_url_is_told(stand_in, tmp_path):
    with pytest.raises(ConfigError, match=r"vllm: http://127\.0\.0\.1:9 does not say what it serves"):
        VllmBackend("http://127.0.0.1:9", stand_in.config.base, stand_in.store, tmp_path, Limits())


async def test_without_runtime_loading_every_modifier_is_refused_with_the_reason(server, stand_in, tmp_path, caplog):
    server.updates = False
    backend = VllmBackend(server.url, stand_in.config.base, stand_in.store, tmp_path, Limits())
    assert backend.modifiers.versions() == {}
    assert "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in caplog.text
    await backend.close()
