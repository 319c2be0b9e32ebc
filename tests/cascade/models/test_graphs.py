"""Steps in fixed shapes, replayed: a recorder stands in for CUDA's, which refuses what a real graph would get wrong."""

from __future__ import annotations

import random
from functools import partial

import pytest

from cascade.models import generation, prompts
from cascade.models.generation import generate
from cascade.models.graphs import StepGraphs, round_up
from cascade.models.rows import Request


class Recorder:
    """Replays by computing again, but only what was recorded: the same tensors in the same memory."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, compute):
        cache = compute.args[-2]
        self.recorded += 1
        logits = compute()

        def memory():
            return [x.data_ptr() for layer in cache.row_layers for x in (layer.keys, layer.values)]

        before = memory()

        def replay():
            assert memory() == before
            self.replayed += 1
            logits.copy_(compute())

        return replay, logits


@pytest.fixture
def recorder(monkeypatch):
    """Batches compute through graphs, as on a GPU."""
    recorder = Recorder()
    plain = generation.Batch.__init__

    def graphed(self, loaded):
        plain(self, loaded)
        self._steps = StepGraphs(partial(prompts.forward, loaded.model), lambda: recorder)

    monkeypatch.setattr(generation.Batch, "__init__", graphed)
    return recorder


def make_requests(beginning, count=14, seed=3):
    rng = random.Random(seed)
    return [
        Request(
            [*beginning, *(rng.randrange(5, 261) for _ in range(rng.randint(1, 40)))],
            rng.choice([3, 30, 90]),
            temperature=0.0 if i % 3 else 1.0,
            seed=i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("shared", [0, 70])
@pytest.mark.parametrize("tokens", [400, None])
def test_answers_are_those_of_steps_without_graphs(loaded, request, shared, tokens):
    beginning = [7 + i % 200 for i in range(shared)]
    requests = make_requests(beginning)
    expected = generate(loaded, requests, tokens=tokens)
    recorder = request.getfixturevalue("recorder")
    assert generate(loaded, requests, tokens=tokens) == expected
    assert recorder.replayed > 2 * recorder.recorded > 0


@pytest.mark.parametrize("beginnings", [3, 9])
def test_rows_with_different_beginnings_are_computed_together(loaded, request, beginnings):
    """Up to a number of beginnings by graphs, in which each row is told which of them is its own."""
    requests = make_requests([], 3)
    for i in range(beginnings):
        requests += make_requests([9 + i] * (70 + 20 * i), 4, seed=i)
    expected = generate(loaded, requests)
    recorder = request.getfixturevalue("recorder")
    assert generate(loaded, requests) == expected
    assert recorder.recorded


def test_forgotten_graphs_are_recorded_again(loaded, recorder):
    batch = generation.Batch(loaded)
    batch.join([generation.Row.new(0, Request([5, 6, 7], 50), loaded.device)])
    for _ in range(4):
        batch.step()
    assert recorder.recorded == 1
    batch.forget_graphs()
    for _ in range(3):
        batch.step()
    assert recorder.recorded == 2


def test_an_emptied_batch_that_is_filled_again_replays_nothing_of_before(loaded, request):
    """Its new cache has moved as often as the old one had, to other memory."""
    requests = [[Request([start + i, 9, 7, 8], 12) for i in range(2)] for start in (10, 20, 30)]
    expected = [generate(loaded, some) for some in requests]
    request.getfixturevalue("recorder")
    batch, found = generation.Batch(loaded), []
    for some in requests:
        batch.join([generation.Row.new(i, asked, loaded.device) for i, asked in enumerate(some)])
        done = []
        while batch.rows:
            done += batch.step()
        found.append([row.text for row in sorted(done, key=lambda row: row.index)])
    assert found == [[answer.text for answer in some] for some in expected]


@pytest.mark.parametrize("least", [4, 64])
def test_buckets_hold_what_they_round_and_pad_little(least):
    for count in range(1, 5000):
        bucket = round_up(count, least)
        assert bucket >= count
        assert bucket - count < max(least, count / 4 + 1)
        assert round_up(bucket, least) == bucket
        assert bucket <= 2 or bucket % least == 0
    assert len({round_up(n, least) for n in range(1024, 2049)}) <= 10
