"""The settings of the application, and the config that they name: looked at before Ray and torch are imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cascade import modifiers
from cascade.bundles import open_bundle
from cascade.config import Config, load_config
from cascade.errors import CascadeError, ConfigError
from cascade.store import Store
from serve.limits import Limits

CONFIG_VARIABLE = "CASCADE_CONFIG"
DEFAULT_CONFIG = "configs/quickstart.yaml"
_BESIDE_ENGINE, _BESIDE_GATEWAY, _QUEUED = 160, 1000, 200
"""Requests that Ray Serve lets into an engine and into the gateway, and wait for either, beyond those for answers."""


class Arguments(BaseModel):
    """As `serve run serve.app:build name=value`, or `args:` in a Serve config, give them."""

    model_config = ConfigDict(extra="forbid")
    config: str = Field(
        default_factory=lambda: os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG,
        description="YAML file of a domain, or folder of `cascade bundle`; left out, what CASCADE_CONFIG names",
    )
    replicas: int = Field(1, ge=1, description="engines, each with a base and a slot for one modifier")
    max_replicas: int | None = Field(
        None, ge=1, description="engines are added under load, up to so many; left out, there are always `replicas`"
    )
    threads: int | None = Field(
        None, ge=1, description="most of an engine's computing; null: execution.threads, else as many as help"
    )
    rows: int = Field(Limits.rows, ge=1, description="sequences that an engine computes together")
    waiting: int = Field(
        Limits.waiting, ge=1, description="requests that may wait per engine beside those; more are refused with 429"
    )
    vllm: str | None = Field(
        None, description="URL of a vLLM server that computes instead (serve/vllm.py); left out, engines compute"
    )
    log: bool = Field(False, description="keep requests that were unsure or disliked as new tasks (serve/feedback.py)")
    patience_s: float = Field(
        Limits.patience_s, ge=0, description="seconds that a group of requests keeps the slot while others wait"
    )

    @property
    def room(self) -> int:
        """Requests for answers that an engine takes."""
        return self.rows + self.waiting

    @property
    def most_room(self) -> int:
        """Requests for answers that all engines together take, when there are as many as there may be."""
        return max(self.replicas, self.max_replicas or 0) * self.room

    @property
    def engine_bounds(self) -> dict[str, int]:
        """Ray Serve's bounds of an engine: its room, and more for what it refuses and for looks at its health."""
        return {"max_ongoing_requests": self.room + _BESIDE_ENGINE, "max_queued_requests": self.most_room + _QUEUED}

    @property
    def gateway_bounds(self) -> dict[str, int]:
        """Those of the gateway: the room of all engines, and more for what needs none and for refusals at the door."""
        ongoing, queued = self.most_room + _BESIDE_GATEWAY, self.most_room + _QUEUED
        return {"max_ongoing_requests": ongoing, "max_queued_requests": queued}

    @property
    def scaling(self) -> dict[str, Any]:
        """Ray Serve's options for the number of engines."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        if self.max_replicas < self.replicas:
            raise ConfigError(f"serve argument max_replicas: it is {self.max_replicas}, below replicas={self.replicas}")
        wanted = max(self.rows * 3 // 4, 1)  # so that an engine is added before the ones there are get full
        bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas, "target_ongoing_requests": wanted}
        return {"num_replicas": "auto", "autoscaling_config": bounds}


def checked(args: Mapping[str, Any]) -> Arguments:
    """
    Raises:
        ConfigError: an argument is none, or has a value that it cannot have.
    """
    try:
        return Arguments.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        allowed = ", ".join(Arguments.model_fields)
        raise ConfigError(f"serve argument {name}: {first['msg']}; the arguments are {allowed}") from None


def servable(args: Arguments) -> Config:
    """The config to serve, or that of a bundle, whose files are checked.

    Raises:
        ConfigError: it cannot be used, or nothing was trained yet.
        DataError: it is a folder, but no bundle as it was packed.
        FormatError: all modifiers are damaged.
    """
    config = open_bundle(Path(args.config)) if Path(args.config).is_dir() else load_config(args.config)
    _check_there_is_a_modifier(Store(config.storage), args.config)
    return config


def _check_there_is_a_modifier(storage: Store, config: str) -> None:
    """See that there is something to serve. Where a domain's current version is damaged an older one will do."""
    damaged: CascadeError | None = None
    for domain in modifiers.list_domains(storage):
        try:
            if modifiers.current(storage, domain) is not None:
                return
        except CascadeError as error:
            damaged = error
            if modifiers.list_modifiers(storage, domain, skip_damaged=True):
                return
    raise damaged or ConfigError(
        f"there is no modifier in {storage.uri} yet: run `make run` first (or `cascade run {config}`)"
    )
