"""Mixing by weight, and the rule that splits share no prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cascade.benchmarks.mixture import load_tasks
from cascade.benchmarks.normalise import normalise
from cascade.benchmarks.protected import protected_tasks
from cascade.config import Config, check_config
from cascade.errors import ConfigError, DataError


def task_file(folder: Path, name: str, prompts: list[str]) -> str:
    path = folder / f"{name}.jsonl"
    rows = [{"id": f"{name}-{i}", "kind": "exact", "prompt": p, "answer": "1"} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(**splits: Any) -> Config:
    endpoint = {"base_url": "answer-key"}
    tier = {"name": "answer-key-1", "endpoints": [endpoint], "input_usd_per_million": 1, "output_usd_per_million": 1}
    tier |= {"answer_key": {"max_difficulty": 3}}
    return check_config(
        {"domain": "own", "base": {"model": "x"}, "tasks": splits, "tiers": [tier] * 3, "budget_usd": 1, "seed": 3}
    )


def source(path: str, weight: float = 1.0) -> dict[str, Any]:
    return {"benchmark": "jsonl", "weight": weight, "options": {"path": path}}


def split(*sources: dict[str, Any], count: int | None = None) -> dict[str, Any]:
    return {"count": count, "sources": list(sources)}


def test_prompts_of_later_splits_leave_the_earlier_ones(tmp_path: Path) -> None:
    train = task_file(tmp_path, "train", [f"question {i}" for i in range(20)])
    validation = task_file(tmp_path, "validation", ["Question  3", "question 30", "QUESTION 40"])
    test = task_file(tmp_path, "test", ["question 5", "question 40", "question 41"])
    c = config(train=split(source(train)), validation=split(source(validation)), test=split(source(test)))
    prompts = {s: {normalise(t.prompt) for t in load_tasks(c, s)} for s in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert prompts["test"] == {"question 5", "question 40", "question 41"}
    assert prompts["validation"] == {"question 3", "question 30"}
    assert prompts["train"] == {f"question {i}" for i in range(20)} - {"question 3", "question 5"}


@pytest.mark.parametrize("key", ["train.sources.1", "general.sources.0", "protect.0"])
def test_a_path_without_files_is_named_by_its_key_before_anything_is_loaded(tmp_path: Path, key: str) -> None:
    broken = tmp_path / "first.jsonl"
    broken.write_text("this would be the error, were it read first")
    parts: dict[str, Any] = {part: split(source(str(broken))) for part in ("train", "validation", "test", "general")}
    parts["train"]["sources"] += [source(str(broken))]
    parts["protect"] = [source(str(broken))]
    part, number = key.split(".")[0], int(key.split(".")[-1])
    found = parts[part] if part == "protect" else parts[part]["sources"]
    found[number] = source(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ConfigError, match=rf"^tasks\.{key}\.options\.path: .*nothing\.jsonl is no data file"):
        load_tasks(config(**parts), "train")
    with pytest.raises(DataError, match=r"first\.jsonl, line 1 is not valid JSON"):
        load_tasks(config(**parts), "test")


def test_general_tasks_are_test_tasks_that_nothing_is_learned_or_chosen_from(tmp_path: Path) -> None:
    train = task_file(tmp_path, "train", [f"question {i}" for i in range(6)])
    validation = task_file(tmp_path, "validation", ["question 7", "question 8"])
    test = task_file(tmp_path, "test", ["question 5", "question 1"])
    general = task_file(tmp_path, "general", ["Question 0", "question 1", "question 8"])
    parts = {"train": train, "validation": validation, "test": test, "general": general}
    c = config(**{name: split(source(path)) for name, path in parts.items()})
    prompts = {part: [normalise(t.prompt) for t in load_tasks(c, part)] for part in parts}  # type: ignore[arg-type]
    assert sorted(prompts["general"]) == ["question 0", "question 1", "question 8"], "whole, whatever the others hold"
    assert sorted(prompts["test"]) == ["question 1", "question 5"]
    assert prompts["validation"] == ["question 7"]
    assert sorted(prompts["train"]) == ["question 2", "question 3", "question 4"]
    assert {t.split for t in load_tasks(c, "general")} == {"test"}
    assert {t.id for t in load_tasks(c, "general")} <= {t.id for t in protected_tasks(c).tasks}
    without = config(**{name: split(source(path)) for name, path in parts.items() if name != "general"})
    assert load_tasks(without, "general") == []


def test_weights_fill_up_and_repeats_go(tmp_path: Path) -> None:
    many = task_file(tmp_path, "many", [f"many {i}" for i in range(200)])
    few = task_file(tmp_path, "few", [f"few {i}" for i in range(10)] + ["few 1"] * 30)
    other = split(source(task_file(tmp_path, "other", ["other"])))
    c = config(train=split(source(many, 1), source(few, 3), count=60), validation=other, test=other)
    with pytest.raises(DataError, match="no task"):  # the validation task is a test task as well
        load_tasks(c, "train")
    other_test = split(source(task_file(tmp_path, "other-test", ["other test"])))
    c = config(train=split(source(many, 1), source(few, 3), count=60), validation=other, test=other_test)
    tasks = load_tasks(c, "train")
    assert Counter(t.prompt.split()[0] for t in tasks) == {"many": 50, "few": 10}
    assert Counter(t.prompt.split()[0] for t in tasks[:12]) == {"many": 3, "few": 9}
    assert load_tasks(c, "train") == tasks
    too_many = c.model_copy(
        update={"tasks": c.tasks.model_copy(update={"train": c.tasks.train.model_copy(update={"count": 500})})}
    )
    with pytest.raises(DataError, match="asks for 500 tasks, but its sources have 210"):
        load_tasks(too_many, "train")


def test_generated_sources_give_what_a_dropped_task_leaves_open(tmp_path: Path) -> None:
    gym = {"benchmark": "reasoning_gym", "options": {"generators": [{"name": "lcm", "options": {"max_value": 10}}]}}
    own = split(source(task_file(tmp_path, "own", ["x"])))
    c = config(train=split(gym, count=30), validation=own, test=split(gym, count=10))
    assert (
        len(
            {normalise(t.prompt) for t in load_tasks(c, "train")} | {normalise(t.prompt) for t in load_tasks(c, "test")}
        )
        == 40
    )


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    same = task_file(tmp_path, "same", ["a", "b"])
    one = split(source(task_file(tmp_path, "one", ["c"])))
    two = split(source(task_file(tmp_path, "two", ["d"])))
    with pytest.raises(DataError, match="two tasks have the id"):
        load_tasks(config(train=one, validation=two, test=split(source(same), source(same))), "test")


def chat_file(folder: Path, name: str, records: list[str], question: str = "What is the total?") -> str:
    """Chats that differ only in the record before the question."""
    path = folder / f"{name}.jsonl"
    chats = [[{"role": "system", "content": r}, {"role": "user", "content": question}] for r in records]
    rows = [{"id": f"{name}-{i}", "kind": "exact", "messages": m, "answer": "1"} for i, m in enumerate(chats)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_chats_that_share_their_last_message_are_compared_whole(tmp_path: Path) -> None:
    train = chat_file(tmp_path, "train", [f"record {i}" for i in range(20)])
    other = split(source(chat_file(tmp_path, "other", ["record 50", "record 51"])))
    for name, tested, left in (("some", ["Record  3", "record 40", "record 5"], 18), ("one", ["record 40"], 20)):
        c = config(train=split(source(train)), validation=other, test=split(source(chat_file(tmp_path, name, tested))))
        asked = {t.messages[0].content for t in load_tasks(c, "train")}
        assert len(asked) == left
        assert not asked & {r.lower().replace("  ", " ") for r in tested}
    word = task_file(tmp_path, "word", ["another question"])
    bare = split(source(task_file(tmp_path, "bare", ["what is the total?"])))
    c = config(train=split(source(train)), validation=split(source(word)), test=bare)
    with pytest.raises(DataError, match=r"no task left: jsonl has 20, of which 20 ask what .*tasks\.test asks and 0 "):
        load_tasks(c, "train")


def test_a_question_that_tells_is_the_same_after_another_system_message(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path, system in ((train, "Be brief."), (test, "Be kind.")):
        chats = [
            [{"role": "system", "content": system}, {"role": "user", "content": f"question {i}"}] for i in range(9)
        ]
        rows = [{"id": i, "kind": "exact", "messages": m, "answer": "1"} for i, m in enumerate(chats)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = split(source(task_file(tmp_path, "other", ["other"])))
    c = config(train=split(source(str(train))), validation=other, test=split(source(str(test))))
    with pytest.raises(DataError, match="has 9, of which 9 ask what"):
        load_tasks(c, "train")
