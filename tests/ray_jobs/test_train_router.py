"""What the router is trained on."""

from __future__ import annotations

import json
from pathlib import Path

from stand_in import SYSTEM, build_stand_in, compressed_adapter

from cascade import modifiers
from cascade.benchmarks import get
from cascade.models.files import base_sha256
from cascade.tasks import Task, from_table, to_table
from ray_jobs.train_router import assignments_as_served, distinct_tasks


def test_every_modifier_is_asked_under_its_own_system_message(tmp_path: Path) -> None:
    stand_in = build_stand_in(tmp_path)
    fits = base_sha256(stand_in.config.base)
    other = compressed_adapter(tmp_path / "base", seed=9)
    modifiers.publish(stand_in.store, "other", other, fp16_size=10_000, system="Be exact.")
    found = assignments_as_served(stand_in.store, fits, [])
    assert {a.name: a.style.system for a in found} == {
        "base": None,
        "letters": SYSTEM,
        "other": "Be exact.",
        "sums": None,
    }
    assert [a.name for a in assignments_as_served(stand_in.store, "0" * 64, [])] == ["base"]


def validation_tasks(folder: Path, domain: str, answers: list[str]) -> list[Task]:
    """A domain's validation.jsonl, whose lines are 1 to n."""
    lines = [{"id": i, "kind": "exact", "prompt": "Which?", "answer": a} for i, a in enumerate(answers, 1)]
    (folder / domain).mkdir()
    (folder / domain / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"path": str(folder / domain)}
    return get("jsonl").load("validation", domain=domain, options=options, seed=0, count=None)


def test_a_task_of_another_domain_is_not_taken_for_one_of_the_same_id(tmp_path: Path) -> None:
    own = validation_tasks(tmp_path, "here", ["a", "b", "c"])
    stored = [validation_tasks(tmp_path, domain, answers) for domain, answers in (("b", "axy"), ("c", "zxc"))]
    others = [t for tasks in stored for t in from_table(Task, to_table(Task, tasks))]
    found = distinct_tasks(own, others)
    assert found[:3] == own
    assert len({t.id for t in found}) == len(found)
    assert sorted(t.reference["answers"][0] for t in found) == ["a", "b", "c", "x", "y", "z"]


def test_an_id_tells_what_the_task_holds(tmp_path: Path) -> None:
    before, after = (validation_tasks(tmp_path, domain, [domain]) for domain in ("b", "c"))
    assert before[0].id == after[0].id
    assert distinct_tasks([], before)[0].id != distinct_tasks([], after)[0].id
    assert distinct_tasks([], before) == distinct_tasks([], before)
