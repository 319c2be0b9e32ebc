"""Long prompts, long answers and little memory: nobody stands still, nobody is lost, and the bounds hold."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace

import pytest
from engine_events import CHOICES, collect, crowded, text_of, until_load

from cascade.models.generation import Batch
from cascade.models.prompts import Prompts
from cascade.tasks import Message
from serve import jobs, schedule
from serve.events import Finished, Started
from serve.schedule import Chunks


@pytest.fixture
def watched(monkeypatch):
    """Notes ("part", rows) and ("step", rows) as they are computed; each waits for `seconds`, and until it `may` be."""

    class Watched:
        def __init__(self):
            self.seconds, self.log, self.may = 0.0, [], threading.Event()
            self.may.set()

        def note(self, kind, rows):
            time.sleep(self.seconds)
            assert self.may.wait(120)
            self.log.append((kind, tuple(len(r.request.prompt) for r in rows)))

        def last(self, kind, long):
            """When this was last computed for a long prompt, or for short ones."""
            return max(i for i, (k, rows) in enumerate(self.log) if k == kind and (max(rows) > 300) == long)

    watch = Watched()
    advance, step = Prompts.advance, Batch.step

    def watched_advance(prompts, tokens):
        watch.note("part", prompts.rows)
        return advance(prompts, tokens)

    def watched_step(batch, on_token=None):
        watch.note("step", batch.rows)
        return step(batch, on_token)

    monkeypatch.setattr(Prompts, "advance", watched_advance)
    monkeypatch.setattr(Batch, "step", watched_step)
    monkeypatch.setattr(schedule, "_CHUNKS", (16, 16))
    return watch


def in_parts(engine):
    engine._chunks.tokens = 16
    return engine


async def one_comes_later(engine, watched, first, second):
    """Both as tasks: the second comes while the first's prompt is computed."""
    watched.may.clear()
    tasks = [asyncio.create_task(collect(engine, first))]
    await until_load(engine, (1, 0))
    tasks.append(asyncio.create_task(collect(engine, second)))
    await until_load(engine, (1, 1))
    watched.may.set()
    return tasks


async def test_others_go_on_while_a_long_prompt_is_computed(make_engine, work, reference, watched):
    engine = in_parts(make_engine())
    short, long = work("sums", "short", 60), work("sums", "long " + "x" * 300, 5)
    first, second = await one_comes_later(engine, watched, short, long)
    assert (text_of(await first), text_of(await second)) == (reference(short), reference(long))
    parts = [i for i, (kind, rows) in enumerate(watched.log) if kind == "part" and rows[0] > 300]
    assert len(parts) > 15
    between = [watched.log[a + 1 : b] for a, b in itertools.pairwise(parts)]
    assert all(any(kind == "step" for kind, _ in steps) for steps in between)


async def test_a_short_prompt_overtakes_a_long_one(make_engine, work, reference, watched):
    engine = in_parts(make_engine())
    long, short = work("sums", "long " + "x" * 300, 3), work("sums", "short", 3)
    texts = [text_of(await answer) for answer in await one_comes_later(engine, watched, long, short)]
    assert watched.last("step", long=False) < watched.last("part", long=True)
    assert texts == [reference(long), reference(short)]


async def test_whoever_leaves_during_a_prompt_is_no_longer_computed_for(make_engine, work, watched):
    engine, watched.seconds = in_parts(make_engine()), 0.05
    stream = engine.stream(work("letters", "x" * 400))
    assert isinstance(await anext(stream), Started)
    await stream.aclose()
    before = len(watched.log)
    await until_load(engine, (0, 0))
    assert len(watched.log) - before < 12  # of 25 parts


async def test_another_modifier_gets_its_turn_during_a_long_prompt(make_engine, work, reference, watched):
    engine, watched.seconds = in_parts(make_engine(patience_s=0.05)), 0.02
    long, other = work("letters", "x" * 400, 3), work("sums", "short", 3)
    texts = [text_of(await answer) for answer in await one_comes_later(engine, watched, long, other)]
    assert watched.last("step", long=False) < watched.last("part", long=True)
    assert texts == [reference(long), reference(other)]


async def test_one_who_asks_for_a_long_answer_leaves_room_for_others(make_engine, work, reference, watched):
    engine = make_engine(rows=8, tokens=1600)
    pieces = [work("sums", "long", 440), *(work("sums", f"short {i}", 20) for i in range(7))]
    events = await asyncio.gather(*(collect(engine, p) for p in pieces))
    assert [text_of(e) for e in events] == [reference(p) for p in pieces]
    assert max(len(rows) for kind, rows in watched.log if kind == "step") == 8


