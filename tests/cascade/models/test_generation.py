"""Batched decoding against transformers' own, and every way in which an answer can end."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from cascade.models import prompts
from cascade.models.caches import RowCache
from cascade.models.generation import Batch, generate, stream
from cascade.models.rows import Request, Row, choose
from cascade.models.steps import LlamaSteps


def random_prompt(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(5, 261) for _ in range(length)]


PROMPTS = [random_prompt(n, seed) for seed, n in enumerate((3, 41, 1, 17, 17, 28, 9))]


def alone(loaded, request):
    return generate(loaded, [request])[0]


@pytest.fixture
def set_ends(loaded):
    """Makes further tokens end an answer."""
    config = loaded.model.generation_config
    before = config.eos_token_id

    def set_ends(*ids):
        config.eos_token_id = [1, *ids]

    yield set_ends
    config.eos_token_id = before


def reference(loaded, prompts, max_tokens, ends):
    """Greedy answers of transformers' `generate` on the left-padded batch, end tokens and what follows cut off."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = loaded.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=1
    )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(tuple(row[:end]))
    return answers


@pytest.mark.parametrize("tokens", [1, 150, None])
def test_greedy_answers_equal_those_of_transformers(loaded, set_ends, tokens):
    first = reference(loaded, PROMPTS, 24, {1})
    assert len(set(first)) == len(PROMPTS)
    ends = {first[1][5], first[5][11]}  # rows end at different steps, so that the batch shrinks while others run on
    set_ends(*ends)
    expected = reference(loaded, PROMPTS, 24, {1, *ends})
    assert len({len(e) for e in expected}) >= 3
    results = generate(loaded, [Request(p, 24) for p in PROMPTS], tokens=tokens)
    assert [r.token_ids for r in results] == expected
    for result in results:
        assert result.finish_reason == ("length" if len(result.token_ids) == 24 else "stop")
        assert result.text == loaded.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)


def test_end_token_ends_the_answer_and_is_not_part_of_it(loaded, set_ends):
    free = alone(loaded, Request(PROMPTS[0], 20))
    end = free.token_ids[6]
    set_ends(end)
    result = alone(loaded, Request(PROMPTS[0], 20))
    assert result.token_ids == free.token_ids[: free.token_ids.index(end)]
    assert result.finish_reason == "stop"


def test_each_request_has_its_own_limit(loaded):
    limits = [1, 0, 13, 5]
    results = generate(loaded, [Request(PROMPTS[0], n) for n in limits])
    whole = alone(loaded, Request(PROMPTS[0], 13)).token_ids
    assert [r.token_ids for r in results] == [whole[:n] for n in limits]
    assert [r.finish_reason for r in results] == ["length"] * 4


def test_stop_strings_are_cut_off_at_the_earliest(loaded):
    whole = [alone(loaded, Request(p, 40)).text for p in PROMPTS]
    row, at = next(
        (r, i)
        for r, text in enumerate(whole)
        for i in range(4, len(text) - 6)
        if text[i : i + 5].isascii() and text[i : i + 5].isprintable() and text.find(text[i + 1 : i + 3]) == i + 1
    )
    # Both are complete with the same token; the one that begins later is given first.
    stops = (whole[row][at + 1 : at + 3], whole[row][at : at + 3])
    requests = [Request(p, 40, stop=stops if i == row else ()) for i, p in enumerate(PROMPTS)]
    results = generate(loaded, requests)
    assert results[row].text == whole[row][:at]
    assert results[row].finish_reason == "stop"
    assert [r.text for i, r in enumerate(results) if i != row] == [t for i, t in enumerate(whole) if i != row]


def test_on_token_sees_every_token_and_ends_an_answer(loaded):
    seen = {i: [] for i in range(len(PROMPTS))}

    def on_token(index, token):
        seen[index].append(token)
        return not (index == 2 and len(seen[2]) == 4)

    results = generate(loaded, [Request(p, 9) for p in PROMPTS], on_token=on_token)
    free = generate(loaded, [Request(p, 9) for p in PROMPTS])
    assert [tuple(seen[i]) for i in seen] == [r.token_ids for r in results]
    for i, (result, undisturbed) in enumerate(zip(results, free, strict=True)):
        length = 4 if i == 2 else 9
        assert result.token_ids == undisturbed.token_ids[:length]
        assert result.finish_reason == ("stop" if i == 2 else "length")
    assert results[2].text == loaded.tokenizer.decode(list(results[2].token_ids), skip_special_tokens=True)


