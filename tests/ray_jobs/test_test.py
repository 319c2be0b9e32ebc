"""What a test of the student leaves for the teachers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cascade.artifacts import open_run
from cascade.config import PromptStyle
from cascade.store import Store
from cascade.tasks import Completion, Message, Task, Verdict
from ray_jobs import _test
from ray_jobs._context import Job
from ray_jobs._results import UNSOLVED

SAID = {"right": ("stop", "pass"), "wrong": ("stop", "fail"), "cut off": ("length", "fail"), "long": ("error", "error")}
"""Task id to finish reason and outcome."""


@pytest.mark.parametrize(("shots", "asked"), [(0, ["wrong", "cut off"]), (1, ["wrong", "cut off", "long"])])
def test_no_teacher_is_asked_what_the_base_could_not_learn(shots, asked, tmp_path: Path, monkeypatch) -> None:
    """With worked examples before it a prompt may have no room, and have it as modifiers are trained."""
    style = PromptStyle(name="plain", shots=shots)
    tasks = [Task(i, "arc", "science", "train", (Message("user", i),), {}) for i in SAID]
    config = SimpleNamespace(student=SimpleNamespace(prompts=[style]), judge=None)
    run = open_run(Store(str(tmp_path)), "reasoning", "test_domain", seed=1)
    job = Job(config, SimpleNamespace(config=config, train_tasks=tasks, validation_tasks=[]), run)  # type: ignore[arg-type]

    def evaluate(job, assignments, pool):
        completions = [Completion(i, "m", "", "", finish_reason=reason) for i, (reason, _) in SAID.items()]
        job.run.write_part("base_completions", completions)
        return {"base": [Verdict(i, "m", "", outcome) for i, (_, outcome) in SAID.items()]}

    monkeypatch.setattr(_test, "evaluate", evaluate)
    monkeypatch.setattr(_test, "check_lengths", lambda _: None)
    metrics = _test.test_student(job, 0)
    assert [t.id for t in run.read(UNSOLVED, Task)] == asked
    assert (metrics["tested"], metrics["unsolved"], metrics["no_room"]) == (4, len(asked), 0 if shots else 1)
