"""The exported data set: loadable, counted right, and checked by scoring every answer anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from cascade.dataset import CARD, PARQUET, DatasetRow, Provenance, check_dataset, dataset_rows, write_dataset
from cascade.errors import DataError
from cascade.store import Store
from cascade.tasks import Example, Message, Task, Verdict

ABOUT = Provenance(
    domain="sums",
    base="tiny",
    teachers=[
        {
            "tier": n,
            "name": f"answer-key-{n}",
            "answer_key": True,
            "input": 1.0,
            "output": 2.0,
            "price_source": "",
            "endpoints": ["answer-key"],
        }
        for n in (1, 2, 3)
    ],
    statement="answer-key-1 (tier 1): no language model, but a server that replays the tasks' own answer key.",
    protected={"domain": 30, "mbpp": 500},
    not_protected={"livecodebench": "not in the cache"},
    left_out={"overlapping a test task": 2},
    runs={"test_domain": "test_domain@abc"},
    cascade={"failures": 8, "cost_usd": 0.5, "single_usd": 2.0, "saving": 0.75},
)


def task(number: int) -> Task:
    reference = {"kind": "exact", "answers": [2 * number]}
    return Task(f"jsonl/x/{number}", "jsonl", "sums", "train", (Message("user", f"{number} + {number}?"),), reference)


def example(number: int, **changes: object) -> Example:
    passed = Verdict(f"jsonl/x/{number}", "answer-key-1", "", "pass")
    made = Example.from_answer(
        task(number), str(2 * number), passed, teacher="answer-key-1", tier=1, cost_usd=0.01, prompt_hash="h"
    )
    return replace(made, **changes)


def rows(*examples: Example) -> list[DatasetRow]:
    tasks = {t.id: t for t in map(task, range(20))}
    return dataset_rows(examples, tasks, {"jsonl/x/1": 0}, ["sums | small"], frozenset({"answer-key-1"}))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    given = [example(1), example(2, tier=2, repairs=1), example(3, judge="judge-model"), example(4, tier=0)]
    write_dataset(Store(str(tmp_path)), "set", rows(*given), ABOUT)
    return tmp_path / "set"


def test_the_rows_hold_everything_that_a_check_needs(written: Path) -> None:
    found = pq.read_table(written / PARQUET).to_pylist()
    first = found[0]
    assert first["messages"] == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert (first["kind"], first["kind_label"], found[1]["kind"]) == (0, "sums | small", -1)
    assert json.loads(first["reference"]) == {"kind": "exact", "answers": [2]}
    assert (first["verified_by"], found[2]["verified_by"], found[2]["judge"]) == ("scorer", "judge", "judge-model")
    assert first["answer_key"]
    assert first["prompt_hash"] == "h"


def test_the_card_is_one_that_the_hub_reads(written: Path) -> None:
    card = DatasetCard.load(written / CARD, ignore_metadata_errors=False)
    front = card.data.to_dict()
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": PARQUET}]}]
    assert front["size_categories"] == ["n<1K"]
    assert "answer-key" in front["tags"]
    assert front["cascade"]["counts"]["tier"] == {"0": 1, "1": 2, "2": 1}


def test_the_card_says_what_a_sceptic_asks(written: Path) -> None:
    text = (written / CARD).read_text()
    for said in (
        "replays the tasks' own answer key",
        "1 rows rest on a judge model's opinion",
        "| sums \\| small | 1 |",
        "mbpp: 500 test tasks",
        "livecodebench: not in the cache",
        "overlapping a test task: 2",
        "saving 75.0 %",
        "`test_domain@abc`",
    ):
        assert said in text, said
    assert "No row rests" not in text


def test_a_sound_set_passes_its_check(written: Path) -> None:
    found = check_dataset(written)
    assert (found.rows, found.rescored, found.opinions, found.problems) == (4, 3, 1, [])


def test_a_wrong_answer_a_changed_file_and_a_repeated_row_are_found(tmp_path: Path) -> None:
    wrong = replace(example(5), messages=(Message("user", "5 + 5?"), Message("assistant", "11")))
    write_dataset(Store(str(tmp_path)), "bad", rows(example(1), wrong, example(1, tier=2)), ABOUT)
    problems = "\n".join(check_dataset(tmp_path / "bad").problems)
    assert "jsonl/x/5: fail" in problems
    assert "1 rows hold the same conversation" in problems
    write_dataset(Store(str(tmp_path)), "good", rows(example(1), example(2)), ABOUT)
    (tmp_path / "bad" / PARQUET).write_bytes((tmp_path / "good" / PARQUET).read_bytes())
    problems = "\n".join(check_dataset(tmp_path / "bad").problems)
    assert "SHA-256" in problems
    assert "counts" in problems


def test_nothing_to_export_and_no_data_set_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no verified example"):
        write_dataset(Store(str(tmp_path)), "set", [], ABOUT)
    with pytest.raises(DataError, match="holds no data set"):
        check_dataset(tmp_path)


@pytest.mark.parametrize("card", [b"---\ncascade: {rows: 4}\n---\n", b"---\n- 1\n---\n", b"\xff\xfe---\n"])
def test_a_damaged_card_is_said(written: Path, card: bytes) -> None:
    (written / CARD).write_bytes(card)
    with pytest.raises(DataError, match="holds no data set"):
        check_dataset(written)


def test_hugging_face_datasets_loads_it(written: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(written), split="train", cache_dir=str(written.parent / "cache"))
    assert loaded[1]["messages"][-1] == {"role": "assistant", "content": "4"}
    assert len(loaded) == 4
