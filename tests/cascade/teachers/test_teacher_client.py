from __future__ import annotations

import asyncio
import contextlib
import email.utils
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from cascade.config import ANSWER_KEY, Teacher
from cascade.errors import BudgetExceeded, TeacherError
from cascade.store import Store
from cascade.tasks import Message
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient, missing_keys
from cascade.teachers.endpoint import EndpointClient, Failure, retry_after
from cascade.teachers.ledger import Ledger
from cascade.teachers.limits import RateLimiter
from cascade.teachers.offline import answer_key_server

PRICE = (100 * 10 + 20 * 100) / 1e6
"""Of one answer of the fake server at the fake teacher's prices."""


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndpointClient, "backoff", lambda self, failures: 0.01)


@pytest.fixture
def open_client(tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[TeacherClient]]:
    @contextlib.asynccontextmanager
    async def open_it(teacher: Teacher, budget_usd: float = 100.0, **more) -> AsyncIterator[TeacherClient]:
        ledger = Ledger(Store(str(tmp_path)))
        budget = LocalBudget(BudgetState("reasoning", budget_usd, spent={1: ledger.spent()}))
        async with TeacherClient(teacher, 1, "reasoning", ledger, budget, **more) as client:
            client.seen_budget = budget.state  # type: ignore[attr-defined]
            yield client

    return open_it


def rows(path: Path) -> list:
    return list(Ledger(Store(str(path))).entries())


async def test_an_answer_is_paid_once_and_then_comes_from_the_ledger(
    fake_server, make_teacher, make_task, open_client, tmp_path
) -> None:
    server = fake_server()
    teacher = make_teacher(server.url, system="Be right.")
    async with open_client(teacher) as client:
        assert not client.known(make_task(1))
        first = await client.answer(make_task(1))
        again = await client.answer(make_task(1))
        assert client.known(make_task(1))
    assert first.text == "answer to What is 1 + 1?"
    assert first.ok
    assert (first.cost_usd, first.prompt_tokens, first.completion_tokens) == (pytest.approx(PRICE), 100, 20)
    assert (first.from_ledger, again.from_ledger) == (False, True)
    assert again.text == first.text
    assert first.completion().model == "model-a"
    async with open_client(teacher) as client:
        assert (await client.answer(make_task(1))).from_ledger
        assert not (await client.answer(make_task(1), attempt=1)).from_ledger
        assert not (await client.answer(make_task(2))).from_ledger
    async with open_client(make_teacher(server.url, system="Be brief.")) as client:
        assert not (await client.answer(make_task(1))).from_ledger
    assert len(server.calls) == 4
    assert server.calls[0]["messages"][0] == {"role": "system", "content": "Be right."}
    assert sorted(r.task_id for r in rows(tmp_path)) == ["sums/1", "sums/1", "sums/1", "sums/2"]
    assert Ledger(Store(str(tmp_path))).spent(1) == pytest.approx(4 * PRICE)


async def test_a_repair_is_a_request_of_its_own_and_paid_once(
    fake_server, make_teacher, make_task, open_client, tmp_path
) -> None:
    server = fake_server()
    said = (Message("assistant", "3"), Message("user", "That is not correct."))
    async with open_client(make_teacher(server.url, repair_rounds=1)) as client:
        await client.answer(make_task(1))
        mended = await client.answer(make_task(1), follow_up=said)
        again = await client.answer(make_task(1), follow_up=said)
    assert (mended.round, mended.from_ledger, again.from_ledger) == (1, False, True)
    assert [m["content"] for m in server.calls[1]["messages"]] == ["What is 1 + 1?", "3", "That is not correct."]
    assert sorted(r.round for r in rows(tmp_path)) == [0, 1]


async def test_the_same_question_asked_at_once_is_paid_once(fake_server, make_teacher, make_task, open_client) -> None:
    server = fake_server()
    server.delay = 0.05
    async with open_client(make_teacher(server.url)) as client:
        answers = await asyncio.gather(*(client.answer(make_task(1)) for _ in range(8)))
    assert len(server.calls) == 1
    assert sum(a.from_ledger for a in answers) == 7


