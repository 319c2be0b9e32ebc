"""Kinds of failed tasks: found again where they were planted, named, and kept from taking the training set over."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cascade.clusters import cap, cluster, name_kinds
from cascade.config import Clusters
from cascade.tasks import Example, Message, Task


def planted(sizes: tuple[int, ...], dimensions: int = 40) -> tuple[np.ndarray, list[int]]:
    """Points around far-apart centres that share a large common part, as hidden states do."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(len(sizes), dimensions)) * 3 + 100
    labels = [n for n, size in enumerate(sizes) for _ in range(size)]
    return np.array([centres[n] + rng.normal(size=dimensions) for n in labels], dtype=np.float32), labels


def task(number: int, prompt: str, category: str = "") -> Task:
    return Task(f"t/{number}", "jsonl", "d", "train", (Message("user", prompt),), {}, category=category)


def example(number: int) -> Example:
    messages = (Message("user", f"q{number}"), Message("assistant", "a"))
    return Example(f"t/{number}", "jsonl", "d", "", 1, messages, "teacher", 1)


@pytest.mark.parametrize("settings", [Clusters(), Clusters(count=3)])
def test_planted_kinds_are_found_largest_first(settings: Clusters) -> None:
    vectors, truth = planted((30, 60, 45))
    found = cluster(vectors, settings, seed=3)
    assert found == cluster(vectors, settings, seed=3)
    assert sorted(Counter(zip(found, truth, strict=True)).items()) == [((0, 1), 60), ((1, 2), 45), ((2, 0), 30)]


def test_few_or_equal_tasks_are_one_kind() -> None:
    assert cluster(planted((5, 5))[0], Clusters(), 1) == [0] * 10
    assert cluster(np.zeros((0, 8), np.float32), Clusters(), 1) == []
    assert set(cluster(np.ones((40, 8), np.float32), Clusters(), 1)) == {0}


def test_a_kind_is_named_by_its_category_and_what_sets_it_apart() -> None:
    sums = [task(i, f"Add the numbers {i} and 7.", "sums") for i in range(9)]
    sums.append(task(9, "Add the apples.", "stories"))
    words = [task(10 + i, "Reverse the order of these letters.", "words") for i in range(4)]
    kinds = name_kinds([*sums, *words], [0] * 10 + [1] * 4)
    assert [k.number for k in kinds] == [0, 1]
    assert kinds[0].label.startswith("90% sums: ")
    assert "add" in kinds[0].label
    assert kinds[1].label.startswith("words: ")
    assert "reverse" in kinds[1].label
    assert name_kinds([task(1, "1+1", "x")], [0])[0].label == "x"


def test_no_kind_has_more_than_the_cap_and_replayed_answers_stay() -> None:
    kind = {f"t/{i}": int(i >= 20) for i in range(25)}
    examples = [example(i) for i in range(30)]  # 25 to 29 belong to no kind
    kept = cap(examples, kind, 6, seed=1)
    counts = Counter(kind.get(e.task_id, "none") for e in kept)
    assert counts == {0: 6, 1: 5, "none": 5}
    assert kept == [e for e in examples if e in kept], "their order changed"
    assert kept == cap(examples, kind, 6, seed=1)
    assert kept != cap(examples, kind, 6, seed=2)
    assert cap(examples, kind, 100, seed=1) == examples
