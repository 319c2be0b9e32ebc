"""The table of benchmarks on a tiny base: what loads, what does not, and figures that can be recomputed."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cascade.models.student import Student
from cascade.reports import scoreboard
from cascade.reports.scoreboard import ENTRIES, Entry, measure
from cascade.scoring.statistics import Score
from cascade.tasks import Verdict, from_table


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
    app = scoreboard.typer.Typer()
    app.command()(scoreboard.run)
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


def test_every_entry_names_a_benchmark_and_a_title_of_its_own():
    assert len({e.title for e in ENTRIES}) == len(ENTRIES)
    assert all(scoreboard.benchmarks.get(e.benchmark).name == e.benchmark for e in ENTRIES)
