"""A tier's teacher with a predictor and a judge, on real Ray, against a mock server that counts for itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mock_server import Server, mock_server
from stand_in import save_tiny_base

from cascade.config import Config, check_config
from cascade.tasks import Completion, Example, Message, Task, Verdict
from cascade.teachers.judge import judge_messages
from cascade.teachers.predictor import Sent
from ray_jobs._context import Job
from ray_jobs._generate import generate_answers
from ray_jobs._generate_tables import EXAMPLES, VERDICTS
from ray_jobs._results import UNSOLVED
from ray_jobs._runs import Runs
from ray_jobs._shortcut import SENT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
EASY, HARD, OPEN = 50, 70, 6
BASE_ANSWER = "The base's own verse."


@pytest.fixture
def server() -> Iterator[Server]:
    with mock_server(latency_s=0.02) as found:
        yield found


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def task(kind: str, number: int) -> Task:
    prompt = f"{kind} {number}: what rhymes with it?"
    reference: dict[str, Any] = {"kind": "exact", "answers": [f"answer to {prompt}"]}
    if kind == "open":
        reference = {"kind": "open", "rubric": "It rhymes.", "answer": ""}
    return Task(
        id=f"jsonl/{kind}-{number}",
        benchmark="jsonl",
        domain="verse",
        split="train",
        messages=(Message("user", prompt),),
        reference=reference,
        difficulty=9 if kind == "hard" else 1,
    )


def config_for(folder: Path, url: str) -> Config:
    def teacher(name: str, factor: float = 1.0) -> dict[str, Any]:
        endpoints = [{"base_url": url, "requests_per_minute": 10**6, "tokens_per_minute": 10**9}]
        prices = {"input_usd_per_million": factor, "output_usd_per_million": 4 * factor}
        return {"name": name, "endpoints": endpoints, **prices, "max_tokens": 64}

    sources = [{"benchmark": "reasoning_gym"}]
    return check_config(
        {
            "domain": "verse",
            "storage": str(folder / "out"),
            "base": {"model": str(folder / "base"), "dtype": "float32"},
            "tasks": {split: {"sources": sources} for split in ("train", "validation", "test")},
            "tiers": [teacher(f"model-{n}", factor) for n, factor in ((1, 1.0), (2, 5.0), (3, 25.0))],
            "judge": {"model": teacher("the-judge")},
            "predictor": {"enabled": True, "learn_share": 0.5, "control_share": 0.2},
            "budget_usd": 10.0,
            "execution": {"teacher_actors": 2, "task_block": 16},
        }
    )


def job_over(config: Config, tasks: list[Task]) -> Job:
    """The job of tier 1, with what `test_domain` would have left."""
    runs = Runs(config)
    runs.__dict__.update(train_tasks=tasks, validation_tasks=[], test_tasks=[])  # what benchmarks would load
    tested = runs.test_domain
    tested.start(config)
    tested.write_table(UNSOLVED, Task, tasks)
    said = [Completion(t.id, "base", "", BASE_ANSWER, "stop", 9, 5, 0.1) for t in tasks]
    tested.write_table("base_completions", Completion, said)
    tested.finish({})
    runs.generate_tier1.start(config)
    return Job(config, runs, runs.generate_tier1)


def book_of(tasks: list[Task]) -> dict[str, str]:
    """Tier 1 fails what is hard; the judge prefers the teacher's verse, in either place, if its number is even."""
    book = {}
    for t in tasks:
        number = int(t.id.rsplit("-", 1)[1])
        if t.difficulty > 1:
            book[f"model-1|{t.prompt}"] = "no idea"
        if t.reference["kind"] == "open":
            verse = book[f"model-1|{t.prompt}"] = f"Verse {number}, with a rhyme."
            for pair, letter in (((verse, BASE_ANSWER), "A"), ((BASE_ANSWER, verse), "B")):
                asked = judge_messages(t, t.reference["rubric"], *pair)[-1].content
                book[f"the-judge|{asked}"] = f"Well. Verdict: {letter if number % 2 == 0 else 'A'}"
    return book


def test_the_hopeless_go_past_and_a_judge_decides_where_no_scorer_can(
    tmp_path: Path, server: Server, local_ray: None
) -> None:
    save_tiny_base(tmp_path / "base")
    kinds = {"easy": EASY, "hard": HARD, "open": OPEN}
    tasks = [task(kind, n) for kind, count in kinds.items() for n in range(count)]
    server.learn(book_of(tasks))
    job = job_over(config_for(tmp_path, server.url), tasks)
    metrics = generate_answers(job, 1)

    run, by_id = job.run, {t.id: t for t in tasks}
    sent = run.read(SENT, Sent)
    past = {s.task_id for s in sent if not s.control}
    verdicts = {v.task_id: v for v in run.read(VERDICTS, Verdict)}
    assert any("hard" in i for i in past)
    assert not any("easy" in s.task_id for s in sent)
    assert verdicts.keys() == by_id.keys() - past, "all that was not sent past has a verdict, the controls too"
    judged = {i for i in verdicts if "open" in i}
    accepted = {i for i in judged if int(i.rsplit("-", 1)[1]) % 2 == 0}
    assert accepted
    assert {i for i, v in verdicts.items() if v.passed} == accepted | {i for i in by_id if "easy" in i}
    examples = {e.task_id: e for e in run.read(EXAMPLES, Example)}
    assert {i for i, e in examples.items() if e.judge} == accepted
    assert metrics["judged"] == len(judged)
    stats = server.stats(answered=True)
    assert max(stats["answered"].values()) == 1
    assert stats["arrived"] == len(verdicts) + 2 * len(judged)
    assert metrics["cost_usd"] == pytest.approx(stats["charged_usd"])

    assert generate_answers(job, 1) == metrics, "a second time everything is there"
    assert server.stats()["arrived"] == stats["arrived"]
