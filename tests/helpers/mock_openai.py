"""An OpenAI-compatible server with latency, limits, faults, a prompt cache, a Batch API and a bill of its own.

    python mock_openai.py '{"latency_s": 0.2, "requests_per_minute": 6000}'

prints its port. What it answers is "<system hash> <prompt>" unless it was given a book of answers. It counts on its
own side what a client can only claim: what was answered how often, how many requests were in flight, what is owed.

/v1/chat/completions, /v1/files, /v1/batches; POST /settings (changes them and clears the counts), POST /answers
({prompt: answer}, or {"model|prompt": answer}), GET /stats.
"""

from __future__ import annotations

import asyncio
import email.policy
import json
import random
import socket
import sys
import time
import uuid
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, fields
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

FAULTS = ("429", "500", "hang", "late", "broken_json", "empty", "cut")
Body = dict[str, Any]


@dataclass
class Settings:
    """What the server does.

    Attributes:
        window_s: over which requests and tokens are counted against the limits.
        faults: share of the requests that meet one of `FAULTS`, each as often.
        hang_s: how long a hanging or late response takes; one that hangs is not charged, a late one is.
        completion_tokens: of every answer that is not in the book.
        cached_prompts: how many prompts (all messages but the last) it remembers.
        batch_s: how long a batch takes.
        enqueued_tokens: most prompt tokens in batches that are in progress; one beyond them fails as it is validated.
        prices: US dollars per million prompt, cached and completion tokens.
    """

    latency_s: float = 0.2
    requests_per_minute: float = 1e9
    tokens_per_minute: float = 1e9
    window_s: float = 60.0
    max_in_flight: int = 1_000_000
    faults: float = 0.0
    hang_s: float = 5.0
    completion_tokens: int = 20
    cached_prompts: int = 0
    batch_s: float = 1.0
    enqueued_tokens: float = 1e9
    batch_price_share: float = 0.5
    prices: list[float] = field(default_factory=lambda: [1.0, 0.5, 4.0])
    seed: int = 0


@dataclass
class Counts:
    """What has happened."""

    arrived: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)  # prompt -> times
    charged_usd: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    batches: int = 0


