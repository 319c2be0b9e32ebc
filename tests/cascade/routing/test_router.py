"""Training, deciding and storing a router."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from stand_in import LETTERS_QUESTION, SUMS_QUESTION, router_data

from cascade.benchmarks.offered_functions import SYSTEM_PROMPT
from cascade.config import ROUTER_BYTES, Config, Router
from cascade.errors import ConfigError, DataError, FormatError
from cascade.routing import offers
from cascade.routing.model import (
    RESERVED,
    TOOLS_OFFERED,
    RouterModel,
    current_version,
    load_current,
    publish,
    queries_of,
)
from cascade.routing.network import RouterNetwork, joined, train_network
from cascade.routing.train import RouterReport, follow_ups, general_chat, train_router
from cascade.store import Store
from cascade.tasks import Message

SETTINGS = Router(features=1024, hidden=16, epochs=20)
BRIEF = Router(features=1024, hidden=16, epochs=2)
"""For what does not depend on how much is learned."""


@pytest.fixture(scope="module")
def trained() -> tuple[RouterModel, RouterReport]:
    torch.set_num_threads(1)
    queries, outcomes = router_data(160)
    return train_router(queries, outcomes, SETTINGS, seed=3)


def test_it_beats_what_does_not_look_at_the_query(trained: tuple[RouterModel, RouterReport]) -> None:
    report = trained[1]
    assert (report.queries, report.others) == (160, len(general_chat()))
    assert report.accuracy.value > 0.9
    assert report.quality["routed"].value > report.quality["best_single"].value + 0.2
    assert report.gain["best_single"].low > 0
    assert report.gain["random"].low > 0
    assert report.quality["routed"].value <= report.quality["oracle"].value
    assert report.quality["routed"].low < report.quality["routed"].value < report.quality["routed"].high
    assert report.coverage.value > 0.9
    assert report.other_to_base.value > 0.95
    assert report.ece_after < 0.1
    assert {o.n for n, o in report.outputs.items() if n not in RESERVED} == {160}
    assert report.follow_ups.value > 0.8
    assert report.no_follow_ups.value > 0.85
    json.dumps(report.as_dict())


def test_routes(trained: tuple[RouterModel, RouterReport]) -> None:
    model = trained[0]
    assert model.route(LETTERS_QUESTION).choice == "letters"
    route = model.route(SUMS_QUESTION)
    assert (route.choice, route.reason) == ("sums", "router")
    assert route.confidence == route.probabilities["sums"] > 0.5
    chat = model.route("How do I cook rice?")
    assert (chat.choice, chat.reason) == ("base", "low-confidence")
    assert chat.confidence < 0.2
    assert model.route(SUMS_QUESTION, threshold=1.0).choice == "base"
    assert model.route("").choice == "base"


def test_a_conversation_is_routed_by_its_last_question(trained: tuple[RouterModel, RouterReport]) -> None:
    turns = [Message("user", LETTERS_QUESTION), Message("assistant", "2"), Message("user", SUMS_QUESTION)]
    assert trained[0].route(turns) == trained[0].route(SUMS_QUESTION)


def test_a_follow_up_is_answered_by_whoever_answered_what_it_is_about(
    trained: tuple[RouterModel, RouterReport],
) -> None:
    model = trained[0]
    for question, choice in ((LETTERS_QUESTION, "letters"), (SUMS_QUESTION, "sums"), ("How do I cook rice?", "base")):
        talk = [Message("user", question), Message("assistant", "2")]
        first = model.route(talk[:1])
        for later in ("Are you sure?", "Explain that in more detail."):
            talk += [Message("user", later), Message("assistant", "Yes.")]
            route = model.route(talk)
            assert route.choice == choice == first.choice
            assert route.confidence < first.confidence
            assert route.reason == ("low-confidence" if choice == "base" else "follow-up")
    assert model.route([Message("user", "Are you sure?")]).choice == "base"
    changed = [Message("user", SUMS_QUESTION), Message("assistant", "2"), Message("user", "How do I cook rice?")]
    assert model.route(changed).choice == "base"


def test_offered_functions_are_read_with_the_question() -> None:
    asked = Message("user", "What is the weather in Oslo?")
    assert queries_of([asked]) == [asked.content]
    assert queries_of([Message("system", "Be brief."), asked]) == [asked.content]
    offered = Message("system", SYSTEM_PROMPT.format(functions="[]") + "\n\nBe brief.")
    assert queries_of([offered, asked]) == [f"{asked.content}\n{TOOLS_OFFERED}"]
    assert queries_of([]) == [""]
    many = [Message("user", str(i)) for i in range(20)]
    assert queries_of(many) == [str(i) for i in range(19, 11, -1)]


FORECAST = {"name": "weather.getForecast", "description": "Forecasts rain and wind of a city.", "parameters": {}}


def query(question: str, functions: str) -> str:
    return queries_of([Message("system", SYSTEM_PROMPT.format(functions=functions)), Message("user", question)])[0]


def test_what_question_and_functions_share_is_read_too() -> None:
    functions = json.dumps([{"name": "add", "description": "Adds two numbers."}, FORECAST], indent=4)
    asked = "Which weather do they forecast in Oslo?"
    # 2 of weather, forecast, rain, wind, city; "forecasts" begins like "forecast"
    assert query(asked, functions) == f"{asked}\n{TOOLS_OFFERED} fitsa fitsb saysa saysb saysc saysd"
    assert query("Who are you?", functions) == f"Who are you?\n{TOOLS_OFFERED}"
    everything = "Get the weather: forecasts of rain and wind in a city."
    assert query(everything, functions).endswith("saysj")


@pytest.mark.parametrize(
    "functions", ["as XML", "{}", '["weather"]', '[{"name": null, "description": 3}]', "[{}]", "[" * 100_000]
)
def test_functions_listed_in_another_way_are_offered_all_the_same(functions: str) -> None:
    assert query("Which weather?", functions) == f"Which weather?\n{TOOLS_OFFERED}"


def test_long_system_messages_are_read_and_not_kept() -> None:
    asked, functions = "Which weather do they forecast in Oslo?", json.dumps([FORECAST])
    short, long = (query(asked, functions + more) for more in ("", " " * 1_000_000))
    assert short == long
    kept = offers._kept.cache_info()
    query(asked, functions + " " * 2_000_000)
    assert offers._kept.cache_info() == kept


def test_more_queries_take_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self))[1])
    vectors, targets = np.zeros((3201, 4), np.float32), np.zeros((3201, 3), np.float32)
    train_network(vectors[:64], targets[:64], hidden=2, epochs=60, seed=0)
    assert len(steps) == 120
    train_network(vectors, targets, hidden=2, epochs=60, seed=0)
    assert len(steps) == 120 + 14 * 101


def test_the_rule() -> None:
    model = RouterModel(None, ("base", "a", "b"), 8, 8, 0.5)  # type: ignore[arg-type]
    assert model.decide(0.9, np.array([0.2, 0.1, 0.3]), 0.5).choice == "b"
    assert model.decide(0.9, np.array([0.3, 0.3, 0.3]), 0.5).choice == "base"
    unknown = model.decide(0.4, np.array([0.2, 0.1, 0.9]), 0.5)
    assert (unknown.choice, unknown.confidence, unknown.reason) == ("base", pytest.approx(0.08), "low-confidence")


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("known", [0.1, 0.4, 0.6, 0.8, 0.96, 0.99])
def test_turbo_asks_a_modifier_no_more_and_max_quality_no_less_than_the_router_does(
    monkeypatch: pytest.MonkeyPatch, threshold: float, known: float
) -> None:
    said = np.array([known]), np.array([[0.2, 0.5]]), np.array([0.0])
    monkeypatch.setattr(RouterModel, "probabilities", lambda model, queries: said)
    model = RouterModel(None, ("base", "a"), 8, 8, threshold)  # type: ignore[arg-type]
    turbo, default, quality = (
        model.route("What?", mode=mode).choice == "a" for mode in ("turbo", "default", "max-quality")
    )
    assert turbo <= default <= quality
    assert turbo is (known >= max(threshold, 0.95))
    assert default is (known >= threshold)
    assert quality is (known >= min(threshold, 0.5))


def test_the_same_seed_gives_the_same_router_and_leaves_torch_alone() -> None:
    queries, outcomes = router_data(40)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = train_router(queries, outcomes, BRIEF, seed=1)
    assert torch.equal(torch.rand(3), expected)
    second = train_router(queries, outcomes, BRIEF, seed=1)
    assert first[1] == second[1]
    assert first[0].route(SUMS_QUESTION) == second[0].route(SUMS_QUESTION)
    assert train_router(queries, outcomes, BRIEF, seed=2)[1] != first[1]


def test_the_router_is_the_same_whatever_number_of_threads_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    computing = []
    forward = RouterNetwork.forward

    def seen(network: RouterNetwork, x: torch.Tensor) -> torch.Tensor:
        if network.training:
            computing.append(torch.get_num_threads())
        return forward(network, x)

    monkeypatch.setattr(RouterNetwork, "forward", seen)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train_router(*router_data(40), BRIEF, seed=1)
        assert set(computing) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_modifiers_that_were_not_asked_everything() -> None:
    queries, outcomes = router_data(80)
    partly = {name: [v if i % 3 else None for i, v in enumerate(column)] for name, column in outcomes.items()}
    partly["base"] = outcomes["base"]
    model, report = train_router(queries, partly, SETTINGS, seed=1)
    assert report.outputs["sums"].n < report.outputs["base"].n == report.queries
    assert model.route(SUMS_QUESTION).choice == "sums"


def test_a_modifier_that_is_no_better_gets_nothing() -> None:
    queries, _ = router_data(120)
    base = [bool(np.random.default_rng(i).random() < 0.7) for i in range(120)]
    model, report = train_router(queries, {"base": base, "useless": [False] * 120}, SETTINGS, seed=1)
    assert {model.route(q).choice for q in queries} == {"base"}
    assert report.gain["base"].value == 0


def test_equal_queries_share_a_fold() -> None:
    queries, outcomes = router_data(40)
    rng = np.random.default_rng(3)
    chance = [bool(v) for v in rng.random(40) < 0.5]
    columns = dict.fromkeys(outcomes, chance)  # nothing to learn but by heart
    report = train_router(queries * 4, {k: v * 4 for k, v in columns.items()}, SETTINGS, seed=1)[1]
    assert all(o.loss["platt"] > 0.6 for n, o in report.outputs.items() if n not in RESERVED)


def test_networks_side_by_side_say_what_they_say_on_average() -> None:
    networks = [RouterNetwork(32, 8, 3).eval() for _ in range(3)]
    vectors = np.random.default_rng(0).random((5, 32), dtype=np.float32)
    mean = np.mean([network.logits(vectors) for network in networks], axis=0)
    assert np.allclose(joined(networks).logits(vectors), mean, atol=1e-6)


def test_bad_input_is_explained() -> None:
    queries, outcomes = router_data(40)
    with pytest.raises(DataError, match="base"):
        train_router(queries, {"letters": outcomes["letters"]}, SETTINGS, seed=1)
    with pytest.raises(DataError, match="39 outcomes for 40"):
        train_router(queries, outcomes | {"sums": outcomes["sums"][1:]}, SETTINGS, seed=1)
    with pytest.raises(DataError, match="validation"):
        train_router(queries[:5], {k: v[:5] for k, v in outcomes.items()}, SETTINGS, seed=1)
    with pytest.raises(ConfigError, match=r"make a router of 25\.6 MB.*lower router\.features"):
        RouterNetwork(100_000, 64, 3)


@pytest.mark.parametrize("name", RESERVED)
def test_no_domain_is_called_as_one_of_the_routers_outputs(name: str) -> None:
    with pytest.raises(ValidationError, match="the router has an output of its own of that name"):
        Config.model_validate({"domain": name})


def test_the_built_in_chat_is_varied_and_clean() -> None:
    queries = general_chat()
    assert len(queries) == len(set(queries)) > 150
    assert len(follow_ups()) == len(set(follow_ups())) > 150
    assert not set(queries) & set(follow_ups())


def test_it_comes_back_from_disk_as_it_was(trained: tuple[RouterModel, RouterReport], tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    assert load_current(store, tmp_path) is None
    version = publish(store, trained[0], trained[1].as_dict())
    assert current_version(store) == version == publish(store, trained[0], trained[1].as_dict())
    found = load_current(store, tmp_path)
    assert found is not None
    assert found[0] == version
    for question in (LETTERS_QUESTION, SUMS_QUESTION, "Hello!"):
        assert found[1].route(question) == trained[0].route(question)
    size = sum(f.stat().st_size for f in (tmp_path / "store" / "router" / version).iterdir())
    assert size < ROUTER_BYTES
    newer = publish(store, replace(trained[0], threshold=0.9))
    assert newer != version
    assert load_current(store, tmp_path)[0] == newer  # type: ignore[index]


def test_damaged_routers_are_refused(trained: tuple[RouterModel, RouterReport], tmp_path: Path) -> None:
    trained[0].save(tmp_path)
    weights, manifest = tmp_path / "router.safetensors", tmp_path / "manifest.json"
    good, said = weights.read_bytes(), json.loads(manifest.read_text())
    weights.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(FormatError, match="damaged"):
        RouterModel.load(tmp_path)
    weights.write_bytes(good)
    changes: list[dict[str, object]] = [
        {"format_version": 99},
        {"hidden": 17},
        {"candidates": None},
        *(
            {"candidates": names}
            for names in ("abc", ["letters", "base", "sums"], ["base", "sums", "sums"], ["base", 1, 2])
        ),
        *({"threshold": threshold} for threshold in ("x", 7, float("nan"))),
        *({"calibrators": made} for made in ([], {"base": {"method": "magic", "parameters": []}})),
        {"calibrators": {"base": {"method": "platt", "parameters": [float("nan"), 0]}}},
        *({"calibrators": {"base": {"method": "platt", "parameters": [value, 0]}}} for value in ("a", None)),
        *({"calibrators": {"sums": {"method": "isotonic", "parameters": knots}}} for knots in ([], [1, 2, 3])),
        {"calibrators": {"known": {"method": "temperature", "parameters": []}}},
    ]
    for change in changes:
        manifest.write_text(json.dumps(said | change))
        with pytest.raises(FormatError):
            RouterModel.load(tmp_path)
    manifest.write_text("{")
    with pytest.raises(FormatError):
        RouterModel.load(tmp_path)
    with pytest.raises(FormatError):
        RouterModel.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [b"../../etc", b"\xff\xfe", b"a\nb", b"0123456789abc"])
def test_a_version_is_a_name_and_no_path(
    trained: tuple[RouterModel, RouterReport], tmp_path: Path, name: bytes
) -> None:
    store = Store(str(tmp_path))
    publish(store, trained[0])
    store.write_bytes("router/CURRENT", name)
    with pytest.raises(FormatError, match="no version's name"):
        current_version(store)
