"""Text on its way out of the engine: the first at once, then in moments, the end at once, and nothing lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
from engine_events import collect, text_of
from virtual_time import in_virtual_time

from cascade.models.generation import Batch
from serve import outbox as module
from serve.events import Delta, Finished, Started, TokenLogprob
from serve.outbox import Outbox

STARTED, FINISHED = Started("1", 3, 0.0, 0.0), Finished("stop", 3)


@pytest.fixture
def pace(monkeypatch):
    """So long that a test that waited for it would show."""
    monkeypatch.setattr(module, "PACE_S", 600.0)


async def soon(outbox):
    return await asyncio.wait_for(outbox.get(), 60)


async def test_the_first_text_goes_at_once_and_the_rest_with_the_end(pace):
    outbox = Outbox()
    for event in (STARTED, Delta("a")):
        outbox.put(event)
    assert [await soon(outbox), await soon(outbox)] == [STARTED, Delta("a")]
    for i, event in enumerate((*map(Delta, "bcd"), FINISHED)):
        asyncio.get_running_loop().call_later(0.02 * i, outbox.put, event)
    assert [await soon(outbox), await soon(outbox)] == [Delta("bcd"), FINISHED]


@in_virtual_time
async def test_text_is_held_for_no_longer_than_the_pace(monkeypatch):
    monkeypatch.setattr(module, "PACE_S", 0.2)
    monkeypatch.setattr(module.time, "perf_counter", asyncio.get_running_loop().time)
    outbox = Outbox()
    outbox.put(Delta("a"))
    await soon(outbox)
    outbox.put(Delta("b"))
    asyncio.get_running_loop().call_later(0.05, outbox.put, Delta("c"))
    assert await soon(outbox) == Delta("bc")
    await asyncio.sleep(0.25)
    outbox.put(Delta("late"))
    async with asyncio.timeout(0.1):  # there already: nothing is waited for
        assert await outbox.get() == Delta("late")


async def test_tokens_stay_with_their_text(pace):
    outbox = Outbox()
    noted = [TokenLogprob(letter, -0.5) for letter in "abc"]
    outbox.put(Delta("a", (noted[0],)))
    await soon(outbox)
    outbox.put(Delta("b", (noted[1],)))
    outbox.put(Delta("c", (noted[2],)))
    outbox.put(FINISHED)
    assert await soon(outbox) == Delta("bc", (noted[1], noted[2]))


async def test_nothing_is_lost_between_a_thread_and_the_loop(monkeypatch):
    monkeypatch.setattr(module, "PACE_S", 0.001)
    outbox, rng = Outbox(), random.Random(1)
    letters = [chr(97 + i % 26) for i in range(3000)]

    def make():
        for letter in letters:
            outbox.put(Delta(letter))
            if rng.random() < 0.1:
                time.sleep(rng.random() * 0.002)
        outbox.put(FINISHED)

    thread = threading.Thread(target=make)
    thread.start()
    events = [await soon(outbox)]
    while events[-1] != FINISHED:
        events.append(await soon(outbox))
    thread.join()
    assert text_of(events) == "".join(letters)


async def test_an_engine_sends_fewer_events_than_tokens(make_engine, work, reference, pace, monkeypatch):
    engine, sent, heard = make_engine(), threading.Event(), threading.Event()
    put, step = Outbox.put, Batch.step

    def noted_put(outbox, event):
        put(outbox, event)
        if isinstance(event, Delta):
            sent.set()

    def held_step(batch, on_token=None):
        if sent.is_set():  # what follows the first text waits until that has arrived alone
            assert heard.wait(120)
        return step(batch, on_token)

    monkeypatch.setattr(Outbox, "put", noted_put)
    monkeypatch.setattr(Batch, "step", held_step)
    piece, events = work("letters", max_tokens=60, logprobs=1), []
    async for event in engine.stream(piece):
        events.append(event)
        if isinstance(event, Delta):
            heard.set()
    _, first, rest, finished = events
    assert first.text
    assert first.text + rest.text == reference(piece)
    whole = await collect(engine, work("letters", max_tokens=60, logprobs=1, stream=False))
    assert [t.token for t in (*first.tokens, *rest.tokens)] == [t.token for t in whole[1].tokens]
    assert finished == whole[-1]


async def test_whoever_leaves_while_text_is_held_is_no_longer_computed_for(make_engine, work, pace, passes):
    engine = make_engine()
    stream = engine.stream(work("letters", max_tokens=400))
    await anext(stream), await anext(stream)
    held = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    held.cancel()
    await asyncio.wait([held])
    assert await passes.until(lambda: engine.load == (0, 0)) < 40