def forwarded(monkeypatch):
    """Shapes of everything that goes through the model in a batch, and of the beginnings that are computed apart."""
    shapes, beginnings = [], []
    forward, prefix, step = prompts.forward, prompts.compute_prefix, LlamaSteps.__call__

    def spy_forward(model, ids, *more):
        shapes.append(tuple(ids.shape))
        return forward(model, ids, *more)

    def spy_prefix(loaded, tokens):
        beginnings.append(len(tokens))
        return prefix(loaded, tokens)

    def spy_step(steps, ids, *more):
        shapes.append(tuple(ids.shape))
        return step(steps, ids, *more)

    monkeypatch.setattr(prompts, "forward", spy_forward)
    monkeypatch.setattr(LlamaSteps, "__call__", spy_step)
    monkeypatch.setattr(prompts, "compute_prefix", spy_prefix)
    return shapes, beginnings


@pytest.mark.parametrize("tokens", [60, 200, None])
def test_shared_beginnings_are_computed_once_and_change_nothing(loaded, monkeypatch, tokens):
    first, second = random_prompt(90, 99), [*random_prompt(90, 99)[:20], *random_prompt(70, 98)]
    prompts = [first + random_prompt(n, 200 + n) for n in (1, 7, 30, 7, 12)]
    prompts += [second + random_prompt(n, 300 + n) for n in (9, 2, 14, 5)]
    requests = [Request(p, 5 + i) for i, p in enumerate([*prompts, *PROMPTS])]
    expected = [alone(loaded, r).token_ids for r in requests]
    shapes, beginnings = forwarded(monkeypatch)
    assert [r.token_ids for r in generate(loaded, requests, tokens=tokens)] == expected
    assert sorted(beginnings) == [90, 90]
    assert max(length for _, length in shapes) == max(map(len, PROMPTS)), "prompts were computed whole"


def test_prompts_that_are_alike_throughout_share_all_but_a_token(loaded, monkeypatch):
    prompt = random_prompt(160, 4)
    prompts = [prompt, prompt, prompt + random_prompt(5, 5), prompt]
    expected = [alone(loaded, Request(p, 8)).token_ids for p in prompts]
    _, beginnings = forwarded(monkeypatch)
    results = generate(loaded, [Request(p, 8) for p in prompts])
    assert beginnings == [159]
    assert [r.token_ids for r in results] == expected


def test_rows_take_the_places_of_those_that_are_done(loaded, monkeypatch):
    requests = [Request(PROMPTS[i % 7], 3 + 5 * (i % 4)) for i in range(24)]
    expected = [alone(loaded, r).token_ids for r in requests]
    shapes, _ = forwarded(monkeypatch)
    results = generate(loaded, requests, tokens=5 * (41 + 18))
    assert [r.token_ids for r in results] == expected
    steps = [rows for rows, length in shapes if length == 1]
    assert max(steps) >= 5, "the budget has room for at least five of the longest"
    assert sum(steps) / len(steps) > 3.5, "places stay empty while others wait"


def short_of_memory(monkeypatch, most):
    """Lets no forward pass take more than so many tokens, cached ones and padding included."""
    forward, refused = prompts.forward, []

    def bounded(model, ids, mask, positions, cache, shared):
        if ids.shape[0] * mask.shape[-1] > most:
            refused.append(ids.shape)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, ids, mask, positions, cache, shared)

    monkeypatch.setattr(prompts, "forward", bounded)
    monkeypatch.setattr(Batch, "_special_steps", lambda self: None)
    return refused


def test_where_memory_runs_out_batches_become_smaller(loaded, monkeypatch):
    requests = [Request(PROMPTS[i % 7], 3 + 5 * (i % 4), temperature=i % 2, seed=i) for i in range(24)]
    expected = [alone(loaded, r).token_ids for r in requests]
    refused = short_of_memory(monkeypatch, 300)
    answers = list(stream(loaded, requests))
    assert sorted(i for i, _ in answers) == list(range(24)), "answers came twice or not at all"
    assert [answer.token_ids for _, answer in sorted(answers)] == expected
    assert refused


def test_memory_that_does_not_do_for_one_row_is_an_error(loaded, monkeypatch):
    short_of_memory(monkeypatch, 30)
    with pytest.raises(torch.OutOfMemoryError):
        generate(loaded, [Request(p, 9) for p in PROMPTS])


def test_padding_stays_within_the_budget(loaded, monkeypatch):
    budget, seen = 300, []
    step = Batch.step

    def spy(self, on_token=None):
        done = step(self, on_token)
        seen.append((len(self.rows), max((r.length for r in self.rows), default=0)))
        return done

    monkeypatch.setattr(Batch, "step", spy)
    generate(loaded, [Request(PROMPTS[i % 7], 2 + i) for i in range(20)], tokens=budget)
    assert max(rows for rows, _ in seen) > 3
    assert all(rows * longest <= budget for rows, longest in seen if rows > 1)


