"""What finished jobs have left for those after them; read without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade.benchmarks.sources import cache_dir
from cascade.compression.adapter import AdapterWeights, load_peft_folder
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.format import load_modifier
from cascade.config import PromptStyle
from cascade.store import Store
from cascade.tasks import Example, Task
from ray_jobs._runs import Runs

UNSOLVED = "unsolved"
"""Table of every test: the tasks that the next tier's teacher is asked."""
ADAPTER = "adapter"
"""Folder of the finished PEFT adapter, in the last checkpoint of a training and in its run."""
LOOKS = "looks"
"""Table of what a training found when it looked at validation tasks."""


def unsolved_before(runs: Runs, tier: int) -> list[Task]:
    """What a tier's teacher is asked: the tasks that the test before it left unsolved."""
    return runs.test(tier - 1).require().read(UNSOLVED, Task)


def examples_up_to(runs: Runs, tier: int) -> list[Example]:
    """Verified examples of the tiers 1…tier; of a task that several tiers solved, the last one's."""
    by_task: dict[str, Example] = {}
    for t in range(1, tier + 1):
        by_task |= {e.task_id: e for e in runs.generate(t).require().read("examples", Example)}
    return [by_task[i] for i in sorted(by_task)]


def training_style(runs: Runs) -> PromptStyle:
    """How modifiers are trained and asked: the first style, without worked examples."""
    return runs.config.student.prompts[0].model_copy(update={"shots": 0})


def base_style(runs: Runs) -> PromptStyle:
    """The style that `test_domain` found to suit the base best."""
    name = runs.test_domain.require().metrics["style"]
    return next(s for s in runs.config.student.prompts if s.name == name)


def by_id(tasks: Sequence[Task]) -> dict[str, Task]:
    return {t.id: t for t in tasks}


def local_copy(store: Store, path: str) -> Path:
    """See `Store.local_copy`: in a folder of this user's, whose content no one else can put there."""
    return store.local_copy(path, cache_dir() / "results")


def read_adapter(store: Store, path: str) -> AdapterWeights | CompressedAdapter:
    """An adapter from the store: a PEFT folder, or a compressed modifier file."""
    local = local_copy(store, path)
    return load_peft_folder(local) if local.is_dir() else load_modifier(local)