class Window:
    """Amounts of the last seconds."""

    def __init__(self, limit: float, seconds: float) -> None:
        self.limit, self.seconds, self.total = limit, seconds, 0.0
        self.entries: deque[tuple[float, float]] = deque()

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` is within the limit."""
        while self.entries and self.entries[0][0] <= now - self.seconds:
            self.total -= self.entries.popleft()[1]
        over, freed = self.total + amount - self.limit, 0.0
        if over <= 0:
            return 0.0
        for at, old in self.entries:
            freed += old
            if freed >= over:
                return at + self.seconds - now
        return self.seconds

    def add(self, now: float, amount: float) -> None:
        self.entries.append((now, amount))
        self.total += amount


class MockOpenAI:
    """The handlers and all state."""

    def __init__(self, settings: Settings) -> None:
        self.book: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Body] = {}
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """Work with these settings from now on; counts begin anew."""
        self.settings, self.counts = settings, Counts()
        self.random = random.Random(settings.seed)
        self.requests = Window(settings.requests_per_minute * settings.window_s / 60, settings.window_s)
        self.tokens = Window(settings.tokens_per_minute * settings.window_s / 60, settings.window_s)
        self.cache: OrderedDict[str, None] = OrderedDict()

    def app(self) -> Starlette:
        post, get = ["POST"], ["GET"]
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=post),
                Route("/v1/files", self.upload, methods=post),
                Route("/v1/files/{id}/content", self.download, methods=get),
                Route("/v1/batches", self.create_batch, methods=post),
                Route("/v1/batches", self.list_batches, methods=get),
                Route("/v1/batches/{id}", self.show_batch, methods=get),
                Route("/settings", self.change, methods=post),
                Route("/answers", self.learn, methods=post),
                Route("/stats", self.stats, methods=get),
            ]
        )

    async def change(self, request: Request) -> Response:
        self.use(Settings(**await request.json()))
        return JSONResponse({})

    async def learn(self, request: Request) -> Response:
        self.book |= await request.json()
        return JSONResponse({})

    async def stats(self, request: Request) -> Response:
        counts = {f.name: getattr(self.counts, f.name) for f in fields(Counts)}
        if not request.query_params.get("answered"):
            counts["answered"] = {}
        return JSONResponse(counts | {"distinct": len(self.counts.answered)})

    async def chat(self, request: Request) -> Response:
        body, counts, began = await request.json(), self.counts, time.monotonic()
        counts.arrived += 1
        counts.in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, counts.in_flight)
        try:
            return await self._chat(body, began)
        finally:
            counts.in_flight -= 1
            counts.spans.append((began, time.monotonic()))

    async def _chat(self, body: Body, now: float) -> Response:
        completion = self.complete(body)
        wait = max(self.requests.wait(now, 1), self.tokens.wait(now, completion["usage"]["total_tokens"]))
        if wait or self.counts.in_flight > self.settings.max_in_flight:
            self.counts.outcomes["over_limit"] += 1
            return error(429, "over the limit", {"Retry-After": f"{max(wait, 0.1):.2f}"})
        self.requests.add(now, 1)
        self.tokens.add(now, completion["usage"]["total_tokens"])
        fault = self.random.choice(FAULTS) if self.random.random() < self.settings.faults else "ok"
        self.counts.outcomes[fault] += 1
        if fault == "429":
            return error(429, "slow down", {"Retry-After": "0.2"})
        if fault == "500":
            return error(500, "internal error")
        await asyncio.sleep(self.settings.hang_s if fault in ("hang", "late") else self.settings.latency_s)
        if fault == "hang":
            return error(504, "gave up")
        if fault in ("empty", "cut"):
            choice = completion["choices"][0]
            choice["finish_reason"] = "length" if fault == "cut" else "stop"
            choice["message"]["content"] = "" if fault == "empty" else choice["message"]["content"][:5]
        self.charge(body, completion, 1.0)
        if fault == "broken_json":
            return Response(json.dumps(completion)[:-20], media_type="application/json")
        return JSONResponse(completion)

    def complete(self, body: Body) -> Body:
        """The completion of a request, with its usage."""
        prompt, head = body["messages"][-1]["content"], json.dumps(body["messages"][:-1])
        text = self.book.get(f"{body['model']}|{prompt}", self.book.get(prompt))
        tokens_out = self.settings.completion_tokens if text is None else -(-len(text) // 4)
        tokens_in = sum(4 + -(-len(m["content"]) // 4) for m in body["messages"])
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        if self.settings.cached_prompts and len(body["messages"]) > 1:
            known = head in self.cache
            self.cache[head] = None
            self.cache.move_to_end(head)
            while len(self.cache) > self.settings.cached_prompts:
                self.cache.popitem(last=False)
            cached = sum(4 + -(-len(m["content"]) // 4) for m in body["messages"][:-1]) if known else 0
            usage["prompt_tokens_details"] = {"cached_tokens": cached}  # type: ignore[assignment]
        message = {"role": "assistant", "content": f"answer to {prompt}" if text is None else text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        head_of_it = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"]}
        return head_of_it | {"choices": [choice], "usage": usage}

    def charge(self, body: Body, completion: Body, share: float) -> None:
        """Put an answer on the bill."""
        usage, (price_in, price_cached, price_out) = completion["usage"], self.settings.prices
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        usd = (usage["prompt_tokens"] - cached) * price_in + cached * price_cached
        usd += usage["completion_tokens"] * price_out
        self.counts.charged_usd += share * usd / 1e6
        self.counts.prompt_tokens += usage["prompt_tokens"]
        self.counts.cached_tokens += cached
        self.counts.completion_tokens += usage["completion_tokens"]
        self.counts.answered[body["messages"][-1]["content"]] += 1

    # ------------------------------------------------------------------------------------------ Batch API

    async def upload(self, request: Request) -> Response:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        form = email.message_from_bytes(head + await request.body(), policy=email.policy.HTTP)
        name = f"file-{uuid.uuid4().hex}"
        parts = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        self.files[name] = parts["file"].get_payload(decode=True)
        size = len(self.files[name])
        meta = {"id": name, "object": "file", "bytes": size, "created_at": 1, "filename": "x", "purpose": "batch"}
        return JSONResponse(meta | {"status": "processed"})

    async def download(self, request: Request) -> Response:
        return Response(self.files[request.path_params["id"]], media_type="application/jsonl")

    async def create_batch(self, request: Request) -> Response:
        body = await request.json()
        self.counts.batches += 1
        batch = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
        }
        self.batches[batch["id"]] = dict(batch)
        return JSONResponse(batch)

    async def list_batches(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self._look(b) for b in self.batches.values()], "has_more": False}
        )

    async def show_batch(self, request: Request) -> Response:
        return JSONResponse(self._look(self.batches[request.path_params["id"]]))

    def _look(self, batch: Body) -> Body:
        """A batch as it stands: validated at the first look, worked through when its time is up."""
        if batch["status"] == "validating":
            self._validate(batch)
        if batch["status"] == "in_progress" and time.monotonic() >= batch["ready"]:
            results = []
            for line in self.files[batch["input_file_id"]].splitlines():
                call = json.loads(line)
                failed = self.random.random() < self.settings.faults
                completion = self.complete(call["body"])
                if not failed:
                    self.charge(call["body"], completion, self.settings.batch_price_share)
                response = {"status_code": 500 if failed else 200, "body": {} if failed else completion}
                line = {"custom_id": call["custom_id"], "response": response, "error": None}
                results.append(json.dumps(line, ensure_ascii=False))
            name = f"file-{uuid.uuid4().hex}"
            self.files[name] = "\n".join(results).encode()
            batch |= {"status": "completed", "output_file_id": name}
        return {k: v for k, v in batch.items() if k not in ("ready", "tokens")}

    def _validate(self, batch: Body) -> None:
        others = [b for b in self.batches.values() if b["status"] == "in_progress"]
        taken = sum(b["tokens"] for b in others if self._look(b)["status"] == "in_progress")
        calls = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        tokens = sum(4 + -(-len(m["content"]) // 4) for call in calls for m in call["body"]["messages"])
        if taken + tokens > self.settings.enqueued_tokens:
            problem = {"code": "token_limit_exceeded", "message": queue_full(self.settings.enqueued_tokens)}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [problem]}}
            return
        batch |= {"status": "in_progress", "tokens": tokens, "ready": time.monotonic() + self.settings.batch_s}


def queue_full(limit: float) -> str:
    return (
        f"Enqueued token limit reached for model-a in organization org-x. Limit: {limit:,.0f} enqueued tokens. "
        "Please try again once some in_progress batches have been completed."
    )


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return JSONResponse(body, status, headers)


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    app = MockOpenAI(settings).app()
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
