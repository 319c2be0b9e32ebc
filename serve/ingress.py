"""The Ray Serve deployments: engines that generate, and the ingress that speaks HTTP and routes.

They are apart so that the ingress, which only waits, stays responsive whatever the engines compute, and so that
engines can be added without adding routers.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cascade import modifiers
from cascade.benchmarks.sources import cache_dir
from cascade.config import Base, Weights
from cascade.models.base import keep_to_share, load_base
from cascade.store import Store
from serve.engine import Engine
from serve.events import Event, Failed, Started, Work
from serve.feedback import FeedbackLog
from serve.gateway import Gateway
from serve.http import build_api
from serve.keys import KeyRing
from serve.limits import Limits
from serve.live import LiveModifiers, LiveRouter
from serve.meters import RayMeters, SwapMeter
from serve.middleware import RETRY_AFTER_S
from serve.placement import count_engines
from serve.vllm import VllmBackend

logger = logging.getLogger("ray.serve")

_MOST_THREADS = 8
_GRACE_S = 120.0
"""How long a replica that is to stop may finish the answers it has begun."""


_HEAD = "node:__internal_head__"
"""The resource that Ray gives to the head of every cluster."""
_LOST = Failed(503, "the engine was lost, try again", "engine_lost", retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True)
class Served:
    """What is served: everything that a replica on any node needs to know.

    Attributes:
        storage: URI of the store.
        base_sha256: see `LoadedBase`; None where the base's files are not at hand, and any modifier may fit.
        temperature: for requests that name none: the one that base and modifiers were measured with.
        most_answers: that all engines take, when there are as many as there may be; None: any number.
        room: requests for answers that an engine takes; what is more than all together take is refused at the door.
        log: whether requests may be kept as new tasks; see `serve.feedback`.
        threads: of an engine's computing; None takes the machine's cores, as far as they still help.
        gpu_share: of a GPU's memory, for each engine, where there is one.
        weights: see `cascade.config.Serving`.
        vllm: URL of a vLLM server that computes instead of an engine of ours.
    """

    base: Base
    storage: str
    base_sha256: str | None = None
    temperature: float = 1.0
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None
    log: bool = False
    most_answers: int | None = None
    room: int | None = None
    gpu_share: float = 1.0
    weights: Weights = "full"
    vllm: str | None = None


@ray_serve.deployment(
    name="engine",
    graceful_shutdown_timeout_s=_GRACE_S,
    health_check_period_s=5,
    health_check_timeout_s=30,
)
class EngineReplica:
    """A replica that generates: one base, one modifier slot, one computing thread; or a vLLM server behind it."""

    def __init__(self, served: Served) -> None:
        torch.set_num_threads(1)  # of this thread, which loads; the engine's own has several: see `serve.threads`
        self._engine = _engine(served)
        self._engine.modifiers.watch()

    async def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.stream`."""
        events = self._engine.stream(work)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def healthy(self) -> bool:
        """See `Backend.healthy`."""
        return await self._engine.healthy()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica for which this raises."""
        if not await self._engine.healthy():
            raise RuntimeError("the engine's thread has ended or hangs, or all that it computes fails")

    def __del__(self) -> Awaitable[None] | None:
        """Called by Ray Serve, which awaits what is returned, and again by Python."""
        engine: Engine | VllmBackend | None = self.__dict__.pop("_engine", None)
        return None if engine is None else engine.close()


def _engine(served: Served) -> Engine | VllmBackend:
    store, cache = Store(served.storage), cache_dir() / "serving"
    if served.vllm is not None:
        return VllmBackend(served.vllm, served.base, store, cache / "vllm", served.limits)
    keep_to_share(served.gpu_share)
    loaded = load_base(served.base, weights=served.weights)
    engine = Engine(loaded, store, cache, served.limits, served.threads or min(os.cpu_count() or 1, _MOST_THREADS))
    engine.swapped = SwapMeter()
    return engine


class RemoteEngine:
    """A handle on the engine replicas as a `Backend`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.stream`. A full queue is answered as a 429, a lost replica as a 503.

        Work of which no text has come yet is given to another replica first, once: a request that ends its replica's
        process is to end no more than two.
        """
        begun: Started | None = None
        for last_try in (False, True):
            told = False
            try:
                async with aclosing(self._asked(work)) as events:
                    async for event in events:
                        if isinstance(event, Started) and begun is not None:
                            if event.version != begun.version:  # which the client may have been told already
                                yield _LOST
                                return
                            continue
                        begun = event if isinstance(event, Started) else begun
                        told = told or not isinstance(event, Started)
                        yield event
                return
            except RayActorError:
                logger.exception("an engine replica was lost")
                if told or last_try:
                    yield _LOST
                    return

    async def _asked(self, work: Work) -> AsyncGenerator[Event, None]:
        """What one replica says.

        Raises:
            RayActorError: it is lost.
        """
        response = self._handle.options(stream=True).stream.remote(work)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for event in response:
                yield event
        except BackPressureError:
            yield Failed(429, "the server is busy, try again shortly", "overloaded", retry_after_s=RETRY_AFTER_S)
        except (asyncio.CancelledError, GeneratorExit, RayActorError):
            raise
        except Exception:
            logger.exception("an engine replica failed")
            yield _LOST
        finally:
            response.cancel()

    async def healthy(self) -> bool:
        """See `Backend.healthy`. A full queue is no illness."""
        try:
            return bool(await self._handle.healthy.remote())
        except BackPressureError:
            return True
        except Exception:
            logger.exception("no engine replica answers")
            return False


@ray_serve.deployment(
    name="gateway",
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
    graceful_shutdown_timeout_s=_GRACE_S,
    # It waits more than it computes, and must find a place where the engines have taken every CPU: on the head, where
    # Serve's controller is, so that it does not go with a worker node that is lost.
    ray_actor_options={"num_cpus": 0, "resources": {_HEAD: 0.001}},
)
@ray_serve.ingress()
class Ingress:
    """The HTTP side: router, protocol and chat page."""

    def __init__(self, served: Served, engine: DeploymentHandle[Any]) -> None:
        torch.set_num_threads(1)
        store = Store(served.storage)
        router = LiveRouter(store, cache_dir() / "router")
        # A version that no engine will take is not spoken of here either.
        live = LiveModifiers(store, partial(modifiers.check_file, store, base_sha256=served.base_sha256))
        self._keys, self._room = KeyRing(store), served.room
        for watched in (router, live, self._keys):
            watched.watch()
        self._gateway = Gateway(
            RemoteEngine(engine),
            live,
            router,
            temperature=served.temperature,
            meters=RayMeters(),
            most_answers=served.most_answers,
            feedback=FeedbackLog(store) if served.log else None,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        each = self._room
        room = None if each is None else lambda: each * count_engines()
        return build_api(self._gateway, keys=self._keys, room=room, proxied=True)
