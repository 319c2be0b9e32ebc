"""A test of the student, killed with SIGKILL at random points, gives the verdicts of an unbroken one.

The actors' own code works here block by block in a forked process, without Ray, so that a dozen kills take seconds;
`integration/test_real_base.py` kills whole pipelines on Ray.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from stand_in import build_stand_in

from cascade.artifacts import Run, open_run
from cascade.config import PromptStyle
from cascade.models.worked_examples import WorkedExamples
from cascade.store import Store
from cascade.tasks import Message, Task, Verdict
from ray_jobs import _evaluate
from ray_jobs._context import Job
from ray_jobs._evaluate import Assignment, evaluate
from ray_jobs._loaded_student import LoadedStudent

BLOCK, COUNT, KILLS = 8, 320, 12
LABELS = ["A", "B", "C", "D"]


def question(number):
    texts = [f"{word} {number}" for word in ("one", "two", "three", "four")]
    likelihood = number % 2 == 0
    return Task(
        f"arc/{number}",
        "arc",
        "letters",
        "train",
        (Message("user", f"Which of these is number {number}?"),),
        {"answer": number % 4, "labels": LABELS, "texts": texts, "normalise": True},
        category="science",
        form="likelihood" if likelihood else "chat",
        choices=tuple(texts) if likelihood else (),
        max_tokens=6,
    )


@pytest.fixture
def job(tmp_path):
    """Makes the job of a store by its name."""
    config = build_stand_in(tmp_path / "stand-in").config
    config = config.model_copy(
        update={"execution": config.execution.model_copy(update={"task_block": BLOCK, "threads": 1})}
    )

    def job(name):
        run = open_run(Store(str(tmp_path / name)), "letters", "test_domain")
        return Job(config, SimpleNamespace(), run, SimpleNamespace(update=lambda *a: None))

    return job


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Blocks go to an actor in this process; each is noted before it is begun."""
    monkeypatch.setattr(_evaluate, "_run_blocks", run_blocks)
    torch.set_num_threads(1)


def run_blocks(job, assignments, blocks, size, pool, most=math.inf):
    settings = {a.name: (a.style, a.adapter, a.label) for a in assignments}
    actor = LoadedStudent(job.config, job.run, settings, WorkedExamples.from_pool(pool))
    journal = os.open(f"{job.run.store.path()}.journal", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for block in blocks:
        if asked(job.run).total() >= most * BLOCK:
            signal.pause()  # whoever kills this is late
        ids = block.column("id").to_pylist()
        os.write(journal, (" ".join(ids) + "\n").encode())
        yield assignments[0].name, _evaluate.from_table(Verdict, actor(block))


def asked(run: Run) -> Counter[str]:
    journal = Path(f"{run.store.path()}.journal")
    return Counter(journal.read_text().split() if journal.exists() else ())


def in_a_child(work) -> int:
    """Fork; the child does the work and ends without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def test_killed_at_random_points_it_gives_the_verdicts_of_an_unbroken_one(job, monkeypatch):
    tasks = [question(i) for i in range(COUNT)]
    assignment = Assignment("base", tasks, PromptStyle(name="plain"))
    began = time.perf_counter()
    unbroken = evaluate(job("unbroken"), [assignment])["base"]
    per_block = (time.perf_counter() - began) / (COUNT / BLOCK)

    rng, broken, killed = random.Random(5), job("broken"), 0
    for _ in range(KILLS):
        begun = asked(broken.run).total() // BLOCK + rng.randrange(3)
        monkeypatch.setattr(_evaluate, "_run_blocks", partial(run_blocks, most=begun + 1))
        child = in_a_child(lambda: evaluate(broken, [assignment]))
        while asked(broken.run).total() // BLOCK < begun:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, per_block))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert killed == KILLS
    monkeypatch.setattr(_evaluate, "_run_blocks", run_blocks)
    assert 0 < len(broken.run.read("base_verdicts", Verdict)) < COUNT
    finished = evaluate(broken, [assignment])["base"]

    assert finished == unbroken
    assert {v.outcome for v in finished} >= {"pass", "fail"}
    repeated = asked(broken.run)
    assert set(repeated) == {t.id for t in tasks}
    assert sum(repeated.values()) - COUNT <= KILLS * BLOCK, "more than the batch in flight was repeated"
    broken.run.finish({})
    table = pq.read_table(f"{broken.run.store.path(broken.run.folder)}/base_verdicts.parquet")
    assert sorted(table.column("task_id").to_pylist()) == sorted(t.id for t in tasks)


@pytest.mark.parametrize(
    ("count", "actors", "sizes"), [(10, 4, [3, 3, 3, 1]), (3, 4, [1, 1, 1]), (30, 2, [8, 8, 8, 6])]
)
def test_a_few_tasks_are_shared_out_among_all_actors(job, monkeypatch, count, actors, sizes):
    given = []

    def note(job, assignments, blocks, size, pool):
        given.extend(block.num_rows for block in blocks)
        return iter(())

    monkeypatch.setattr(_evaluate, "_run_blocks", note)
    made = job("few")
    execution = made.config.execution.model_copy(update={"student_actors": actors})
    made = replace(made, config=made.config.model_copy(update={"execution": execution}))
    with pytest.raises(KeyError):  # of the verdicts, which nobody gave
        evaluate(made, [Assignment("base", [question(i) for i in range(count)], PromptStyle(name="plain"))])
    assert given == sizes
