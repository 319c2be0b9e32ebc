"""What `serve run`, `serve build` and `serve deploy` are pointed at.

    CASCADE_CONFIG=configs/quickstart.yaml serve run serve.app:app
    serve run serve.app:build config=configs/code.yaml

A config names base and storage; every domain's modifier in that storage is served.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve import Application

from cascade import modifiers
from cascade.artifacts import Store
from cascade.config import Base, load_config
from cascade.errors import ConfigError
from cascade.system import open_bundle
from serve.ingress import EngineReplica, Ingress, Served
from serve.schedule import Limits

CONFIG_VARIABLE = "CASCADE_CONFIG"
DEFAULT_CONFIG = "configs/quickstart.yaml"


class Arguments(BaseModel):
    """Arguments of `build`, as `serve run serve.app:build name=value` or `args:` in a Serve config give them."""

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
    def scaling(self) -> dict[str, Any]:
        """Ray Serve's options for the number of engines."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        if self.max_replicas < self.replicas:
            raise ConfigError(f"serve argument max_replicas: it is {self.max_replicas}, below replicas={self.replicas}")
        wanted = max(self.rows * 3 // 4, 1)  # so that an engine is added before the ones there are get full
        bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas, "target_ongoing_requests": wanted}
        return {"num_replicas": "auto", "autoscaling_config": bounds}


def build(args: Mapping[str, Any]) -> Application:
    """The application: an ingress in front of engines.

    Args:
        args: fields of `Arguments`.

    Raises:
        ConfigError: an argument or the config cannot be used, or nothing was trained yet.
    """
    return _application(checked(args))


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


def _application(args: Arguments) -> Application:
    config = open_bundle(Path(args.config)) if Path(args.config).is_dir() else load_config(args.config)
    storage = Store(config.storage)
    if not any(modifiers.current(storage, domain) for domain in modifiers.list_domains(storage)):
        raise ConfigError(
            f"there is no modifier in {storage.uri} yet: run `make run` first (or `cascade run {args.config}`)"
        )
    served = Served(
        base=_absolute(config.base),
        storage=storage.uri,
        temperature=config.student.temperature,
        limits=Limits(rows=args.rows, waiting=args.waiting, patience_s=args.patience_s),
        threads=args.threads or config.execution.threads,
        log=args.log,
        room=args.room,
        gpu_share=config.execution.gpu_share,
        weights=config.serving.weights,
        vllm=args.vllm,
    )
    options: dict[str, Any] = {"num_cpus": config.execution.cpus_per_actor}
    if config.execution.use_gpu and args.vllm is None:
        options["num_gpus"] = config.execution.gpus
    engine = EngineReplica.options(ray_actor_options=options, **args.scaling)  # type: ignore[attr-defined]
    return Ingress.bind(served, engine.bind(served))  # type: ignore[attr-defined]


def _absolute(base: Base) -> Base:
    """The base with a local folder's full path: replicas may run in another folder."""
    folder = Path(base.model).expanduser()
    return base.model_copy(update={"model": str(folder.absolute())}) if folder.is_dir() else base


def __getattr__(name: str) -> Application:
    """`app`, built from the environment when it is asked for, so that importing `build` needs no config."""
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__} has no attribute {name}")
