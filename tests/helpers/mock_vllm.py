"""A server with the part of vLLM's HTTP interface that `serve.vllm` uses, and vLLM's own rules for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from served import served

from cascade.compression.adapter import load_peft_folder


class MockVllm:
    """What the server knows and was asked.

    Attributes:
        adapters: PEFT folders by name.
        requests: bodies of completions, in order.
        text: what it answers; "" for the model's name.
        ended: how many streams were left before their end.
        updates: whether adapters may be loaded while it runs.
        stands_after: tokens after which answers stand still until their clients leave, if any do.
        script: what the next completion answers instead of an answer: a status and a body.
    """

    def __init__(self, base: Path) -> None:
        self.base = str(base)
        self.adapters: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.text = ""
        self.ended = 0
        self.updates = True
        self.script: list[tuple[int, str]] = []
        self.stands_after: int | None = None
        self.api = self._api()
        self._web: uvicorn.Server

    @property
    def connections(self) -> int:
        """How many clients hold open, while it runs."""
        return len(self._web.server_state.connections)

    def _api(self) -> FastAPI:
        api = FastAPI()

        @api.get("/health")
        def health() -> Response:
            return Response()

        @api.get("/v1/models")
        def models() -> dict[str, Any]:
            base = {"id": "the-base", "root": self.base, "parent": None, "max_model_len": 256}
            return {"data": [base, *({"id": n, "root": p, "parent": "the-base"} for n, p in self.adapters.items())]}

        @api.post("/v1/load_lora_adapter")
        async def load(request: Request) -> Response:
            if not self.updates:
                return error(404, "Not Found")
            body = await request.json()
            if body["lora_name"] in self.adapters:
                return error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
            await asyncio.to_thread(load_peft_folder, body["lora_path"])
            self.adapters[body["lora_name"]] = body["lora_path"]
            return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

        @api.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.requests.append(body)
            if self.script:
                return error(*self.script.pop(0))
            if body["model"] not in ("the-base", *self.adapters):
                return error(404, f"The model `{body['model']}` does not exist.")
            return StreamingResponse(self._answer(body), media_type="text/event-stream")

        return api

    async def _answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """A letter a token."""
        text = (self.text or body["model"])[: body["max_tokens"]]
        try:
            for i, letter in enumerate(text):
                if i == self.stands_after:
                    await asyncio.Event().wait()
                reason = None if i + 1 < len(text) else "length" if len(text) == body["max_tokens"] else "stop"
                yield line({"choices": [{"text": letter, "finish_reason": reason, "logprobs": noted(letter, body)}]})
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(text)}
            yield line({"choices": [], "usage": usage}) + "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.ended += 1
            raise


def noted(letter: str, body: dict[str, Any]) -> dict[str, Any] | None:
    if "logprobs" not in body:
        return None
    return {"tokens": [letter], "token_logprobs": [-0.5], "top_logprobs": [{letter: -0.5, "?": -1.5}]}


def line(chunk: dict[str, Any]) -> str:
    """An event, whose text is not escaped, as vLLM does not either."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)


@contextmanager
def running(server: MockVllm) -> Iterator[str]:
    """Its URL, while it answers on loopback."""
    server._web = uvicorn.Server(uvicorn.Config(server.api, log_level="error"))
    with served(server._web) as url:
        yield url
