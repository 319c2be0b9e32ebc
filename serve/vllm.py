"""An optional backend for GPUs: a vLLM server computes, and this follows the registry and asks it.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-loras 1 --max-lora-rank 128 --port 9000
    python -m serve CONFIG vllm=http://127.0.0.1:9000

vLLM takes ordinary PEFT folders and keeps them as they are: with `--max-loras 1` one modifier is on the GPU, in 16
bits, not in its compressed form. Each version is expanded into such a folder, in a cache that both processes see, and
loaded under a name that holds the hash of its file. So a name never comes to mean another adapter: where one is loaded
in place of another, vLLM computes requests in flight with the wrong numbers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from cascade import modifiers
from cascade.compression.adapter import save_peft_folder
from cascade.compression.packed import expand
from cascade.config import Base
from cascade.errors import ConfigError, DataError
from cascade.models.base import load_tokenizer
from cascade.models.files import base_folder, base_sha256
from cascade.modifiers import Modifier
from cascade.routing.model import BASE
from cascade.store import Store
from serve.encoder import Encoder
from serve.events import NO_MODIFIER, Delta, Event, Failed, Finished, Started, TokenLogprob, Work
from serve.limits import Limits
from serve.live import LiveModifiers

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_LOAD_S = 120.0
_LOST = Failed(503, "the engine was lost, try again", "engine_lost", retry_after_s=1)


class VllmBackend:
    """Generates through a vLLM server. Make it, `stream` from an event loop, `close` it.

    Attributes:
        modifiers: what is in use; `watch` it to follow the store.
    """

    def __init__(self, url: str, base: Base, store: Store, cache: Path, limits: Limits) -> None:
        """Ask the server what it serves, and load every modifier in use.

        Args:
            url: of the server, without a path.
            cache: folder for expanded modifiers, at the same place for the server.

        Raises:
            ConfigError: the server does not answer, or serves another base.
        """
        self._url, self._store, self._cache = url.rstrip("/"), store, cache
        self._base_sha256 = base_sha256(base)
        self._served, context = self._ask_what_is_served(base)
        tokenizer = load_tokenizer(base)
        self._encoder = Encoder(
            tokenizer, vocabulary=len(tokenizer), context=context, answer_tokens=limits.answer_tokens
        )
        self._http = httpx.AsyncClient(
            base_url=self._url,
            timeout=httpx.Timeout(limits.step_s, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None),
        )
        self.modifiers = LiveModifiers(store, self._open)

    async def stream(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.stream`. Leaving the iteration ends the request, which vLLM notices."""
        arrived = time.perf_counter()
        live = None if work.choice == BASE else self.modifiers.get(work.choice, work.variant, work.version)
        if live is None and work.choice != BASE:
            yield Failed(503, f"there is no modifier {work.choice!r} that can be used", NO_MODIFIER)
            return
        prompt = await asyncio.to_thread(self._encoder.encode, work, live)
        if isinstance(prompt, Failed):
            yield prompt
            return
        body = _body(work, prompt.tokens, prompt.answer_tokens)
        body["model"] = self._served if live is None else name_of(live.modifier)
        version = "" if live is None else live.modifier.version
        try:
            for last_try in (False, True):
                async with self._http.stream("POST", "/v1/completions", json=body) as response:
                    if response.status_code == 404 and live is not None and not last_try:  # it was started anew
                        await asyncio.to_thread(self._open, live.modifier)
                        continue
                    async for event in _events(response, version, len(prompt.tokens), arrived):
                        yield event
                    return
        except (httpx.HTTPError, DataError) as error:
            logger.error("vLLM did not answer: %r", error)
            yield _LOST
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.error("vLLM's answer cannot be read: %r", error)
            yield Failed(502, "the engine's answer cannot be read", "engine_unreadable")

    async def healthy(self) -> bool:
        """Whether the server says that it is."""
        try:
            return (await self._http.get("/health", timeout=_CONNECT_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """Follow the store no longer, and end the connections to the server; work that is not done fails."""
        self.modifiers.close()
        await self._http.aclose()

    def _ask_what_is_served(self, base: Base) -> tuple[str, int]:
        """Name and context of the base."""
        try:
            cards = httpx.get(f"{self._url}/v1/models", timeout=_CONNECT_S).raise_for_status().json()["data"]
            card = next(c for c in cards if not c.get("parent"))
            name, root, context = str(card["id"]), str(card.get("root") or card["id"]), int(card["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise ConfigError(
                f"vllm: {self._url} does not say what it serves ({error!r}): is `vllm serve` running there?"
            ) from error
        folder = str(base_folder(base))
        if not {base.model, folder} & {name, root}:
            raise ConfigError(
                f"vllm: {self._url} serves {root}, but base.model is {base.model}: start it with `vllm serve {folder}`"
            )
        return name, context

    def _open(self, modifier: Modifier) -> None:
        """Have the server load a version.

        Raises:
            DataError: the file is missing, or the server refuses it.
            FormatError: it is damaged, or made for another base.
        """
        folder = self._cache / modifier.sha256
        self._cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                content = modifiers.load(self._store, modifier, base_sha256=self._base_sha256)
                save_peft_folder(expand(content), partial, dtype="float16")
                partial.rename(folder)
        try:
            body = {"lora_name": name_of(modifier), "lora_path": str(folder.absolute())}
            said = httpx.post(f"{self._url}/v1/load_lora_adapter", json=body, timeout=_LOAD_S)
        except httpx.HTTPError as error:
            raise DataError(f"vLLM did not load {modifier.name}: {error!r}") from error
        if said.status_code == 404:
            raise DataError("vLLM loads no adapters while it runs: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True")
        if said.status_code != 200 and "already been loaded" not in said.text:
            raise DataError(f"vLLM refuses {modifier.name}: {said.text[:500]}")


def name_of(modifier: Modifier) -> str:
    """What vLLM calls a version: domain, and the hash of its file."""
    return f"{modifier.domain}-{modifier.sha256[:32]}"


def _body(work: Work, prompt: list[int], answer_tokens: int) -> dict[str, Any]:
    """A request of vLLM's completions API; it streams always, so that a client's leaving ends it."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "temperature": work.temperature,
        "top_p": work.top_p,
        "seed": work.seed,
        "stop": list(work.stop),
        "stream": True,
        "stream_options": {"include_usage": True},
        # The server's own generation_config.json may say otherwise.
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    if work.logprobs is not None:
        body["logprobs"] = work.logprobs
    if work.grammar is not None and work.grammar.kind == "json_schema":
        body["structured_outputs"] = {"json": json.loads(work.grammar.text)}
    elif work.grammar is not None:
        body["structured_outputs"] = {"grammar": work.grammar.text}
    return body


async def _events(response: httpx.Response, version: str, prompt_tokens: int, arrived: float) -> AsyncIterator[Event]:
    """What a response says, as events."""
    if response.status_code != 200:
        yield _failure(response.status_code, (await response.aread()).decode(errors="replace"))
        return
    reason, tokens, started = None, 0, False
    async for data in _data(response):
        if data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            yield _failure(int(chunk["error"].get("code") or 500), data.decode(errors="replace"))
            return
        if not started:
            yield Started(version, prompt_tokens, (time.perf_counter() - arrived) * 1e3, 0.0)
            started = True
        tokens = int((chunk.get("usage") or {}).get("completion_tokens", tokens))
        for choice in chunk.get("choices", []):
            reason = choice.get("finish_reason") or reason
            noted = _logprobs(choice.get("logprobs"))
            if choice["text"] or noted:
                yield Delta(choice["text"], noted)
    yield _LOST if reason is None else Finished("length" if reason == "length" else "stop", tokens)


async def _data(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of a response's events. httpx's own lines end at characters, too, that a text may hold: U+2028, say."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _logprobs(said: dict[str, Any] | None) -> tuple[TokenLogprob, ...]:
    if not said:
        return ()
    rivals = said.get("top_logprobs") or [None] * len(said["tokens"])
    return tuple(
        TokenLogprob(token, float(logprob or 0.0), tuple((beside or {}).items()))
        for token, logprob, beside in zip(said["tokens"], said["token_logprobs"], rivals, strict=True)
    )


def _failure(status: int, text: str) -> Failed:
    if status == 400:
        return Failed(400, f"vLLM refuses the request: {text[:500]}", "invalid_value")
    if status == 429:
        return Failed(429, "the server is busy, try again shortly", "overloaded", retry_after_s=1)
    logger.error("vLLM answered %d: %s", status, text[:500])
    return Failed(503, "the engine cannot answer now, try again", "engine_lost", retry_after_s=1)
