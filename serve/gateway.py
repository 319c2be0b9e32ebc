"""The HTTP side, without Ray: requests in OpenAI's shape are routed, handed to a backend, and answered.

Every response, errors and streams included, carries `x-request-id`, `x-cascade-route`, `-modifier-version`,
`-confidence`, `-reason`, `-queue-ms` and `-swap-ms`; what is not known is filled in by `serve.middleware`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cascade.routing.model import BASE
from cascade.tasks import Route
from serve.answers import DONE, CompletionShape, Said, Shape, model_list, route_headers, sse, usage
from serve.errors import ApiError
from serve.events import NO_MODIFIER, Backend, Delta, Event, Failed, Finished, Started, TokenLogprob, Variant, Work
from serve.feedback import FeedbackLog
from serve.live import LiveModifiers, LiveRouter, stand_in
from serve.meters import NO_METERS, Meters
from serve.protocol import ROUTED, Body, ChatRequest, CompletionRequest, Feedback, parse
from serve.tools import Toolbox

HEALTH_TIMEOUT_S = 5.0
_SMALL = 16_384
"""Bytes of a body that are read in no time; larger ones are read beside the event loop, two at a time."""

T = TypeVar("T")
AnyRequest = ChatRequest | CompletionRequest
Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


@dataclass
class Answer:
    """One of the n answers to a request, while it is being made.

    Attributes:
        letters: of its tokens so far.
    """

    index: int
    events: AsyncGenerator[Event, None]
    text: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    letters: int = 0
    count: int = 0


class Gateway:
    """Routes requests and shapes answers.

    Attributes:
        temperature: for requests that name none.
        most_answers: that there is ever room for at one time; None: any number.
        feedback: keeps what users say of answers; None answers /v1/feedback with 404.
    """

    def __init__(
        self,
        backend: Backend,
        modifiers: LiveModifiers,
        router: LiveRouter,
        *,
        temperature: float = 1.0,
        meters: Meters = NO_METERS,
        most_answers: int | None = None,
        feedback: FeedbackLog | None = None,
    ) -> None:
        self.backend, self.modifiers, self.router = backend, modifiers, router
        self.temperature, self.most_answers, self.meters, self.feedback = temperature, most_answers, meters, feedback
        self.started = int(time.time())
        self._readers = ThreadPoolExecutor(2, "read")
        self._writer = ThreadPoolExecutor(4, "log")  # of its own: a store that hangs must not hold up routing
        self._health = (float("-inf"), True)
        self._checking: asyncio.Task[bool] | None = None

    async def chat(self, body: bytes, request_id: str, owner: str = "") -> Response:
        """Answer a chat completion request.

        Args:
            owner: name of the API key that asks.

        Raises:
            ApiError: the request is refused, with the headers known by then.
        """
        request, route = await self._read(ChatRequest, body)
        return await self._answer(request, route, Shape.new(request_id, route.choice, request.wants_usage), owner)

    async def complete(self, body: bytes, request_id: str, owner: str = "") -> Response:
        """Answer a (legacy) completion request; as `chat`."""
        request, route = await self._read(CompletionRequest, body)
        return await self._answer(
            request, route, CompletionShape.new(request_id, route.choice, request.wants_usage), owner
        )

    async def judge(self, body: bytes, owner: str = "") -> dict[str, object]:
        """Take down what a user says of an answer that the same key got.

        Raises:
            ApiError: the body is refused, or nothing is known of such a request.
        """
        said = await self._parsed(Feedback, body)
        if self.feedback is None:
            raise ApiError(404, "this server keeps no log of requests: start it with log=true", code="no_log")
        rated = partial(self.feedback.rate, said.request_id, said.rating, said.comment, said.answer, owner=owner)
        if not await asyncio.get_running_loop().run_in_executor(self._writer, rated):
            raise ApiError(404, "there is no such request in the log", code="unknown_request", param="request_id")
        self.meters.rated(said.rating)
        return {"object": "feedback", "request_id": said.request_id, "rating": said.rating}

    async def models(self) -> dict[str, object]:
        """The answer of /v1/models."""
        return model_list(self.modifiers.versions(), self.started)

    async def ready(self) -> bool:
        """Whether a request would be answered, asked of the backend now."""
        try:
            healthy = await asyncio.wait_for(self.backend.healthy(), HEALTH_TIMEOUT_S)
        except TimeoutError:
            healthy = False
        self._health = (time.monotonic(), healthy)
        return healthy

    async def healthy(self) -> bool:
        """What `ready` last said; asked again in the background, so that a busy backend does not delay the answer."""
        asked, healthy = self._health
        age = time.monotonic() - asked
        if age > HEALTH_TIMEOUT_S * 2:
            return await self.ready()
        if age > 1 and (self._checking is None or self._checking.done()):
            self._checking = asyncio.create_task(self.ready())
        return healthy

    async def _parsed(self, kind: type[Body], body: bytes) -> Body:
        if len(body) <= _SMALL:
            return parse(kind, body)
        return await asyncio.get_running_loop().run_in_executor(self._readers, parse, kind, body)

    async def _read(self, kind: type[Asked], body: bytes) -> tuple[Asked, Route]:
        """A request and its route: what takes time for large ones is done beside the event loop."""
        request = await self._parsed(kind, body)
        if self.most_answers is not None and request.answers > self.most_answers:
            raise _too_many(request, self.most_answers)
        pool = None if len(body) <= _SMALL else self._readers
        return request, await asyncio.get_running_loop().run_in_executor(pool, self._route, request)

    def _route(self, request: AnyRequest) -> Route:
        try:
            asked, _ = request.asked, request.grammar  # made once, and kept with the request
        except RecursionError:
            raise ApiError(400, "a tool is nested too deeply", code="invalid_value", param="tools") from None
        available = self.modifiers.versions()
        if request.model == ROUTED:
            if isinstance(request, CompletionRequest) and any(isinstance(p, tuple) for p in request.prompts):
                message = "The router reads text, not token ids: name the model that is to answer."
                raise ApiError(400, message, code="invalid_value", param="model")
            return self.router.route(asked, available, request.router_threshold, request.router_mode or "default")
        if request.model == BASE or request.model in available:
            return self.router.override(asked, request.model)
        names = ", ".join([ROUTED, BASE, *sorted(available)])
        message = f"The model {request.model[:80]!r} does not exist; there are {names}."
        raise ApiError(404, message, code="model_not_found", param="model")

    async def _answer(self, request: AnyRequest, route: Route, shape: Shape, owner: str) -> Response:
        """What the route's choice answers; where the router chose a modifier that no engine can use, the base."""
        variant = self.modifiers.pick(route.choice, shape.request_id)
        chosen = self.modifiers.get(route.choice, variant)
        version = chosen.modifier.version if chosen else ""
        headers = route_headers(route) | {"x-cascade-modifier-version": version}
        works = _works(request, route, variant, version, self.temperature)
        answers = [Answer(i, self.backend.stream(work)) for i, work in enumerate(works)]
        self.meters.routed(route)
        try:
            begun = await _begun(answers, headers)
            self.meters.started(begun[0])
            headers |= {
                "x-cascade-modifier-version": begun[0].version,
                "x-cascade-queue-ms": f"{begun[0].queue_ms:.1f}",
                "x-cascade-swap-ms": f"{begun[0].swap_ms:.1f}",
            }
            prompt_tokens = sum(started.prompt_tokens for started in begun[:: request.n or 1])
            if not request.stream:
                said = await _together(_whole(a, request, headers) for a in answers)
                used = usage(prompt_tokens, sum(a.count for a in answers))
                self._done(request, route, shape, said, used, owner)
                return JSONResponse(shape.whole(said, used), headers=headers)
        except BaseException as error:
            for answer in answers:
                await answer.events.aclose()
            if isinstance(error, ApiError):
                if error.code == NO_MODIFIER and request.model == ROUTED and route.choice != BASE:
                    return await self._answer(request, stand_in(route), replace(shape, model=BASE), owner)
                self.meters.failed(error.status)
            raise
        stream = self._sse(answers, request, route, shape, prompt_tokens, owner)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return _ClosingStream(stream, media_type="text/event-stream", headers=headers)

    async def _sse(
        self, answers: list[Answer], request: AnyRequest, route: Route, shape: Shape, prompt_tokens: int, owner: str
    ) -> AsyncGenerator[bytes, None]:
        """The answers as server-sent events. Being closed (the client has gone) closes the work."""
        noted = request.rivals is not None
        said: list[Said] = []
        async with aclosing(_merged(answers)) as events:
            for answer in answers:
                yield shape.first(answer.index)
            async for answer, event in events:
                if isinstance(event, Failed):
                    self.meters.failed(event.status)
                    yield sse(_as_error(event, {}).body())
                    return
                if isinstance(event, Delta):
                    start = answer.letters
                    _note(answer, event)
                    if not _tools(request):
                        yield shape.part(answer.index, event.text, event.tokens if noted else None, start)
                elif isinstance(event, Finished):
                    said.append(_said(answer, event, request))
                    if _tools(request) and not said[-1].calls and said[-1].text:
                        yield shape.part(answer.index, said[-1].text, said[-1].logprobs)
                    yield shape.last(said[-1])
            used = usage(prompt_tokens, sum(a.count for a in answers))
            self._done(request, route, shape, sorted(said, key=lambda s: s.index), used, owner)
            if request.wants_usage:
                yield shape.used(used)
            yield DONE

    def _done(
        self,
        request: AnyRequest,
        route: Route,
        shape: Shape,
        said: Sequence[Said],
        used: dict[str, int],
        owner: str,
    ) -> None:
        self.meters.finished(route.choice, used["prompt_tokens"], used["completion_tokens"])
        if self.feedback is not None and isinstance(request, ChatRequest):
            self.feedback.answered(shape.request_id, request.conversation, said[0].text, route, owner=owner)
            if route.reason == "low-confidence":
                keep = partial(self.feedback.keep, shape.request_id, owner=owner)
                asyncio.get_running_loop().run_in_executor(self._writer, keep)


