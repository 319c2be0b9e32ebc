"""Where jobs find their Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from cascade.config import Config, load_config
from ray_jobs._context import connect_ray


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.init` was asked for."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: arguments.update(given))
    return arguments


@pytest.fixture
def config() -> Config:
    return load_config(Path(__file__).parents[2] / "configs/quickstart.yaml")


def test_without_an_address_ray_starts_here_even_if_the_machine_remembers_another(asked, config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect_ray(config)
    assert asked["address"] == "local"
    assert asked["num_cpus"] >= 2


def test_a_submitted_job_joins_the_cluster_that_it_was_submitted_to(asked, config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connect_ray(config)
    assert not {"address", "num_cpus", "object_store_memory"} & asked.keys()
