"""Several modifiers in memory: who comes back is not read again, and every answer is still its own modifier's."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from engine_events import CHOICES, collect, text_of
from stand_in import compressed_adapter, random_adapter

from cascade import modifiers
from cascade.compression.apply import LoraSlot
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress
from cascade.models import prompts
from cascade.models.generation import Batch
from cascade.models.graphs import StepGraphs
from cascade.store import Store
from serve import engine as engines
from serve.engine import Engine
from serve.limits import Limits

ALL = (*CHOICES, "words")


@pytest.fixture(scope="module")
def three(stand_in, tmp_path_factory):
    """A store of three modifiers, the third larger than the others."""
    store = Store(str(tmp_path_factory.mktemp("three") / "store"))
    shutil.copytree(stand_in.store.path(), store.path())
    adapter = random_adapter(Path(stand_in.config.base.model), 5, rank=6)
    modifiers.publish(store, "words", compress(adapter, Recipe()), fp16_size=adapter)
    return replace(stand_in, store=store)


@pytest.fixture
def mine(three, tmp_path):
    """A copy of it, to publish in."""
    store = Store(str(tmp_path / "store"))
    shutil.copytree(three.store.path(), store.path())
    return replace(three, store=store)


@pytest.fixture
def newer(three):
    """Another version of "letters"."""
    return compressed_adapter(Path(three.config.base.model), 77)


@pytest.fixture(scope="module")
def alone(three, reference):
    return type(reference)(three)


@pytest.fixture
def make(mine, loaded, tmp_path_factory):
    made, forms = [], tmp_path_factory.getbasetemp() / "three-forms"

    def make(count, **limits):
        made.append(Engine(loaded, mine.store, forms, Limits(max_loaded_modifiers=count, **limits)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def filled(monkeypatch):
    """Domains in the order in which they were read into a slot."""
    domains, fill = [], LoraSlot.fill

    def watched(slot, adapter, name=None):
        if name is not None:  # the engine's, not the reference's
            domains.append(name[0])
        fill(slot, adapter, name)

    monkeypatch.setattr(LoraSlot, "fill", watched)
    return domains


@pytest.fixture
def graphs(monkeypatch):
    """Engines compute through graphs, as on a GPU, each bound to where the modifier lay when it was recorded; the
    addresses that were replayed."""
    slots, replayed, plain = [], [], Batch.__init__

    def record(compute):
        recorded_at, logits = slots[-1].address, compute()

        def replay():
            assert slots[-1].address == recorded_at
            replayed.append(recorded_at)
            logits.copy_(compute())

        return replay, logits

    def graphed(batch, loaded, *more):
        plain(batch, loaded, *more)
        if more:  # the engine's, not the reference's
            batch._steps = StepGraphs(partial(prompts.forward, loaded.model), lambda: record)

    def fixed(*args, **more):
        slots.append(LoraSlot(*args, **more, fixed=True))
        return slots[-1]

    monkeypatch.setattr(Batch, "__init__", graphed)
    monkeypatch.setattr(engines, "LoraSlot", fixed)
    return replayed


def room(engine):
    """Bytes of the largest modifier."""
    return max(live.form.layout.nbytes for live in engine.modifiers.in_use())


def kept(engine):
    """Versions in memory."""
    return {version for _, version in engine._slot._kept}


async def crowd(engine, work):
    """Pieces for everybody at once, and what came of them."""
    pieces = [work(c, f"question {'x' * n}", 12 + n) for n in range(4) for c in ALL]
    return pieces, [text_of(e) for e in await asyncio.gather(*(collect(engine, p) for p in pieces))]


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_answers_are_as_if_alone_while_modifiers_take_turns(make, work, alone, filled, count):
    engine = make(count, patience_s=0.0)
    before = engine.resident_bytes
    pieces, texts = await crowd(engine, work)
    assert len(filled) == 3 if count == 3 else len(filled) > 6
    assert texts == [alone(p) for p in pieces]
    assert len({alone(work(c, "the same question", 12)) for c in ALL}) == len(ALL)
    assert engine.resident_bytes == before
    assert engine._slot.resident_bytes == count * room(engine)


@pytest.mark.parametrize("count", [1, 2])
async def test_what_a_gpu_has_recorded_reads_the_right_modifier(make, work, alone, graphs, count):
    engine = make(count, patience_s=0.0)
    pieces, texts = await crowd(engine, work)
    assert len(set(graphs)) == 2  # the base's has none
    assert len(graphs) > 30
    assert texts == [alone(p) for p in pieces]


async def test_the_one_used_longest_ago_makes_room(make, work, filled):
    engine = make(2)
    for choice in ("letters", "sums", "base", "letters", "sums", "letters", "words", "letters", "sums"):
        await collect(engine, work(choice, max_tokens=2))
    assert filled == ["letters", "sums", "words", "sums"]


async def test_a_version_that_is_replaced_makes_room_first(make, mine, newer, work, filled):
    engine = make(2)
    for choice in ("sums", "letters"):
        await collect(engine, work(choice, max_tokens=2))
    published = modifiers.publish(mine.store, "letters", newer, fp16_size=10_000)
    engine.modifiers.refresh()
    events = await collect(engine, work("letters", max_tokens=2))
    assert events[0].version == published.version
    await collect(engine, work("sums", max_tokens=2))
    assert filled == ["sums", "letters", "letters"]
    assert kept(engine) == {engine.modifiers.versions()[domain] for domain in ("letters", "sums")}


async def test_a_canary_that_is_taken_back_makes_room_first(make, mine, newer, work, filled):
    tried = modifiers.publish(mine.store, "letters", newer, fp16_size=10_000, make_current=False)
    modifiers.set_canary(mine.store, "letters", tried.version, 0.5)
    engine = make(2)
    for choice, variant in (("sums", "current"), ("letters", "canary")):
        await collect(engine, work(choice, max_tokens=2, variant=variant))
    modifiers.set_canary(mine.store, "letters", tried.version, 0.0)
    engine.modifiers.refresh()
    for choice in ("letters", "sums"):
        await collect(engine, work(choice, max_tokens=2))
    assert filled == ["sums", "letters", "letters"]
    assert kept(engine) == {engine.modifiers.versions()[domain] for domain in ("letters", "sums")}


async def test_no_more_memory_is_taken_than_there_are_modifiers(make, work):
    engine = make(9)
    assert engine._slot.resident_bytes == 3 * room(engine)
    for choice in ALL:
        await collect(engine, work(choice, max_tokens=2))
    assert engine._slot.resident_bytes == 3 * room(engine)