def _works(request: AnyRequest, route: Route, variant: Variant, version: str, temperature: float) -> list[Work]:
    """A piece of work for each answer to each prompt; each samples with a seed of its own.

    Args:
        temperature: where the request names none.
    """
    seed = secrets.randbits(63) if request.seed is None else request.seed
    work = Work(
        choice=route.choice,
        messages=tuple(request.conversation) if isinstance(request, ChatRequest) else (),
        max_tokens=request.limit,
        stop=request.stops,
        temperature=temperature if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        variant=variant,
        version=version,
        stream=bool(request.stream) and not _tools(request),
        grammar=request.grammar,
        logprobs=request.rivals,
    )
    prompts = request.prompts if isinstance(request, CompletionRequest) else [None]
    return [replace(work, prompt=p, seed=(seed + i) % 2**63) for p in prompts for i in range(request.n or 1)]


async def _begun(answers: Sequence[Answer], headers: Mapping[str, str]) -> list[Started]:
    """How each of the answers begins.

    Raises:
        ApiError: one of them does not.
    """
    firsts = await _together(anext(a.events) for a in answers)
    for first in firsts:
        if isinstance(first, Failed):
            raise _as_error(first, headers)
    begun = [first for first in firsts if isinstance(first, Started)]
    assert len(begun) == len(answers)
    return begun


