"""The HTTP side, without Ray: requests in OpenAI's shape are routed, handed to a backend, and answered.

Every response, errors and streams included, carries `x-request-id`, `x-cascade-route`, `-modifier-version`,
`-confidence`, `-reason`, `-queue-ms` and `-swap-ms`; what is not known is filled in by `serve.middleware`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cascade.routing.model import BASE
from cascade.tasks import Message, Route
from serve.answers import DONE, CompletionShape, Said, Shape, model_list, route_headers, sse, usage
from serve.errors import ApiError
from serve.events import Backend, Delta, Event, Failed, Finished, Started, TokenLogprob, Variant, Work
from serve.feedback import FeedbackLog
from serve.live import LiveModifiers, LiveRouter
from serve.meters import NO_METERS, Meters
from serve.protocol import ROUTED, ChatRequest, CompletionRequest, Feedback, parse
from serve.tools import read_calls

HEALTH_TIMEOUT_S = 5.0


AnyRequest = ChatRequest | CompletionRequest


@dataclass
class Answer:
    """One of the n answers to a request, while it is being made."""

    index: int
    events: AsyncGenerator[Event, None]
    text: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    count: int = 0
    finish_reason: str = "stop"


class Gateway:
    """Routes requests and shapes answers.

    The system message that a modifier was trained under is put in front of requests that have none: without it the
    modifier would see prompts unlike those it learned from.

    Attributes:
        temperature: for requests that name none.
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
        feedback: FeedbackLog | None = None,
    ) -> None:
        self.backend, self.modifiers, self.router = backend, modifiers, router
        self.temperature, self.meters, self.feedback = temperature, meters, feedback
        self.started = int(time.time())
        self._health = (float("-inf"), True)
        self._checking: asyncio.Task[bool] | None = None

    async def chat(self, body: bytes, request_id: str) -> Response:
        """Answer a chat completion request.

        Raises:
            ApiError: the request is refused, with the headers known by then.
        """
        request = parse(ChatRequest, body)
        route = await asyncio.to_thread(self._route, request, request.conversation)
        return await self._answer(request, route, Shape.new(request_id, route.choice))

    async def complete(self, body: bytes, request_id: str) -> Response:
        """Answer a (legacy) completion request; errors as in `chat`."""
        request = parse(CompletionRequest, body)
        route = await asyncio.to_thread(self._route, request, [Message("user", request.text)])
        return await self._answer(request, route, CompletionShape.new(request_id, route.choice))

    async def judge(self, body: bytes) -> dict[str, object]:
        """Take down what a user says of an answer.

        Raises:
            ApiError: the body is refused, or nothing is known of such a request.
        """
        said = parse(Feedback, body)
        if self.feedback is None:
            raise ApiError(404, "this server keeps no log of requests: start it with log=true", code="no_log")
        if not await asyncio.to_thread(self.feedback.rate, said.request_id, said.rating, said.comment, said.answer):
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

    def _route(self, request: AnyRequest, conversation: list[Message]) -> Route:
        available = self.modifiers.versions()
        if request.model == ROUTED:
            return self.router.route(
                conversation, available, request.router_threshold, request.router_mode or "default"
            )
        if request.model == BASE or request.model in available:
            return self.router.override(conversation, request.model)
        names = ", ".join([ROUTED, BASE, *sorted(available)])
        message = f"The model {request.model[:80]!r} does not exist; there are {names}."
        raise ApiError(404, message, code="model_not_found", param="model")

    async def _answer(self, request: AnyRequest, route: Route, shape: Shape) -> Response:
        variant = self.modifiers.pick(route.choice, shape.request_id)
        chosen = self.modifiers.get(route.choice, variant)
        headers = route_headers(route) | {"x-cascade-modifier-version": chosen.modifier.version if chosen else ""}
        works = self._works(request, route, variant)
        answers = [Answer(i, self.backend.stream(work)) for i, work in enumerate(works)]
        self.meters.routed(route)
        try:
            firsts = await asyncio.gather(*(anext(a.events) for a in answers))
            for first in firsts:
                if isinstance(first, Failed):
                    self.meters.failed(first.status)
                    raise _as_error(first, headers)
            started = firsts[0]
            assert isinstance(started, Started)
            self.meters.started(started)
            headers |= {
                "x-cascade-modifier-version": started.version,
                "x-cascade-queue-ms": f"{started.queue_ms:.1f}",
                "x-cascade-swap-ms": f"{started.swap_ms:.1f}",
            }
            if not request.stream:
                said = await asyncio.gather(*(_whole(a, request, headers) for a in answers))
                used = usage(started.prompt_tokens, sum(a.count for a in answers))
                self._done(request, route, shape, said, used)
                return JSONResponse(shape.whole(said, used), headers=headers)
        except BaseException:
            await asyncio.gather(*(a.events.aclose() for a in answers), return_exceptions=True)
            raise
        stream = self._sse(answers, request, route, shape, started.prompt_tokens)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return _ClosingStream(stream, media_type="text/event-stream", headers=headers)

    def _works(self, request: AnyRequest, route: Route, variant: Variant) -> list[Work]:
        """A piece of work for each of the n answers; each samples with a seed of its own."""
        messages: list[Message] = []
        schema = None
        if isinstance(request, ChatRequest):
            messages = request.conversation
            schema = request.response_format.schema_text if request.response_format else None
            system = self.modifiers.system(route.choice, variant)
            if system and all(m.role != "system" for m in messages):
                messages = [Message("system", system), *messages]
        seed = secrets.randbits(63) if request.seed is None else request.seed
        work = Work(
            choice=route.choice,
            messages=tuple(messages),
            max_tokens=request.limit,
            stop=request.stops,
            temperature=self.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            variant=variant,
            stream=bool(request.stream) and not _tools(request),
            prompt=request.text if isinstance(request, CompletionRequest) else None,
            schema=schema,
            logprobs=request.rivals,
        )
        return [replace(work, seed=(seed + i) % 2**63) for i in range(request.n or 1)]

    async def _sse(
        self, answers: list[Answer], request: AnyRequest, route: Route, shape: Shape, prompt_tokens: int
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
                    _note(answer, event)
                    if not _tools(request):
                        yield shape.part(answer.index, event.text, event.tokens if noted else None)
                elif isinstance(event, Finished):
                    said.append(_said(answer, event, request))
                    if _tools(request) and not said[-1].calls and said[-1].text:
                        yield shape.part(answer.index, said[-1].text, None)
                    yield shape.last(said[-1])
            used = usage(prompt_tokens, sum(a.count for a in answers))
            self._done(request, route, shape, said, used)
            if request.wants_usage:
                yield shape.used(used)
            yield DONE

    def _done(
        self, request: AnyRequest, route: Route, shape: Shape, said: Sequence[Said], used: dict[str, int]
    ) -> None:
        self.meters.finished(route.choice, used["prompt_tokens"], used["completion_tokens"])
        if self.feedback is not None and isinstance(request, ChatRequest):
            self.feedback.answered(shape.request_id, request.conversation, said[0].text, route)
            if route.reason == "low-confidence":
                asyncio.get_running_loop().run_in_executor(None, self.feedback.keep, shape.request_id)


def _tools(request: AnyRequest) -> bool:
    return isinstance(request, ChatRequest) and bool(request.usable_tools)


def _note(answer: Answer, delta: Delta) -> None:
    answer.text.append(delta.text)
    answer.tokens.extend(delta.tokens)


def _said(answer: Answer, event: Finished, request: AnyRequest) -> Said:
    answer.count = event.completion_tokens
    text = "".join(answer.text)
    calls = read_calls(text, request.usable_tools) if isinstance(request, ChatRequest) and _tools(request) else []
    logprobs = answer.tokens if request.rivals is not None else None
    return Said(answer.index, text, event.finish_reason, logprobs, calls)


async def _whole(answer: Answer, request: AnyRequest, headers: Mapping[str, str]) -> Said:
    async for event in answer.events:
        if isinstance(event, Failed):
            raise _as_error(event, headers)
        if isinstance(event, Delta):
            _note(answer, event)
        elif isinstance(event, Finished):
            return _said(answer, event, request)
    raise _as_error(Failed(500, "the answer broke off", "internal_error"), headers)


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
