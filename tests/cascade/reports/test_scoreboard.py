"""The table of benchmarks on a tiny base: what loads, what does not, and figures that can be recomputed."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from cascade.benchmarks.bfcl import CATEGORIES
from cascade.models.student import Student
from cascade.reports import scoreboard_rows
from cascade.reports.scoreboard import run
from cascade.reports.scoreboard_rows import ENTRIES, Entry, Result, _pass_at, measure
from cascade.scoring.sandbox import SandboxError
from cascade.scoring.statistics import Score, wilson
from cascade.tasks import Completion, Verdict, from_table


@pytest.fixture
def data(tmp_path):
    """Four multiple-choice questions in ARC's original form."""
    questions = [
        {
            "id": f"Q{i}",
            "question": {
                "stem": f"Which letter comes {i} after a?",
                "choices": [{"label": x, "text": t} for x, t in zip("ABCD", ("b", "c", "d", "e"), strict=True)],
            },
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(4)
    ]
    folder = tmp_path / "data" / "arc"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(q) + "\n" for q in questions)
    (folder / "ARC-Challenge-Test.jsonl").write_text(lines)
    return folder.parent


ARC = next(e for e in ENTRIES if e.benchmark == "arc")


def test_a_row_is_what_its_verdicts_say(loaded, data, tmp_path):
    result = measure(Student(loaded), ARC, data, 3, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "arc-challenge-0-shots" / "verdicts.parquet")
    verdicts = from_table(Verdict, table)
    assert result.score == Score.of(verdicts)
    assert result.score.n == 3
    assert sum(s.n for s in result.by_category.values()) == sum(s.n for s in result.by_difficulty.values()) == 3
    assert result.cells()[1:4] == ["yes", "files", "3"]
    assert result.seconds > 0