async def _whole(answer: Answer, request: AnyRequest, headers: Mapping[str, str]) -> Said:
    """One answer to its end.

    Raises:
        ApiError: it breaks off.
    """
    failed = Failed(500, "the answer broke off", "internal_error")
    async for event in answer.events:
        if isinstance(event, Delta):
            _note(answer, event)
        elif isinstance(event, Finished):
            return _said(answer, event, request)
        elif isinstance(event, Failed):
            failed = event
            break
    raise _as_error(failed, headers)


async def _together(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return. Where one fails the others are ended, and have ended when this raises."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tools(request: AnyRequest) -> bool:
    return isinstance(request, ChatRequest) and bool(request.box)


def _note(answer: Answer, delta: Delta) -> None:
    answer.text.append(delta.text)
    answer.tokens.extend(delta.tokens)
    answer.letters += sum(len(t.token) for t in delta.tokens)


def _said(answer: Answer, event: Finished, request: AnyRequest) -> Said:
    answer.count = event.completion_tokens
    text = "".join(answer.text)
    box = request.box if isinstance(request, ChatRequest) else Toolbox()
    calls = box.read(text, cut_off=event.finish_reason == "length") if box else []
    logprobs = answer.tokens if request.rivals is not None else None
    return Said(answer.index, text, event.finish_reason, logprobs, calls)


async def _merged(answers: list[Answer]) -> AsyncGenerator[tuple[Answer, Event], None]:
    """Events of several answers as they come; closing it closes them all."""
    queue: asyncio.Queue[tuple[Answer, Event]] = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        async with aclosing(answer.events):
            async for event in answer.events:
                queue.put_nowait((answer, event))
                if isinstance(event, Finished | Failed):
                    return
        queue.put_nowait((answer, Failed(500, "the answer broke off", "internal_error")))

    pumps = [asyncio.create_task(pump(a)) for a in answers]
    try:
        left = len(answers)
        while left:
            answer, event = await queue.get()
            left -= isinstance(event, Finished)
            yield answer, event
            if isinstance(event, Failed):
                return
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _too_many(request: AnyRequest, most: int) -> ApiError:
    param = "n" if (request.n or 1) > 1 else "prompt"
    message = (
        f"Invalid value for '{param}': this server takes {most} answers at one time, and {request.answers} are asked "
        "for (prompts times n). Ask for fewer, or start it with larger rows= or waiting=."
    )
    return ApiError(400, message, code="invalid_value", param=param)


class _ClosingStream(StreamingResponse):
    """Closes its iterator however it ends, so that the work of a client who has gone is cancelled at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


def _as_error(failure: Failed, headers: Mapping[str, str]) -> ApiError:
    error = ApiError(
        failure.status,
        failure.message,
        code=failure.code,
        param=failure.param,
        retry_after_s=failure.retry_after_s,
    )
    error.known_headers = dict(headers)
    return error
