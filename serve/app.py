"""What `serve run`, `serve build` and `serve deploy` are pointed at.

    CASCADE_CONFIG=configs/quickstart.yaml serve run serve.app:app
    serve run serve.app:build config=configs/code.yaml

A config names base and storage; every domain's modifier in that storage is served.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.serve import Application

from cascade.benchmarks.sources import cached_only
from cascade.config import Base, Config
from cascade.errors import CascadeError
from cascade.models.files import base_sha256
from cascade.store import Store
from serve.arguments import Arguments, checked, servable
from serve.ingress import EngineReplica, Ingress, Served
from serve.limits import Limits
from serve.placement import placed

logger = logging.getLogger(__name__)


def build(args: Mapping[str, Any]) -> Application:
    """The application: an ingress in front of engines.

    Args:
        args: fields of `Arguments`.

    Raises:
        ConfigError: an argument or the config cannot be used, or nothing was trained yet.
    """
    arguments = checked(args)
    return application(arguments, servable(arguments))


def application(args: Arguments, config: Config) -> Application:
    """The application of `build`, with the arguments checked and the config read."""
    storage = Store(config.storage)
    served = Served(
        base=_absolute(config.base),
        storage=storage.uri,
        base_sha256=_sha256(config.base),
        temperature=config.student.temperature,
        limits=Limits(
            rows=args.rows,
            waiting=args.waiting,
            patience_s=args.patience_s,
            max_loaded_modifiers=config.serving.max_loaded_modifiers,
        ),
        threads=args.threads or config.execution.threads,
        log=args.log,
        most_answers=args.most_room if args.vllm is None else None,
        room=args.room,
        gpu_share=config.execution.gpu_share,
        weights=config.serving.weights,
        vllm=args.vllm,
    )
    options: dict[str, Any] = {"num_cpus": config.execution.cpus_per_actor}
    if config.execution.use_gpu and args.vllm is None:
        options["num_gpus"] = config.execution.gpus
    engine = EngineReplica.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        request_router_config=placed(served.limits.max_loaded_modifiers),
        **args.engine_bounds,
        **args.scaling,
    )
    return Ingress.options(**args.gateway_bounds).bind(served, engine.bind(served))  # type: ignore[attr-defined]


def _sha256(base: Base) -> str | None:
    """Of the base's weights; None where they are not on this machine: an engine's may have them."""
    try:
        with cached_only():
            return base_sha256(base)
    except CascadeError as error:
        logger.info("modifiers of another base are only found out by the engines: %s", error)
        return None


def _absolute(base: Base) -> Base:
    """The base with a local folder's full path: replicas may run in another folder."""
    folder = Path(base.model).expanduser()
    return base.model_copy(update={"model": str(folder.absolute())}) if folder.is_dir() else base


def __getattr__(name: str) -> Application:
    """`app`, built from the environment when it is asked for, so that importing `build` needs no config."""
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__} has no attribute {name}")