async def test_faults_are_tried_again(fake_server, make_teacher, make_task, open_client, tmp_path) -> None:
    server = fake_server()
    teacher = make_teacher(server.url, timeout_s=1.0)
    faults = [500, 503, "{broken", ("sleep", 1.6), {"choices": []}, {"choices": None, "error": {"message": "x"}}, 408]
    async with open_client(teacher) as client:
        for number, fault in enumerate(faults):
            server.script.append(fault)
            answer = await client.answer(make_task(number))
            assert answer.ok, fault
        assert len(server.calls) == 2 * len(faults)
        errors = [r for r in rows(tmp_path) if not r.responded]
        assert len(errors) == len(faults)
        unsure = [r for r in errors if r.unsure_usd]
        assert len(unsure) == 4, "what was sent and brought nothing back may have been charged"
        assert all(r.price_usd > 0 for r in unsure)
        ledger = Ledger(Store(str(tmp_path)))
        assert ledger.spent_at_most() == pytest.approx(client.seen_budget.total_spent())
        assert ledger.spent_at_most() > ledger.spent() > len(faults) * PRICE


@pytest.mark.parametrize("word", ["error", "insufficient_system_resource", "abort"])
async def test_an_answer_that_the_endpoint_broke_off_is_asked_for_again(
    fake_server, make_teacher, make_task, open_client, choices, word: str
) -> None:
    server = fake_server()
    server.script.append(choices("half an ans", word))
    async with open_client(make_teacher(server.url)) as client:
        assert (await client.answer(make_task(1))).text == "answer to What is 1 + 1?"


async def test_blank_lines_of_a_busy_endpoint_do_not_put_the_timeout_off(
    fake_server, make_teacher, make_task, open_client
) -> None:
    async def blank_lines() -> AsyncIterator[bytes]:
        while True:
            yield b"\n"
            await asyncio.sleep(0.05)

    server = fake_server()
    server.script.append(StreamingResponse(blank_lines(), media_type="application/json"))
    async with open_client(make_teacher(server.url, timeout_s=0.3)) as client:
        assert (await asyncio.wait_for(client.answer(make_task(1)), 20)).ok
    assert len(server.calls) == 2


