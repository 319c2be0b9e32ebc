"""A teacher actor's side of the desk, against a desk in the same event loop: nothing here starts Ray, or waits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError
from virtual_time import in_virtual_time

from cascade.config import Endpoint, check_config, load_config
from cascade.store import Store
from cascade.teachers.ledger import Ledger, LedgerEntry
from cascade.teachers.limits import Division, Gate, LimiterState, limiter_key
from ray_jobs import _desk
from ray_jobs._desk import Desk, DeskClient, Ended, Share, Unused, limiter_states

ENDPOINT = Endpoint(base_url="http://somewhere/v1", max_concurrency=4)
KEY = limiter_key(ENDPOINT)
PRICES = {"input_usd_per_million": 1.0, "output_usd_per_million": 1.0}


def now() -> float:
    return asyncio.get_running_loop().time()


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class FakeDesk:
    """Limits alone, as `Desk` keeps them, a few milliseconds away."""

    def __init__(self, away_s: float = 0.002, **limits: float) -> None:
        self.away_s = away_s
        self.state = LimiterState(**({"requests_per_minute": 10**6, "tokens_per_minute": 10**9} | limits))  # type: ignore[arg-type]
        self.gate, self.division = Gate(self.state, now), Division()
        self.start, self.note, self.reserve = _Method(self._start), _Method(self._note), _Method(self._reserve)
        self.unused = self.notes = 0
        self.gone, self.noted = False, asyncio.Event()

    async def _start(self, holder: str, limiter: str, tokens: list[int]) -> int:
        assert limiter == KEY
        await asyncio.sleep(self.away_s)
        return await self.gate.start_some(tokens)

    async def _reserve(self, holder: str, usd: list[float]) -> list[str]:
        return [f"lease {n}" for n in range(len(usd))]

    async def _note(self, holder: str, news: list[Any], demands: dict[str, Any]) -> dict[str, Share]:
        await asyncio.sleep(self.away_s)
        if self.gone:
            raise RayError("the desk is gone")
        self.notes += 1
        self.noted.set()
        for item in news:
            if isinstance(item, Ended):
                self.gate.ended(item.signal, item.seconds, item.expected_tokens, item.used_tokens, item.retry_after)
            self.unused += isinstance(item, Unused)
        places = self.state.places
        return {k: Share(self.division.share(holder, *d, places), self.gate.paused()) for k, d in demands.items()}


class Crowd:
    """Requests of some actors, and how many were in flight at once."""

    def __init__(self, desk: FakeDesk, actors: int) -> None:
        self.clients = [DeskClient(desk) for _ in range(actors)]
        self.in_flight = [0] * actors
        self.most = 0
        self.done: list[int] = []

    async def ask(self, actor: int, latency: float) -> None:
        limiter = self.clients[actor].limiter(ENDPOINT)
        permit = await limiter.acquire(10)
        self.in_flight[actor] += 1
        self.most = max(self.most, sum(self.in_flight))
        await asyncio.sleep(latency)
        self.in_flight[actor] -= 1
        self.done.append(actor)
        await limiter.release(permit, "ok", 10)


@in_virtual_time
async def test_a_free_place_is_taken_at_once_and_never_are_there_more() -> None:
    crowd = Crowd(FakeDesk(away_s=0.2, max_concurrency=4), 1)
    began = now()
    await asyncio.gather(*(crowd.ask(0, 0.2) for _ in range(40)))
    assert crowd.most == 4
    assert now() - began < 3.4  # 2.4 s at best; a way to the desk before each request would make it 4


@in_virtual_time
async def test_actors_share_and_one_that_comes_later_gets_its_part() -> None:
    crowd = Crowd(FakeDesk(max_concurrency=4), 2)
    first = [asyncio.ensure_future(crowd.ask(0, 0.02)) for _ in range(60)]
    await asyncio.sleep(0.1)
    second = [asyncio.ensure_future(crowd.ask(1, 0.02)) for _ in range(20)]
    await asyncio.gather(*second)
    assert any(not request.done() for request in first)
    await asyncio.gather(*first)
    assert crowd.most == 4


@in_virtual_time
async def test_after_a_429_fewer_are_in_flight_and_none_starts_too_early() -> None:
    desk = FakeDesk(max_concurrency=4)
    limiter = DeskClient(desk).limiter(ENDPOINT)
    permits = [await limiter.acquire(10) for _ in range(4)]
    await limiter.release(permits.pop(), "limited", 0, retry_after=0.3)
    began = now()
    waiting = asyncio.ensure_future(limiter.acquire(10))
    await asyncio.sleep(0.05)
    for permit in permits[:2]:
        await limiter.release(permit, "ok", 10)
    await waiting
    assert now() - began >= 0.29
    assert desk.state.places == 2


@in_virtual_time
async def test_idle_actors_hardly_talk() -> None:
    desk = FakeDesk(max_concurrency=4)
    crowd = Crowd(desk, 1)
    slow = [asyncio.ensure_future(crowd.ask(0, 0.5)) for _ in range(20)]
    await asyncio.sleep(0.3)
    assert desk.notes <= 4
    for request in slow:
        request.cancel()


@in_virtual_time
async def test_who_waits_for_a_batch_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_desk, "_HEARTBEAT_S", 0.02)
    desk = FakeDesk(max_concurrency=4)
    assert await DeskClient(desk).reserve(1, 0.5) == "lease 0"
    async with asyncio.timeout(10):
        await desk.noted.wait()


@in_virtual_time
async def test_a_start_whose_request_is_gone_is_given_back() -> None:
    desk = FakeDesk(max_concurrency=1)
    limiter = DeskClient(desk).limiter(ENDPOINT)
    permit = await limiter.acquire(10)
    waiting = asyncio.ensure_future(limiter.acquire(10))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.sleep(0.05)
    assert desk.unused == 1
    await limiter.release(permit, "ok", 10)
    await asyncio.wait_for(limiter.acquire(10), 1)


@in_virtual_time
async def test_whoever_waits_is_told_when_the_desk_is_gone() -> None:
    desk = FakeDesk(max_concurrency=1)
    limiter = DeskClient(desk).limiter(ENDPOINT)
    permit = await limiter.acquire(10)
    waiting = asyncio.ensure_future(limiter.acquire(10))
    await asyncio.sleep(0.02)
    desk.gone = True
    await limiter.release(permit, "limited", 0)
    with pytest.raises(RayError, match="gone"):
        await asyncio.wait_for(waiting, 2)


def test_one_endpoint_and_key_has_one_limiter_with_the_least_of_its_limits() -> None:
    def asked(url: str, **limits: int) -> dict[str, Any]:
        return {"name": "m", "endpoints": [{"base_url": url, **limits}], **PRICES}

    same = "http://same/v1"
    tier = asked(same, requests_per_minute=100, tokens_per_minute=5000, max_concurrency=8)
    tier["endpoints"] += [
        {"base_url": same, "requests_per_minute": 300, "tokens_per_minute": 4000, "max_concurrency": 9},
        {"base_url": same, "api_key_env": "ANOTHER_KEY", "requests_per_minute": 70},
    ]
    judge = {"model": asked(same, requests_per_minute=200, tokens_per_minute=6000, max_concurrency=2)}
    sources = {"sources": [{"benchmark": "jsonl"}]}
    tasks = dict.fromkeys(("train", "validation", "test"), sources)
    raw = {"domain": "d", "base": {"model": "m"}, "budget_usd": 1.0, "tasks": tasks, "tiers": [tier] * 3}
    for config in (check_config(raw | {"judge": judge}), check_config(raw)):
        states = limiter_states(config, 1)
        assert states.keys() == {f"{same}|", f"{same}|ANOTHER_KEY"}
        shared = states[f"{same}|"]
        assert (shared.requests_per_minute, shared.tokens_per_minute) == (100, 4000)
        assert shared.max_concurrency == (2 if config.judge else 8)
        assert states[f"{same}|ANOTHER_KEY"].requests_per_minute == 70


@pytest.mark.parametrize("module", ["pipeline", "_report", "_train_controller", "_teacher_actor", "_generate_tables"])
def test_what_needs_no_model_does_not_load_torch(module: str) -> None:
    code = f"import sys, ray_jobs.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_desk_knows_what_was_spent_wherever_its_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "here/out"))
    Ledger(store).record(LedgerEntry("a", "code", 1, "t", 0, "m", "u", price_usd=50.0))
    config = load_config(Path(__file__).parents[2] / "configs/code.yaml").model_copy(update={"storage": "out"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert asyncio.run(Desk(config, store, 3).left_usd()) == config.budget_usd - 50.0
