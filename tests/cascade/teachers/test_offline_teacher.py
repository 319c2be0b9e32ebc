from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import urllib.error

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade import benchmarks
from cascade.config import ANSWER_KEY, AnswerKey
from cascade.tasks import Completion
from cascade.teachers.answer_key import UNKNOWN, KeyItem, Replayer, make_key, prompt_hash, wrong_answer
from cascade.teachers.conversation import estimate_tokens
from cascade.teachers.offline import answer_key_server

_answers = st.one_of(
    st.integers(-500, 500).map(str), st.sampled_from(["Yes", "no", "TRUE", "(A)"]), st.text(max_size=30)
)


def _same(a: str, b: str) -> bool:
    return "".join(a.lower().split()) == "".join(b.lower().split())


@given(_answers, st.lists(_answers, max_size=12), st.integers())
def test_a_wrong_answer_is_never_the_right_one(right: str, alike: list[str], seed: int) -> None:
    assert not _same(wrong_answer(right, [*alike, right], random.Random(seed)), right)


@pytest.mark.parametrize(
    ("right", "alike", "plausible"),
    [
        ("The answer is yes.", [], {"The answer is no."}),
        ("Tails", [], {"Heads"}),
        ("(A)", ["(A)", "(B)", "(C)"], {"(B)", "(C)"}),
        ("42", [], {"41", "43", "40", "44", "32", "52", "38", "46"}),
        ("red blue", [], {"blue red"}),
        ("ab", [], {"ba"}),
    ],
)
def test_wrong_answers_are_plausible(right: str, alike: list[str], plausible: set[str]) -> None:
    found = {wrong_answer(right, alike, random.Random(i)) for i in range(100)}
    assert found == plausible


def test_a_kind_with_few_answers_is_answered_with_another_of_them() -> None:
    relations = ["mother", "father", "aunt", "uncle"]
    items = [KeyItem(prompt_hash(f"q{i}"), "family", 9, relations[i % 4]) for i in range(20)]
    items += [KeyItem(prompt_hash(f"w{i}"), "words", 9, f"{'abcdefghij'[i]}z") for i in range(10)]
    replayer, unable = Replayer(items, 0), AnswerKey(max_difficulty=1)
    for i in range(20):
        assert replayer.reply("m", unable, f"q{i}") in set(relations) - {relations[i % 4]}
    assert [replayer.reply("m", unable, f"w{i}") for i in range(10)] == [f"z{c}" for c in "abcdefghij"]


def test_the_real_scorer_tells_right_answers_from_wrong_ones() -> None:
    options = {"generators": [{"name": "chain_sum"}, {"name": "family_relationships"}, {"name": "word_sorting"}]}
    benchmark = benchmarks.get("reasoning_gym")
    tasks = benchmark.load("train", domain="reasoning", options=options, seed=1, count=60)
    replayer = Replayer(make_key(tasks), 0)
    for task in tasks:
        for able, outcomes in ((task.difficulty, {"pass"}), (task.difficulty - 1, {"fail", "unparsed"})):
            ability = AnswerKey.model_construct(max_difficulty=able, slip_rate=0.0)
            text = replayer.reply("m", ability, task.prompt)
            assert benchmark.score(task, Completion(task.id, "m", "", text)).outcome in outcomes, (task.prompt, text)


def test_answers_depend_on_seed_model_task_and_attempt_alone() -> None:
    items = [KeyItem(prompt_hash(f"q{i}"), "k", 1 + i % 4, str(i * 37)) for i in range(200)]
    ability = AnswerKey(max_difficulty=2, slip_rate=0.2)
    replies = [Replayer(items, 5).reply("m", ability, f"q{i}") for i in range(200)]
    assert replies == [Replayer(items[::-1], 5).reply("m", ability, f"q{i}") for i in range(200)]
    right = [r == str(i * 37) for i, r in enumerate(replies)]
    assert not any(ok for i, ok in enumerate(right) if 1 + i % 4 > 2)
    assert 65 <= sum(right) <= 92  # of 100 within reach, 80 expected, sd 4
    for other in (
        [Replayer(items, 6).reply("m", ability, f"q{i}") for i in range(200)],
        [Replayer(items, 5).reply("n", ability, f"q{i}") for i in range(200)],
        [Replayer(items, 5).reply("m", ability, f"q{i}", attempt=1) for i in range(200)],
    ):
        assert other != replies
    assert Replayer(items, 5).reply("m", ability, "never seen") == UNKNOWN