def test_what_cannot_be_loaded_says_why(loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = Entry("Nowhere", "jsonl", "hub", {"path": str(tmp_path / "missing.jsonl")})
    result = measure(Student(loaded), missing, None, 3, None)
    assert result.score is None
    assert result.cells()[1].startswith("no: ")
    assert "missing.jsonl" in result.cells()[1]


def test_the_command_writes_table_and_figures(tiny_folder, data, tmp_path):
    app = typer.Typer()
    app.command()(run)
    out = tmp_path / "out"
    options = ["--base", str(tiny_folder), "--data", str(data), "--only", "arc", "--limit", "2", "--out", str(out)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    table = (out / "benchmarks.md").read_text()
    assert "| ARC-Challenge, 0 shots | yes | files | 2 |" in table
    assert "at most 2 tasks each" in table
    figures = json.loads((out / "benchmarks.json").read_text())["rows"][ARC.title]
    assert figures["score"]["n"] == 2
    assert sum(s["n"] for s in figures["by_difficulty"].values()) == 2


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--dtype", "float16"], "'auto', 'float32', 'bfloat16'"),
        (["--data", "nowhere"], "--data nowhere is no folder"),
        (["--only", "gsm8k"], "--only gsm8k: no row is called so; benchmarks are humaneval, mbpp"),
    ],
)
def test_what_the_command_cannot_do_is_said_before_a_base_is_loaded(option, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(run)
    done = CliRunner().invoke(app, ["--base", "no/base", *option])
    assert done.exit_code
    assert said in done.output + str(done.exception)


def test_every_entry_names_a_benchmark_and_a_title_of_its_own():
    assert len({e.title for e in ENTRIES}) == len(ENTRIES)
    assert all(scoreboard_rows.benchmarks.get(e.benchmark).name == e.benchmark for e in ENTRIES)


def test_pass_at_k_and_errors_are_shown_with_what_they_are_uncertain_by() -> None:
    verdicts = [Verdict(f"t{i}", "m", "", "pass" if n < i else "fail") for i in range(10) for n in range(10)]
    verdicts[0] = Verdict("t0", "m", "", "error")
    result = Result(ENTRIES[0], "wheel", "", Score.of(verdicts), pass_at=_pass_at(verdicts, 10))
    cells = dict(zip(scoreboard_rows.HEADINGS, result.cells(), strict=True))
    assert cells["errors"] == "1"
    assert re.search(
        r"pass@5 [\d.]+% \[[\d.]+%, [\d.]+%\]; pass@10 90.0% \[[\d.]+%, 100.0%\]", cells["score of the base [95 %]"]
    )


def test_where_code_cannot_be_confined_its_rows_say_so_before_anything_is_answered(loaded, data, monkeypatch) -> None:
    def no_walls():
        raise SandboxError("code of a model cannot be confined here: no seccomp")

    monkeypatch.setattr(scoreboard_rows, "require_walls", no_walls)
    monkeypatch.setattr(Student, "judged", lambda *_: pytest.fail("asked the model"))
    file = data / "mbpp.jsonl"
    file.write_text(json.dumps({"task_id": 11, "text": "t", "code": "def f(): pass", "test_list": ["assert f()"] * 3}))
    mbpp = next(e for e in ENTRIES if e.benchmark == "mbpp")
    assert (
        measure(Student(loaded), mbpp, data, 3, None).cells()[1]
        == "no: code of a model cannot be confined here: no seccomp"
    )
    monkeypatch.undo()
    assert measure(Student(loaded), ARC, data, 3, None).score is not None


def test_rows_and_means_of_bfcl() -> None:
    names = [e.title.removeprefix("BFCL ") for e in ENTRIES if e.benchmark == "bfcl"]
    assert set(names) == set(CATEGORIES)
    passed = {
        "simple_python": (400, 400),
        "simple_java": (0, 100),
        "simple_javascript": (25, 50),
        "live_simple": (0, 258),
    }
    passed |= {"live_multiple": (1053, 1053), "live_parallel": (0, 16), "live_parallel_multiple": (0, 24)}

    def result(name: str) -> Result:
        good, n = passed.get(name, (0, 10))
        verdicts = [Verdict(str(i), "m", "", "pass" if i < good else "fail") for i in range(n)]
        return Result(next(e for e in ENTRIES if e.title == f"BFCL {name}"), "wheel", "", Score.of(verdicts))

    means = scoreboard_rows.bfcl_summaries([result(name) for name in names])
    assert means["BFCL simple, mean over languages"][:2] == (550, pytest.approx(0.5))
    assert means["BFCL non-live AST, mean of simple and three"][1] == pytest.approx(0.125)
    assert means["BFCL live, weighted by size"][:2] == (1351, pytest.approx(1053 / 1351))
    assert all(i.low < mean < i.high for _, mean, i in means.values())
    assert list(scoreboard_rows.bfcl_summaries([result(n) for n in names if n != "simple_java"])) == [
        "BFCL live, weighted by size"
    ]
    table = scoreboard_rows.as_markdown([result(name) for name in names])
    assert table.splitlines()[0].startswith("| benchmark | loads here | source | n |")
    assert "| BFCL simple, mean over languages |  | rows above | 550 | 50.0% [" in table


def test_several_answers_to_a_task_count_as_one_task(loaded, monkeypatch, tmp_path):
    """Draws differ by seed; tasks, not answers, are what the interval counts; pass@k is the unbiased estimate."""
    outcomes = iter(["pass", "fail", "fail", "pass", "fail", "fail"])  # task by task within each of three draws
    drawn = []

    def judged(student, tasks, style):
        drawn.append((student.temperature, student.top_p, student.seed))
        completions = [Completion(t.id, "m", "", text="x") for t in tasks]
        return completions, [Verdict(t.id, "m", "", next(outcomes), "", "") for t in tasks]

    monkeypatch.setattr(Student, "judged", judged)
    entry = Entry("Sums", "reasoning_gym", "package", {"generators": [{"name": "gcd"}]}, sampled=2, answers=3)
    result = measure(Student(loaded, seed=5), entry, None, None, tmp_path)
    assert drawn == [(0.2, 0.95, 5), (0.2, 0.95, 6), (0.2, 0.95, 7)]
    assert result.score.n == 2
    assert result.score.passed == pytest.approx(1 / 3 + 1 / 3)
    assert result.score.accuracy == pytest.approx(1 / 3)
    assert result.score.low == wilson(2 / 3, 2).low
    value, interval = result.pass_at[1]
    assert (value, list(result.pass_at)) == (pytest.approx(1 / 3), [1])
    assert (interval.low, interval.high) == pytest.approx((wilson(2 / 3, 2).low, wilson(2 / 3, 2).high)), "not certain"
    assert "mean of 3 answers" in result.cells()[0]
    assert pq.read_table(tmp_path / "sums" / "completions.parquet").num_rows == 6