async def test_what_a_moderator_refuses_concerns_one_request_alone(
    fake_server, make_teacher, make_task, open_client
) -> None:
    server = fake_server()
    flagged = {"error": {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"]}}}
    server.script.append(JSONResponse(flagged, 403))
    async with open_client(make_teacher(server.url)) as client:
        assert "does not accept the request (403: flagged)" in (await client.answer(make_task(1))).error
        assert (await client.answer(make_task(2))).ok


async def test_a_limit_that_lets_nothing_through_stops_the_run(
    fake_server, make_teacher, make_task, open_client, monkeypatch
) -> None:
    monkeypatch.setattr("cascade.teachers.client._PATIENCE_S", 0.05)
    server = fake_server()
    server.script.extend([JSONResponse({"error": {"message": "1000 a day"}}, 429, {"Retry-After": "0.1"})] * 3)
    async with open_client(make_teacher(server.url)) as client:
        with pytest.raises(TeacherError, match=r"nobody answers any more.*1000 a day.*run again"):
            await client.answer(make_task(1))


async def test_waiting_for_a_place_uses_no_patience_up(
    fake_server, make_teacher, make_task, open_client, monkeypatch
) -> None:
    monkeypatch.setattr("cascade.teachers.client._PATIENCE_S", 0.25)
    server = fake_server()
    server.script.extend([("sleep", 0.5), JSONResponse({"error": {}}, 429, {"Retry-After": "0.05"})])
    async with open_client(make_teacher(server.url, max_concurrency=1)) as client:
        answers = await asyncio.gather(*(client.answer(make_task(n)) for n in range(2)))
    assert [a.error for a in answers] == ["", ""]
    assert len(server.calls) == 3


async def test_429_costs_no_retries_and_its_retry_after_is_kept(
    fake_server, make_teacher, make_task, open_client
) -> None:
    server = fake_server()
    limited = JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.2"})
    server.script.extend([limited] * 4)
    began = time.monotonic()
    async with open_client(make_teacher(server.url, retries=0)) as client:
        assert (await client.answer(make_task(1))).ok
    assert time.monotonic() - began >= 0.8
    assert len(server.calls) == 5


async def test_a_request_that_fails_for_good_is_recorded_and_asked_again_next_time(
    fake_server, make_teacher, make_task, open_client, tmp_path
) -> None:
    server = fake_server()
    server.script.extend([500] * 4 + [400])
    async with open_client(make_teacher(server.url)) as client:
        failed, refused = await client.answer(make_task(1)), await client.answer(make_task(2))
        assert "500: fault 500" in failed.error
        assert "does not accept the request (400: fault 400)" in refused.error
        assert (failed.text, failed.cost_usd) == ("", 0.0)
        assert [r.outcome for r in rows(tmp_path)] == ["error"] * 5  # every call has its row
        assert (await client.answer(make_task(1))).ok


async def test_cut_and_empty_answers_are_paid_but_are_no_answers(
    fake_server, make_teacher, make_task, open_client, choices, tmp_path
) -> None:
    server = fake_server()
    server.script.extend([choices("4", "length"), choices(" "), choices(None, "content_filter"), choices("<think>hm")])
    async with open_client(make_teacher(server.url)) as client:
        for number, word in enumerate(["cut off at 50 tokens", "empty", "content_filter", "after the reasoning"]):
            for _ in range(2):
                answer = await client.answer(make_task(number))
                assert word in answer.error
                assert answer.text == ""
                assert answer.cost_usd == pytest.approx(PRICE)
    assert len(server.calls) == 4
    assert [r.outcome for r in rows(tmp_path)] == ["cut", "empty", "empty", "answered"]
    assert rows(tmp_path)[0].text == "4"


async def test_reasoning_that_comes_apart_is_kept_in_the_ledger(
    fake_server, make_teacher, make_task, open_client, choices
) -> None:
    server = fake_server()
    server.script.append(choices("4", reasoning_content="2 and 2"))
    async with open_client(make_teacher(server.url)) as client:
        assert (await client.answer(make_task(2))).text == "4"
    async with open_client(make_teacher(server.url, keep_reasoning=True)) as client:
        assert (await client.answer(make_task(2))).text == "<think>\n2 and 2\n</think>\n4"
    assert len(server.calls) == 1


@pytest.mark.parametrize("cached", [{"prompt_tokens_details": {"cached_tokens": 60}}, {"prompt_cache_hit_tokens": 60}])
async def test_cached_tokens_are_priced_as_such(
    fake_server, make_teacher, make_task, open_client, tmp_path, cached
) -> None:
    server = fake_server()
    details = {"prompt_tokens": 100, "completion_tokens": 0, "total_tokens": 100}
    server.script.append({"usage": details | cached})
    async with open_client(make_teacher(server.url, cached_input_usd_per_million=1.0)) as client:
        assert (await client.answer(make_task(1))).cost_usd == pytest.approx((40 * 10 + 60) / 1e6)
    assert rows(tmp_path)[0].cached_tokens == 60


async def test_reasoning_tokens_that_only_the_total_has_are_paid(
    fake_server, make_teacher, make_task, open_client
) -> None:
    server = fake_server()
    server.script.append({"usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 420}})
    async with open_client(make_teacher(server.url)) as client:
        answer = await client.answer(make_task(1))
    assert (answer.completion_tokens, answer.cost_usd) == (320, pytest.approx((100 * 10 + 320 * 100) / 1e6))


async def test_usage_that_is_not_reported_is_estimated(fake_server, make_teacher, make_task, open_client) -> None:
    server = fake_server()
    server.script.append({"usage": None})
    async with open_client(make_teacher(server.url)) as client:
        answer = await client.answer(make_task(1))
    assert (answer.prompt_tokens, answer.completion_tokens) == (4 + 4, 6)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(401, "refuses the API key.*MY_KEY"), (403, "MY_KEY"), (404, "model-a.*knows no such model"), (402, "no credit")],
)
async def test_a_refused_key_or_model_stops_with_a_clear_message(
    fake_server, make_teacher, make_task, open_client, monkeypatch, fault: int, message: str
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server = fake_server()
    server.script.append(fault)
    async with open_client(make_teacher(server.url, api_key_env="MY_KEY")) as client:
        with pytest.raises(TeacherError, match=message) as stopped:
            await client.answer(make_task(1))
        assert "secret" not in str(stopped.value)
        with pytest.raises(TeacherError):
            await client.answer(make_task(2))
        assert client.seen_budget.total_spent() == 0
    assert len(server.calls) == 1
    assert server.headers[0]["authorization"] == "Bearer secret"


async def test_spent_credit_is_no_rate_limit(fake_server, make_teacher, make_task, open_client) -> None:
    server = fake_server()
    server.script.append(JSONResponse({"error": {"message": "pay", "code": "insufficient_quota"}}, 429))
    async with open_client(make_teacher(server.url)) as client:
        with pytest.raises(TeacherError, match="no credit left"):
            await client.answer(make_task(1))


async def test_a_missing_key_is_named_before_any_call(fake_server, make_teacher, open_client, monkeypatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    teacher = make_teacher("http://127.0.0.1:9/v1", api_key_env="MY_KEY")
    assert missing_keys(teacher) == ["MY_KEY"]
    with pytest.raises(TeacherError, match="set MY_KEY"):
        async with open_client(teacher):
            pass


async def test_white_space_around_a_key_is_not_sent(
    fake_server, make_teacher, make_task, open_client, monkeypatch
) -> None:
    monkeypatch.setenv("MY_KEY", " secret\n")
    server = fake_server()
    async with open_client(make_teacher(server.url, api_key_env="MY_KEY")) as client:
        assert (await client.answer(make_task(1))).ok
    assert server.headers[0]["authorization"] == "Bearer secret"
    monkeypatch.setenv("MY_KEY", "\n")
    assert missing_keys(make_teacher(server.url, api_key_env="MY_KEY")) == ["MY_KEY"]


@pytest.mark.parametrize(
    ("value", "character"), [("…", r"1, '…'"), ("sec\nret", r"4, '\\n'"), ("k\x7f", r"2, '\\x7f'")]
)
async def test_what_can_be_no_key_is_named_by_its_variable_before_any_call(
    fake_server, make_teacher, open_client, monkeypatch, value: str, character: str
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    server = fake_server()
    with pytest.raises(TeacherError, match=rf"variable MY_KEY holds no API key: its character {character},") as refused:
        async with open_client(make_teacher(server.url, api_key_env="MY_KEY")):
            pass
    assert "sec" not in str(refused.value)
    assert not server.calls


@pytest.mark.parametrize("url", ["localhost:8001/v1", "ftp://127.0.0.1/v1", "http://127.0.0.1:99999/v1", "http://…/v1"])
async def test_what_no_endpoint_was_asked_costs_nothing(make_teacher, make_task, open_client, tmp_path, url) -> None:
    named = "https://teachers.example/v1"
    async with open_client(make_teacher(named), resolve={named: url}) as client:
        with contextlib.suppress(TeacherError):
            assert not (await client.answer(make_task(1))).ok
        assert client.seen_budget.total_spent() == 0
    assert rows(tmp_path)
    assert Ledger(Store(str(tmp_path))).spent_at_most() == 0


async def test_what_no_request_can_carry_is_not_charged(fake_server, make_teacher) -> None:
    server = fake_server()
    teacher = make_teacher(server.url)
    client = EndpointClient(teacher.endpoints[0], server.url, teacher, RateLimiter.of(teacher.endpoints[0]))
    failure = await client.complete([Message("user", "half \ud83d of it")], {})
    await client.aclose()
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.charged, server.calls) == ("refused", False, [])


async def test_no_other_key_goes_to_an_endpoint_without_one(
    fake_server, make_teacher, make_task, open_client, monkeypatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "somebody's secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "somebody")
    server = fake_server()
    async with open_client(make_teacher(server.url)) as client:
        assert (await client.answer(make_task(1))).ok
    assert not {"authorization", "openai-organization"} & set(server.headers[0])


async def test_the_next_endpoint_takes_over(fake_server, make_teacher, make_task, open_client, tmp_path) -> None:
    first, second = fake_server(), fake_server()
    first.script.extend([401])
    teacher = make_teacher(first.url, second.url)
    async with open_client(teacher) as client:
        for number in range(4):
            assert (await client.answer(make_task(number))).ok
    assert (len(first.calls), len(second.calls)) == (1, 4)
    assert {r.endpoint for r in rows(tmp_path) if r.responded} == {second.url}
    async with open_client(teacher) as client:
        assert (await client.answer(make_task(0))).from_ledger


async def test_an_endpoint_that_is_down_rests(fake_server, make_teacher, make_task, open_client) -> None:
    server = fake_server()
    async with open_client(make_teacher("http://127.0.0.1:9/v1", server.url)) as client:
        for number in range(30):
            assert (await client.answer(make_task(number))).ok
        assert client._pool.endpoints[0].resting
        assert client._pool.endpoints[0]._failures == 10


async def test_nobody_answering_stops_the_run(make_teacher, make_task, open_client) -> None:
    async with open_client(make_teacher("http://127.0.0.1:9/v1")) as client:
        answers = [await client.answer(make_task(n)) for n in range(2)]
        assert all("cannot reach http://127.0.0.1:9/v1" in a.error for a in answers)
        with pytest.raises(TeacherError, match=r"nobody answers any more.*run again"):
            await client.answer(make_task(3))


async def test_an_endpoint_that_refuses_everything_stops_the_run(
    fake_server, make_teacher, make_task, open_client
) -> None:
    server = fake_server()
    server.script.extend([400] * 20)
    async with open_client(make_teacher(server.url)) as client:
        for number in range(20):
            assert "400" in (await client.answer(make_task(number))).error
        with pytest.raises(TeacherError, match="20 requests in a row were refused"):
            await client.answer(make_task(99))


@pytest.mark.parametrize("share", [0.35, 1.0])
async def test_sixteen_at_once_never_pass_the_budget(
    fake_server, make_teacher, make_task, open_client, tmp_path, share: float
) -> None:
    server = fake_server()
    server.delay = 0.01
    usage = {"prompt_tokens": 20, "completion_tokens": round(50 * share)}
    server.script.extend([{"usage": usage}] * 200)
    budget = 0.1

    async def ask(client: TeacherClient, numbers: range) -> int:
        done = 0
        with contextlib.suppress(BudgetExceeded):
            for number in numbers:
                done += (await client.answer(make_task(number))).ok
        return done

    async with open_client(make_teacher(server.url), budget) as client:
        workers = (ask(client, range(start, 200, 16)) for start in range(16))
        done = sum(await asyncio.wait_for(asyncio.gather(*workers), 20))
    spent = Ledger(Store(str(tmp_path))).spent()
    paid = len(server.calls) * (20 * 10 + round(50 * share) * 100) / 1e6
    assert spent == pytest.approx(paid)
    assert done == len(server.calls)
    assert 0.1 - 0.007 <= spent <= budget
    assert server.most_in_flight > 1
    async with open_client(make_teacher(server.url), budget) as client:
        with pytest.raises(BudgetExceeded, match="raise budget_usd"):
            await client.answer(make_task(999))
        assert (await client.answer(make_task(0))).from_ledger


async def test_concurrency_stays_within_the_endpoints_limit(fake_server, make_teacher, make_task, open_client) -> None:
    server = fake_server()
    server.delay = 0.02
    async with open_client(make_teacher(server.url, max_concurrency=5)) as client:
        await asyncio.gather(*(client.answer(make_task(n)) for n in range(40)))
    assert server.most_in_flight == 5


def test_retry_after_is_read_in_all_its_forms() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "1.5", "retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) is None
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 0 < (retry_after({"retry-after": in_a_minute}) or 0) <= 60
    assert retry_after({"retry-after": "0"}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "99999"}) == 600
    assert retry_after({}) is None


def _offline(make_teacher, **changes) -> Teacher:
    key = {"max_difficulty": 2, "latency_ms": 5} | changes.pop("answer_key", {})
    return make_teacher(ANSWER_KEY, name="answer-key-a", answer_key=key, **changes)


async def test_the_offline_teacher_is_asked_over_http(make_teacher, make_task, open_client, get_json) -> None:
    teacher = _offline(make_teacher, answer_key={"slip_rate": 0.5})
    tasks = [make_task(n, difficulty=1 + n % 3) for n in range(60)]
    with answer_key_server(tasks, [teacher], seed=1) as url:
        async with open_client(teacher, resolve={ANSWER_KEY: url}) as client:
            answers = await asyncio.gather(*(client.answer(t, n) for t in tasks for n in range(3)))
        counts = get_json(url.removesuffix("v1") + "requests")["answer-key-a"]
    assert counts == {"answered": 180, "repeated": 0, "limited": 0}
    right = [a.text == str(t.reference) for a, t in zip(answers, [t for t in tasks for _ in range(3)], strict=True)]
    assert not any(ok for ok, a in zip(right, answers, strict=True) if int(a.task_id[5:]) % 3 == 2)
    assert 35 <= sum(right) <= 85  # of 120 within reach, half expected, sd 5.5
    with answer_key_server(tasks, [teacher], seed=1) as other:
        assert other != url
        async with open_client(teacher, resolve={ANSWER_KEY: other}) as client:
            assert (await client.answer(tasks[0])).from_ledger
        changed = _offline(make_teacher, answer_key={"slip_rate": 0.0})
        async with open_client(changed, resolve={ANSWER_KEY: other}) as client:
            assert not (await client.answer(tasks[0])).from_ledger
    with pytest.raises(TeacherError, match="not running"):
        async with open_client(teacher):
            pass


_BUYER = """
import asyncio, sys
from cascade.store import Store
from cascade.config import Teacher
from cascade.tasks import Message, Task
from cascade.teachers.budget import BudgetState, LocalBudget
from cascade.teachers.client import TeacherClient
from cascade.teachers.ledger import Ledger
from cascade.teachers.limits import RateLimiter

async def main(root, teacher, url):
    budget = LocalBudget(BudgetState("reasoning", 100.0))
    teacher = Teacher.model_validate_json(teacher)
    async with TeacherClient(
        teacher, 1, "reasoning", Ledger(Store(root)), budget, resolve={"answer-key": url}
    ) as client:
        async def one(n):
            message = Message("user", f"What is {n} + {n}?")
            answer = await client.answer(Task(f"sums/{n}", "sums", "reasoning", "train", (message,), 2 * n))
            assert answer.ok, answer.error
            print(n, flush=True)
        await asyncio.gather(*(one(n) for n in range(200)))

asyncio.run(main(*sys.argv[1:]))
"""


def test_kill_9_pays_nothing_twice_but_what_was_in_flight(make_teacher, make_task, tmp_path, get_json) -> None:
    teacher = _offline(make_teacher, max_concurrency=8)
    tasks = [make_task(n) for n in range(200)]
    arguments = [sys.executable, "-c", _BUYER, str(tmp_path), teacher.model_dump_json()]
    with answer_key_server(tasks, [teacher], seed=1) as url:
        buyer = subprocess.Popen([*arguments, url], stdout=subprocess.PIPE, text=True)
        assert buyer.stdout is not None
        for _ in range(70):
            buyer.stdout.readline()
        buyer.send_signal(signal.SIGKILL)
        buyer.wait()
        buyer.stdout.close()
        assert 70 <= len(Ledger(Store(str(tmp_path)))) < 200
        done = subprocess.run([*arguments, url], capture_output=True, text=True, timeout=60, check=True)
        counts = get_json(url.removesuffix("v1") + "requests")["answer-key-a"]
    assert len(done.stdout.splitlines()) == 200
    entries = rows(tmp_path)
    assert len(entries) == len({e.key for e in entries}) == 200
    assert counts["repeated"] <= 8
    assert counts["answered"] - counts["repeated"] == 200
