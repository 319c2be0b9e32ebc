"""What is served, how many engines there are, and how wide the door is."""

from __future__ import annotations

import shutil

import pytest
from stand_in import StandIn

from cascade import modifiers
from cascade.config import Base, Config
from cascade.errors import ConfigError, FormatError
from cascade.store import Store
from serve.__main__ import command_line
from serve.app import application
from serve.arguments import checked, servable
from serve.ingress import EngineReplica


def test_the_door_is_as_wide_as_the_engines_that_there_may_be() -> None:
    fixed = checked({"replicas": "2", "rows": "8", "waiting": "4"})
    assert (fixed.room, fixed.most_room) == (12, 24)
    assert EngineReplica.options(**fixed.scaling).num_replicas == 2
    more = checked({"replicas": "2", "max_replicas": "5", "rows": "8", "waiting": "4"})
    assert (more.room, more.most_room) == (12, 60)
    bounds = EngineReplica.options(**more.scaling)._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.target_ongoing_requests) == (2, 5, 6)
    with pytest.raises(ConfigError, match="max_replicas"):
        _ = checked({"replicas": "2", "max_replicas": "1"}).scaling


@pytest.mark.parametrize(("rows", "waiting"), [(32, 64), (1000, 3000)])
def test_ray_serve_lets_through_what_the_arguments_allow_and_health_beside(stand_in, rows: int, waiting: int) -> None:
    arguments = checked({"rows": rows, "waiting": waiting, "max_replicas": 3})
    gateway = application(arguments, stand_in.config)._bound_deployment
    engine = gateway.init_args[1]._bound_deployment
    assert gateway.init_args[0].most_answers == arguments.most_room
    assert gateway.max_ongoing_requests > arguments.most_room == 3 * (rows + waiting)
    assert engine.max_ongoing_requests > arguments.room == rows + waiting
    assert min(gateway.max_queued_requests, engine.max_queued_requests) >= arguments.most_room


def test_the_gateway_knows_whose_modifiers_fit_where_the_base_is_at_hand(stand_in: StandIn) -> None:
    def known(config: Config) -> str | None:
        return application(checked({}), config)._bound_deployment.init_args[0].base_sha256

    assert known(stand_in.config) == modifiers.list_modifiers(stand_in.store)[0].base_sha256
    elsewhere = Base(model="/on/another/node")
    assert known(stand_in.config.model_copy(update={"base": elsewhere})) is None


def test_one_damaged_modifier_keeps_the_server_from_nothing(stand_in: StandIn, tmp_path, monkeypatch) -> None:
    shutil.copytree(stand_in.store.path(), tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    monkeypatch.setattr(
        "serve.arguments.load_config", lambda _: stand_in.config.model_copy(update={"storage": store.uri})
    )
    arguments = checked({"config": str(stand_in.config_path)})
    store.write_bytes("modifiers/letters/CURRENT", b"../x")
    servable(arguments)
    for made in modifiers.list_modifiers(store):
        store.write_bytes(f"modifiers/{made.name}/manifest.json", b"{")
    with pytest.raises(FormatError):
        servable(arguments)
    shutil.rmtree(store.path("modifiers"))
    with pytest.raises(ConfigError, match="no modifier"):
        servable(arguments)


def test_a_setting_without_a_value_is_named(capsys) -> None:
    assert command_line().parse_intermixed_args(["x", "config=a=b"]).values == ["config=a=b"]
    with pytest.raises(SystemExit):
        command_line().parse_intermixed_args(["x", "replicas"])
    assert "'replicas' has no value" in capsys.readouterr().err