@pytest.mark.parametrize("rows", [3, 8])
async def test_the_last_to_come_give_way_when_memory_is_short(make_engine, work, reference, monkeypatch, rows):
    engine = make_engine(rows=rows, tokens=460, patience_s=0.01)
    held, gave_way, step, leave = [], [], Batch.step, jobs.Group.wait_again

    def watched_step(batch, on_token=None):
        held.append(sum(g.held for g in engine._schedule.groups.values()) + len(batch.rows))
        return step(batch, on_token)

    def watched_wait(group, job):
        gave_way.append(job.arrived)
        return leave(group, job)

    monkeypatch.setattr(Batch, "step", watched_step)
    monkeypatch.setattr(jobs.Group, "wait_again", watched_wait)
    pieces = [work(CHOICES[i % 3], f"grows {i}", 150, temperature=float(i % 2)) for i in range(6)]
    events = await asyncio.gather(*(collect(engine, p) for p in pieces))
    assert [text_of(e) for e in events] == [reference(p) for p in pieces]
    assert all(sum(isinstance(e, Started) for e in es) == 1 for es in events)
    assert gave_way
    assert max(held) <= 460
    assert engine.load == (0, 0)


async def test_nobody_is_lost_who_comes_while_another_gives_way(make_engine, work, monkeypatch):
    engine = make_engine(rows=3, tokens=230)
    sorting, come = threading.Event(), threading.Event()

    def held_up(waiting, **by):
        sorting.set()
        come.wait(0.3)  # longer would be for ever where whoever comes must wait for this to end
        return sorted(waiting, **by)

    monkeypatch.setattr(jobs, "sorted", held_up, raising=False)
    tasks = [asyncio.create_task(collect(engine, work("sums", f"grows {i}", 150))) for i in range(2)]
    await asyncio.to_thread(sorting.wait, 120)
    late = asyncio.create_task(collect(engine, work("sums", "late", 5)))
    events = await asyncio.wait_for(asyncio.gather(*tasks, late), 120)
    assert all(isinstance(es[-1], Finished) for es in events)


async def test_sequences_that_grow_long_are_computed_apart(make_engine, work, reference, monkeypatch, watched):
    monkeypatch.setattr(jobs, "LANES", (80, 160))
    engine = make_engine()
    pieces = [work("letters", "q" * n, m) for n, m in ((1, 300), (100, 30), (1, 20), (200, 10), (5, 120))]
    events = await asyncio.gather(*(collect(engine, p) for p in pieces))
    assert [text_of(e) for e in events] == [reference(p) for p in pieces]
    assert any(kind == "step" and len(rows) == 1 for kind, rows in watched.log)


async def test_whoever_waits_for_room_longest_is_let_in_first(make_engine, work, monkeypatch):
    monkeypatch.setattr(schedule, "_STARVED_S", 0.1)
    engine = make_engine(tokens=512, patience_s=0.02)
    async with crowded(engine, work("letters", max_tokens=30), 8):
        # It needs most of the memory, of which some is always in use: who comes later must be kept out for it.
        events = await asyncio.wait_for(collect(engine, work("sums", "y" * 420, 5)), 120)
    assert isinstance(events[-1], Finished)


async def test_what_is_kept_is_used_and_changes_no_answer(make_engine, work, reference, monkeypatch):
    engine = make_engine()
    computed, init = [], Prompts.__init__

    def watched_init(prompts, loaded, rows, known=()):
        init(prompts, loaded, rows, known)
        if known:  # the engine's, not the reference's
            computed.append(prompts.left)

    monkeypatch.setattr(Prompts, "__init__", watched_init)
    question = "the very same beginning, and then something " + "else " * 10
    for choice in (*CHOICES, *CHOICES):
        for end in ("one", "two"):
            piece = work(choice, question + end, 20)
            piece = replace(piece, messages=(Message("system", "Be brief."), *piece.messages))
            assert text_of(await collect(engine, piece)) == reference(piece)
    # Each version computes the beginning once for itself; what another computed is never used.
    whole = max(computed)
    assert [n >= whole - 3 for n in computed] == [True, False] * 3 + [False] * 6
    assert engine._kept.nbytes > 0


async def test_nothing_is_kept_of_versions_that_are_gone(make_engine, work):
    engine = make_engine()
    await collect(engine, work("letters"))
    before = engine._kept.nbytes
    assert before > 0
    engine.modifiers._in_use = {k: v for k, v in engine.modifiers._in_use.items() if k[0] != "letters"}
    await collect(engine, work("base", "Q"))
    assert all(key[0] == "base" for key, _ in engine._kept._held)


def test_parts_shrink_until_they_are_short_enough():
    chunks = Chunks(256)
    chunks.took(256, 0.5)
    assert chunks.tokens == 128
    chunks.took(128, 0.1)
    assert chunks.tokens == 128
    chunks.took(20, 0.01)
    assert chunks.tokens == 128
    chunks.took(128, 0.01)
    assert chunks.tokens == 256
    for _ in range(20):
        chunks.took(chunks.tokens, 9.0)
    assert chunks.tokens == schedule._CHUNKS[0]
