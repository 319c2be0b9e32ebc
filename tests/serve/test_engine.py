"""The engine: nobody gets another's modifier, the one who has gone is not computed for, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import time

import pytest
import torch
from engine_events import CHOICES, collect, crowded, text_of, until, until_load
from stand_in import CONTEXT, build_stand_in, compressed_adapter

from cascade import modifiers
from cascade.compression.apply import LoraSlot
from cascade.models.base import load_base
from cascade.models.chat import prompt_text
from cascade.models.generation import Batch, generate
from cascade.models.rows import Request
from serve.engine import Engine
from serve.events import Delta, Failed, Finished, Started


async def test_events_come_in_order_with_their_figures(engine, work, reference):
    piece = work("letters", max_tokens=9)
    events = await collect(engine, piece)
    assert isinstance(events[0], Started)
    assert events[0].swap_ms > 0
    assert events[0].queue_ms >= events[0].swap_ms
    assert events[0].version == engine.modifiers.versions()["letters"]
    assert isinstance(events[-1], Finished)
    assert (events[-1].finish_reason, events[-1].completion_tokens) == ("length", 9)
    assert text_of(events) == reference(piece)


async def test_concurrent_requests_answer_as_if_alone(engine, work, reference):
    rng = random.Random(3)
    pieces = [
        work(rng.choice(CHOICES), f"question {'x' * rng.randint(0, 60)} {i}", rng.randint(1, 30)) for i in range(60)
    ]
    swaps = 0
    gate = asyncio.Semaphore(12)

    async def client(i, piece):
        nonlocal swaps
        async with gate:
            await asyncio.sleep(rng.random() * 0.01)
            if i % 7 == 3:  # leaves after its first event
                stream = engine.stream(piece)
                await anext(stream)
                await stream.aclose()
                return None
            events = await collect(engine, piece)
            swaps += events[0].swap_ms > 0
            return text_of(events)

    texts = await asyncio.gather(*(client(i, p) for i, p in enumerate(pieces)))
    expected = {p: reference(p) for p in pieces}
    assert len({reference(work(c, "the same question", 12)) for c in CHOICES}) == 3
    compared = [(t, expected[p]) for t, p in zip(texts, pieces, strict=True) if t is not None]
    assert len(compared) >= 50
    assert all(got == wanted for got, wanted in compared)
    assert swaps >= 3


async def test_sampling_depends_on_the_seed_alone(engine, work, reference):
    hot = [work("sums", "How?", 20, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2)]
    crowd = [work("sums", f"another {i}", 25) for i in range(5)]
    events = await asyncio.gather(*(collect(engine, p) for p in [*crowd, *hot]))
    first, second = map(text_of, events[-2:])
    assert first == reference(hot[0])
    assert second == reference(hot[1])
    assert first != second


async def test_stop_strings_are_cut_and_never_sent(engine, work, reference):
    whole = reference(work("base", "stop here", 40))
    stop = next(whole[i : i + 2] for i in range(8, 30) if whole[i : i + 2].isascii() and whole[i : i + 2].isprintable())
    piece = work("base", "stop here", 40, stop=(stop,))
    events = await collect(engine, piece)
    assert text_of(events) == whole[: whole.index(stop)] == reference(piece)
    assert events[-1].finish_reason == "stop"


async def test_whoever_leaves_is_no_longer_computed_for(engine, work, passes):
    stream = engine.stream(work("letters", max_tokens=400))
    assert isinstance(await anext(stream), Started)
    await stream.aclose()
    assert await passes.until(lambda: engine.load == (0, 0)) < 40  # one, but for a stall of the machine


async def test_whoever_leaves_during_a_swap_takes_nobody_along(engine, work, passes, monkeypatch):
    swapping, go_on, hold = threading.Event(), threading.Event(), engine._hold

    def held_up(key, group):
        swapping.set()
        assert go_on.wait(120)
        hold(key, group)

    def somebody_waits():
        return any(not job.cancelled for group in engine._schedule.groups.values() for job in group.waiting)

    monkeypatch.setattr(engine, "_hold", held_up)
    first = asyncio.create_task(collect(engine, work("letters")))
    await asyncio.to_thread(swapping.wait, 120)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(collect(engine, work("letters", "another")))
    await passes.until(somebody_waits)
    go_on.set()
    assert isinstance((await second)[-1], Finished)


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-50}], ids=["temperature", "top_p"]
)
async def test_numbers_next_to_nothing_take_the_likeliest_token(engine, work, reference, extreme):
    beside = asyncio.create_task(collect(engine, work("sums", "beside", 60)))
    await until_load(engine, (1, 0))
    events = await collect(engine, work("sums", "How?", 12, **extreme))
    assert text_of(events) == reference(work("sums", "How?", 12))
    assert text_of(await beside) == reference(work("sums", "beside", 60))


async def test_nobody_starves_while_another_modifier_is_asked_for(engine, work):
    async with crowded(engine, work("letters", max_tokens=30), 4):
        # Patience is 0.2 s; without a deadline this waits for ever.
        events = await asyncio.wait_for(collect(engine, work("sums", max_tokens=5)), 120)
    assert isinstance(events[-1], Finished)


async def test_work_beyond_the_limits_is_refused_at_once(make_engine, work):
    engine = make_engine(rows=1, waiting=2)
    tasks = [asyncio.create_task(collect(engine, work("base", max_tokens=300))) for _ in range(8)]
    results = await asyncio.gather(*tasks)
    refused = [r[0] for r in results if isinstance(r[0], Failed)]
    assert 4 <= len(refused) <= 6
    assert {(f.status, f.code) for f in refused} == {(429, "overloaded")}
    assert all(isinstance(r[-1], Finished) for r in results if not isinstance(r[0], Failed))


async def test_too_long_for_the_context(engine, work):
    events = await collect(engine, work("base", "y" * CONTEXT))
    assert [type(e) for e in events] == [Failed]
    assert (events[0].status, events[0].code) == (400, "context_length_exceeded")
    events = await collect(engine, work("base", "y", CONTEXT))
    assert events[0].code == "context_length_exceeded"


async def test_unknown_modifier_fails_and_the_rest_goes_on(engine, work, reference):
    bad, good = await asyncio.gather(collect(engine, work("nobody")), collect(engine, work("sums")))
    assert (bad[0].status, bad[0].code) == (503, "modifier_unavailable")
    assert text_of(good) == reference(work("sums"))


async def test_a_failing_step_loses_its_own_work_alone(engine, work, reference, monkeypatch):
    def broken(batch, on_token=None):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", broken)
        events = await collect(engine, work("letters"))
    assert isinstance(events[-1], Failed)
    assert events[-1].status == 500
    assert "out of memory" not in events[-1].message
    assert await engine.healthy()
    assert text_of(await collect(engine, work("letters"))) == reference(work("letters"))


async def test_an_engine_of_which_every_step_fails_is_ill_until_one_does_not(engine, work, monkeypatch):
    def broken(batch, on_token=None):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", broken)
        for healthy in (True, True, False):
            await collect(engine, work("letters"))
            assert await engine.healthy() == healthy
    assert isinstance((await collect(engine, work("letters")))[-1], Finished)
    assert await engine.healthy()


async def test_where_leaving_fails_its_group_is_told_and_the_engine_goes_on(engine, work, monkeypatch):
    step = Batch.step

    def step_and_one_leaves(batch, on_token=None):
        done = step(batch, on_token)
        if len(batch.rows) == 2:
            next(iter(engine._schedule.groups["base", ""].running.values())).cancelled = True
        return done

    def broken(batch, indices):
        raise torch.OutOfMemoryError("no room to move the others to")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", step_and_one_leaves)
        patched.setattr(Batch, "leave", broken)
        both = await asyncio.gather(*(collect(engine, work("base", question, 400)) for question in ("a", "b")))
    assert [events[-1].code for events in both] == ["internal_error", "internal_error"]
    assert isinstance((await collect(engine, work("base")))[-1], Finished)


async def test_new_versions_go_live_and_bad_ones_do_not(tmp_path, work):
    mine = build_stand_in(tmp_path)

    engine = Engine(load_base(mine.config.base), mine.store, tmp_path / "forms")
    try:
        first = await collect(engine, work("letters"))
        other = compressed_adapter(tmp_path / "base", seed=77)
        newer = modifiers.publish(mine.store, "letters", other, fp16_size=10_000)
        engine.modifiers.refresh()
        second = await collect(engine, work("letters"))
        assert second[0].version == newer.version != first[0].version
        assert text_of(second) != text_of(first)

        bad = modifiers.publish(mine.store, "letters", compressed_adapter(tmp_path / "base", 78), fp16_size=10_000)
        data = bytearray(mine.store.read_bytes(bad.path))
        data[-5] ^= 255
        mine.store.write_bytes(bad.path, bytes(data))
        engine.modifiers.refresh()
        third = await collect(engine, work("letters"))
        assert third[0].version == newer.version
        assert text_of(third) == text_of(second)

        shutil.rmtree(mine.store.path("modifiers/sums"))
        engine.modifiers.refresh()
        gone = await collect(engine, work("sums"))
        assert gone[0].code == "modifier_unavailable"
    finally:
        engine.close()


async def test_closing_fails_what_is_not_done(engine, work, monkeypatch):
    begun, closing, step = threading.Event(), threading.Event(), Batch.step

    def held_step(batch, on_token=None):
        begun.set()
        assert closing.wait(120)
        time.sleep(0.05)
        return step(batch, on_token)

    monkeypatch.setattr(Batch, "step", held_step)
    task = asyncio.create_task(collect(engine, work("base", max_tokens=400)))
    assert await asyncio.to_thread(begun.wait, 120)
    closing.set()
    await asyncio.to_thread(engine.close)
    events = await task
    assert events[-1].code == "shutting_down"
    assert not await engine.healthy()
    assert (await collect(engine, work("base")))[0].code == "shutting_down"


@pytest.mark.parametrize("rows", [1, 3])
async def test_the_batches_stay_within_their_bounds(make_engine, work, reference, monkeypatch, rows):
    engine = make_engine(rows=rows, tokens=400, patience_s=0.0)
    seen = []
    original = Batch.step

    def step(batch, on_token=None):
        groups = list(engine._schedule.groups.values())
        seen.append((max(len(g.running) for g in groups), sum(g.held for g in groups)))
        return original(batch, on_token)

    pieces = [work(c, "z" * n, 20) for n in (5, 50, 9, 90, 30) for c in CHOICES]
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", step)
        events = await asyncio.gather(*(collect(engine, p) for p in pieces))
    assert [text_of(e) for e in events] == [reference(p) for p in pieces]
    assert max(n for n, _ in seen) <= rows
    assert max(t for _, t in seen) <= 400
    assert engine.load == (0, 0)


async def test_a_long_answer_is_parked_and_goes_on_where_it_was(make_engine, work, reference, monkeypatch):
    engine = make_engine(patience_s=0.0)
    long, short = work("letters", "a long one", 450), work("sums", "a short one", 3)
    begun, both_there, stepped = threading.Event(), threading.Event(), []
    original = Batch.step

    def step(batch, on_token=None):
        begun.set()
        assert both_there.wait(120)
        stepped.append(batch.rows[0].request.max_tokens)
        return original(batch, on_token)

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", step)
        first = asyncio.create_task(collect(engine, long))
        assert await asyncio.to_thread(begun.wait, 120)  # its prompt is read: before, the other may take a turn
        second = asyncio.create_task(collect(engine, short))
        await until_load(engine, (1, 1))
        both_there.set()
        texts = text_of(await first), text_of(await second)
    assert texts == (reference(long), reference(short))
    assert (stepped[0], stepped[-1], stepped.count(3)) == (450, 450, 3)


async def test_whoever_leaves_a_parked_group_is_forgotten(make_engine, work, passes):
    engine = make_engine(patience_s=0.0)
    parked = engine.stream(work("letters", max_tokens=400))
    await anext(parked)
    other = asyncio.create_task(collect(engine, work("sums", max_tokens=400)))
    await until(lambda: any(key[0] == "sums" and g.running for key, g in list(engine._schedule.groups.items())))
    await parked.aclose()
    version = engine.modifiers.versions()["letters"]
    assert await passes.until(lambda: ("letters", version) not in engine._schedule.groups) < 40
    assert isinstance((await other)[-1], Finished)


async def test_an_answer_that_is_not_streamed_comes_whole(engine, work, reference):
    piece = work("sums", max_tokens=30, stream=False)
    events = await collect(engine, piece)
    assert [type(e) for e in events] == [Started, Delta, Finished]
    assert text_of(events) == reference(piece)


async def test_a_canary_gets_its_share_and_nobody_elses_version(tmp_path, work):
    mine = build_stand_in(tmp_path)

    newer = modifiers.publish(
        mine.store, "letters", compressed_adapter(tmp_path / "base", seed=77), fp16_size=10_000, make_current=False
    )
    modifiers.set_canary(mine.store, "letters", newer.version, 0.25)
    engine = Engine(load_base(mine.config.base), mine.store, tmp_path / "forms")
    try:
        variants = [engine.modifiers.pick("letters", f"request {i}") for i in range(1000)]
        assert 200 < variants.count("canary") < 300
        assert {engine.modifiers.pick("sums", f"request {i}") for i in range(100)} == {"current"}
        answers = {}
        pieces = [work("letters", "the same", 12, variant=v) for v in ("current", "canary") * 6]
        for piece, events in zip(pieces, await asyncio.gather(*(collect(engine, p) for p in pieces)), strict=True):
            answers.setdefault((piece.variant, events[0].version), set()).add(text_of(events))
        assert {version for _, version in answers} == {newer.version, engine.modifiers.versions()["letters"]}
        assert [len(texts) for texts in answers.values()] == [1, 1]
        modifiers.set_canary(mine.store, "letters", newer.version, 0.0)
        engine.modifiers.refresh()
        assert {engine.modifiers.pick("letters", f"request {i}") for i in range(100)} == {"current"}
    finally:
        engine.close()


async def test_an_engine_in_8_bits_answers_as_the_base_in_8_bits_does(stand_in, tmp_path, work):
    base = stand_in.config.base.model_copy(update={"dtype": "bfloat16"})
    engine = Engine(load_base(base, weights="int8"), stand_in.store, tmp_path / "forms", threads=1)
    alone = load_base(base, weights="int8")
    slot = LoraSlot(alone.model)
    try:
        for choice in (*CHOICES, *CHOICES):
            slot.clear()
            if choice != "base":
                slot.fill(modifiers.load_current(stand_in.store, choice)[1])
                assert engine.modifiers.get(choice).form.layout.int8
            piece = work(choice, "What is 4 plus 5?", 12)
            live = engine.modifiers.get(choice)
            text = prompt_text(alone.tokenizer, live.introduce(piece.messages) if live else piece.messages)
            prompt = alone.tokenizer(text, add_special_tokens=False).input_ids
            assert text_of(await collect(engine, piece)) == generate(alone, [Request(prompt, 12)])[0].text
    finally:
        engine.close()


async def test_the_slot_has_room_for_the_largest_from_the_start(engine, work):
    forms = [engine.modifiers.get(choice).form for choice in CHOICES if choice != "base"]
    before = engine.resident_bytes
    assert engine._slot.resident_bytes == max(form.layout.nbytes for form in forms) > 0
    for choice in CHOICES:
        await collect(engine, work(choice, max_tokens=2))
    assert engine.resident_bytes == before
