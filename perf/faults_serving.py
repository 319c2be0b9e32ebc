"""A Serve node, and then the process that started serving, killed under load: which requests are lost?

The clients are the official one with its own two retries, as users have it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
import openai
import ray
from faults_lab import Driver, Figures, Nodes, Row, free_port, wait_until
from ray import serve as ray_serve
from stand_in import DOMAINS, LETTERS_QUESTION, SUMS_QUESTION, StandIn

CLIENTS = 4
BEFORE_S = 5.0
AFTER_S = 20.0
"""How long clients ask on once all engines are there again."""
ENGINE, GATEWAY = "ServeReplica:cascade:engine", "ServeReplica:cascade:gateway"
ENGINES = 2
QUESTIONS = (LETTERS_QUESTION, SUMS_QUESTION)
MODELS = ("base", *DOMAINS, "cascade")


@dataclass
class Load:
    """What clients that never stop asking have seen.

    Attributes:
        times: begin and end of each answer that came, on the monotonic clock.
        failed: requests that failed although the client tried again.
        refused: tries that failed.
        wrong: answers that are not what was answered before the kill.
    """

    url: str
    expected: dict[tuple[str, str], str] = field(default_factory=dict)
    times: list[tuple[float, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    refused: int = 0
    wrong: int = 0
    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    async def run(self) -> None:
        """Learn what is answered, then ask without end until it is over."""
        async with httpx2.AsyncClient(timeout=120, event_hooks={"response": [self._note]}) as http:
            client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", http_client=http)
            for pair in [(model, question) for model in MODELS for question in QUESTIONS]:
                self.expected[pair] = await _ask(client, *pair)
            self.begun.set()
            await asyncio.gather(*(self._client(client, number) for number in range(CLIENTS)))

    async def _note(self, response: httpx2.Response) -> None:
        self.refused += response.status_code >= 500 and self.begun.is_set()

    async def _client(self, client: openai.AsyncOpenAI, number: int) -> None:
        pairs = list(self.expected)
        while not self.over.is_set():
            number += CLIENTS
            pair, began = pairs[number % len(pairs)], time.monotonic()
            try:
                text = await _ask(client, *pair)
            except openai.OpenAIError as error:
                self.failed.append(repr(error))
                continue
            self.times.append((began, time.monotonic()))
            self.wrong += text != self.expected[pair]


async def _ask(client: openai.AsyncOpenAI, model: str, question: str) -> str:
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
    )
    return answer.choices[0].message.content or ""


def serving(stand_in: StandIn, nodes: Nodes, who: str) -> Row:
    """Serve two modifiers with an engine on each worker node, and kill."""
    port = free_port()
    options = ["--port", str(port), f"replicas={ENGINES}", "threads=1"]
    log = stand_in.config_path.with_suffix(f".{who}.log")
    driver = Driver(log, ["serve", str(stand_in.config_path), *options], nodes.address)
    load = Load(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: _is_up(load.url) and _engines(nodes) == ENGINES, driver, "serving", pause=0.5)
        gateway = bool(nodes.where(GATEWAY))
        with ThreadPoolExecutor(1) as pool:  # a node can be started from the main thread alone
            running = pool.submit(asyncio.run, load.run())
            load.begun.wait(120)
            time.sleep(BEFORE_S)
            struck = time.monotonic()
            driver.kill() if who == "driver" else _kill_node(nodes)
            _wait_until(lambda: _engines(nodes) == ENGINES and _is_up(load.url))
            whole_s = time.monotonic() - struck
            time.sleep(AFTER_S)
            load.over.set()
            running.result()
    finally:
        load.over.set()
        _end(driver, nodes)
    return _row(load, who, gateway, struck, whole_s)


def _row(load: Load, who: str, gateway: bool, struck: float, whole_s: float) -> Row:
    after = [end - max(begin, struck) for begin, end in load.times if end > struck]
    longest = max(after, default=float("inf"))
    where = f"SIGKILL of a worker node with an engine{' and the gateway' if gateway else ''}"
    happened = "kill -9 of `python -m serve`" if who == "driver" else f"{where}, one of two"
    requests = len(load.times) + len(load.failed)
    lost = f"{len(load.failed)} of {requests} requests; {load.refused} tries were refused and made again by the client"
    lost += f"; longest answer {longest:.1f} s"
    figures: Figures = {
        "requests_lost": (len(load.failed), 0, not load.failed),
        "tries_refused": (load.refused, None, True),
        "longest_answer_s": (round(longest, 1), None, True),
        "wrong_answers": (load.wrong, 0, load.wrong == 0),
        "all_engines_back_s": (round(whole_s, 1), None, True),
    }
    for failure in load.failed[:3]:
        print(f"   lost: {failure}")
    named = {f"serving_{who}_{name}": found for name, found in figures.items()}
    return Row("serving", happened, lost, whole_s, load.wrong == 0 and not load.failed, named)


def _kill_node(nodes: Nodes) -> None:
    """The one with the gateway, if it is on a worker; another comes in its place, as an autoscaler would bring."""
    nodes.kill((nodes.where(GATEWAY) or nodes.where(ENGINE))[0][0])
    nodes.add()


def _wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError("the engines did not come back")
        time.sleep(0.2)


def _engines(nodes: Nodes) -> int:
    return sum(len(processes) for _, processes in nodes.where(ENGINE))


def _is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=10).status_code == 200
    except httpx2.HTTPError:
        return False


def _end(driver: Driver, nodes: Nodes) -> None:
    """End serving, also where what had started it is dead."""
    driver.process.terminate()
    driver.process.wait(180)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR, namespace="serve")
    try:
        ray_serve.shutdown()
    finally:
        ray.shutdown()