def test_answers_come_as_they_are_done(loaded):
    requests = [Request(PROMPTS[0], n) for n in (30, 2, 9, 0)]
    answers = list(stream(loaded, requests))
    assert [i for i, _ in answers] == [3, 1, 2, 0]
    assert [len(a.token_ids) for _, a in answers] == [0, 2, 9, 30]
    assert 0 < answers[1][1].seconds < answers[2][1].seconds < answers[3][1].seconds


def test_stop_strings_in_long_answers_end_them_where_they_are_complete(loaded):
    tokens, decode = alone(loaded, Request(PROMPTS[3], 200)).token_ids, loaded.tokenizer.decode
    texts = [decode(list(tokens[: n + 1]), skip_special_tokens=True) for n in range(len(tokens))]
    stops = [texts[-1][i : i + n] for i in range(20, len(texts[-1]) - 3, 12) for n in (1, 2, 3)]
    for stop in stops:
        cut = alone(loaded, Request(PROMPTS[3], 200, stop=("never there at all", stop)))
        end = next(n for n, text in enumerate(texts) if stop in text)
        assert cut.token_ids == tokens[: end + 1]
        assert cut.text == texts[-1][: texts[end].index(stop)]


def test_sampling_depends_on_the_request_alone(loaded):
    hot = [Request(PROMPTS[1], 20, temperature=1.0, top_p=0.9, seed=s) for s in range(3)]
    crowd = [Request(p, 3 + 2 * i, temperature=0.7 * (i % 2), seed=1) for i, p in enumerate(PROMPTS)]
    single = [alone(loaded, r).token_ids for r in hot]
    assert len(set(single)) == 3
    together = generate(loaded, [crowd[0], hot[2], *crowd[1:], hot[0], hot[1]])
    assert [together[i].token_ids for i in (-2, -1, 1)] == single
    assert alone(loaded, replace(hot[0], temperature=0.0)).token_ids not in single


def test_nothing_outside_top_p_is_sampled_and_all_inside_is():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    drawn = {p: set() for p in (0.2, 0.5, 0.6, 0.81, 1.0)}
    for p, tokens in drawn.items():
        row = Row.new(0, Request([1], 1, temperature=1.0, top_p=p, seed=3), torch.device("cpu"))
        tokens.update(int(choose(logits, [row])) for _ in range(300))
    assert drawn == {0.2: {0}, 0.5: {0}, 0.6: {0, 1}, 0.81: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_temperature_sharpens():
    logits = torch.tensor([[2.0, 0.0]])
    counts = []
    for temperature in (0.25, 1.0, 4.0):
        row = Row.new(0, Request([1], 1, temperature=temperature, seed=9), torch.device("cpu"))
        counts.append(sum(int(choose(logits, [row])) == 0 for _ in range(2000)))
    expected = [2000 * torch.tensor(2.0 / t).sigmoid().item() for t in (0.25, 1.0, 4.0)]
    assert counts == pytest.approx(expected, abs=4 * 22)  # 4 standard deviations of a binomial of 2000


def test_rows_that_join_late_answer_as_if_alone(loaded):
    requests = [Request(p, 6 + 3 * i) for i, p in enumerate(PROMPTS)]
    rows = [Row.new(i, r, loaded.device) for i, r in enumerate(requests)]
    batch, done = Batch(loaded), []
    for row in rows:
        batch.join([row])
        done += batch.step() + batch.step()
    while batch.rows:
        done += batch.step()
    assert sorted(r.index for r in done) == list(range(len(rows)))
    assert [tuple(r.tokens) for r in rows] == [alone(loaded, r).token_ids for r in requests]


def test_padding_that_only_finished_rows_needed_is_dropped(loaded):
    batch = Batch(loaded)
    batch.join([Row.new(0, Request(PROMPTS[1], 2), loaded.device), Row.new(1, Request(PROMPTS[0], 9), loaded.device)])
    assert batch.padded_tokens == 2 * 41
    batch.step()
    batch.step()
    assert [r.index for r in batch.rows] == [1]
    assert batch.padded_tokens == len(PROMPTS[0]) + 2


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="at least one token"):
        generate(loaded, [Request([5], 3), Request([], 3)])


def test_no_requests_no_answers(loaded):
    assert generate(loaded, []) == []


def test_memory_taken_for_rows_to_come_does_not_move(loaded):
    def prefilled(prompt):
        cache = DynamicCache(config=loaded.model.config)
        loaded.model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
        return cache

    cache = RowCache(loaded.model.config.num_hidden_layers)
    cache.add(prefilled(PROMPTS[1]), rows=3, columns=400)
    taken, room = cache.version, cache.row_layers[0].keys.shape
    assert (room[0], room[2]) == (3, 400)
    cache.add(prefilled(PROMPTS[3]))
    cache.reserve(3, 400)
    assert cache.version == taken
    cache.reserve(4, 400)
    assert cache.version > taken