@pytest.fixture
def teachers(make_teacher):
    def make(**changes):
        return [
            make_teacher(
                ANSWER_KEY, name=f"answer-key-{n}", answer_key={"max_difficulty": n, "latency_ms": 1}, **changes
            )
            for n in (1, 2, 3)
        ]

    return make


def test_the_official_client_is_served(make_task, teachers, get_json) -> None:
    tasks = [make_task(i, difficulty=1 + i % 4) for i in range(40)]
    began = time.monotonic()
    with answer_key_server(tasks, teachers(), seed=3) as url, openai.OpenAI(base_url=url, api_key="none") as client:
        assert time.monotonic() - began < 10
        assert [m.id for m in client.models.list()] == ["answer-key-1", "answer-key-2", "answer-key-3"]

        def ask(model: str, task, **more):
            messages = [{"role": "system", "content": "Be right."}, *(m.as_dict() for m in task.messages)]
            return client.chat.completions.create(model=model, messages=messages, **more)

        for reach in (1, 2, 3):
            for task in tasks:
                reply = ask(f"answer-key-{reach}", task)
                right = reply.choices[0].message.content == str(task.reference)
                assert right == (task.difficulty <= reach)
                assert reply.choices[0].finish_reason == "stop"
                assert reply.model == f"answer-key-{reach}"
                assert reply.usage.completion_tokens == estimate_tokens(reply.choices[0].message.content)
                assert reply.usage.prompt_tokens == 8 + estimate_tokens("Be right.") + estimate_tokens(task.prompt)
        counts = get_json(url.removesuffix("v1") + "requests")
        assert counts["answer-key-2"] == {"answered": 40, "repeated": 0, "limited": 0}

        ask("answer-key-2", tasks[0])
        ask("answer-key-2", tasks[0], seed=1)
        assert get_json(url.removesuffix("v1") + "requests")["answer-key-2"]["repeated"] == 1

        chunks = list(ask("answer-key-3", tasks[2], stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == str(tasks[2].reference)
        assert chunks[-1].usage.completion_tokens == estimate_tokens(text)

        with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
            ask("gpt-5", tasks[0])
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            ask("answer-key-1", tasks[0], max_tokens=0)
    with pytest.raises(urllib.error.URLError):
        get_json(url.removesuffix("v1") + "health")


def test_limits_are_enforced_and_long_answers_cut(make_task, teachers) -> None:
    import dataclasses

    task = dataclasses.replace(make_task(1), reference="a long answer of many words")
    with (
        answer_key_server([task], teachers(requests_per_minute=2), seed=0) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        messages = [m.as_dict() for m in task.messages]
        reply = client.chat.completions.create(model="answer-key-1", messages=messages, max_tokens=2)
        assert reply.choices[0].finish_reason == "length"
        assert reply.choices[0].message.content == "a long a"
        client.chat.completions.create(model="answer-key-1", messages=messages)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="answer-key-1", messages=messages)
        assert 50 <= int(refused.value.response.headers["retry-after"]) <= 60
        client.chat.completions.create(model="answer-key-2", messages=messages)


_PARENT = """
import time
from cascade.teachers.offline import answer_key_server
with answer_key_server([], [], 0) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def test_it_ends_with_a_parent_that_is_killed(get_json) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    health = parent.stdout.readline().strip().removesuffix("v1") + "health"
    assert get_json(health) == {"status": "ok"}
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            get_json(health)
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the server outlived its parent")


def test_it_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, cascade.teachers.offline, uvicorn;"
        "print([m for m in ('torch', 'transformers', 'ray', 'openai', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
