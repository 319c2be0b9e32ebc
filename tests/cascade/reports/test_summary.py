"""summary.json: the figures by their names, derived from verdicts and tiers, and honest about the teachers."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from pydantic import ValidationError
from rich.console import Console
from scipy.stats import binomtest

from cascade.errors import DataError
from cascade.reports.console import duration, megabytes, p_value, print_summary
from cascade.reports.summary import Summary, TierRow, read_summary, teacher_statement, write_summary
from cascade.tasks import Verdict


def verdicts(outcomes, modifier=""):
    names = {"p": "pass", "f": "fail", "u": "unparsed", "e": "error"}
    return [Verdict(f"t{i}", "base", modifier, names[o]) for i, o in enumerate(outcomes)]


TIERS = [
    TierRow(1, "answer-key-small", True, 100, 70, 35, 110, 5000, 500, 0.05),
    TierRow(2, "answer-key-medium", True, 35, 20, 15, 35, 2000, 200, 0.20),
    TierRow(3, "answer-key-large", True, 15, 12, 3, 16, 900, 90, 0.75),
]


def summarise(**changes):
    given = {
        "domain": "reasoning",
        "base_model": "tiny",
        "base": verdicts("pfuuffffff"),
        "modifier": verdicts("ppppppffff", "v1"),
        "compressed": verdicts("fppppppfff", "v1"),
        "tiers": TIERS,
        "examples": 102,
        "cost_single_teacher_usd": 4.0,
        "adapter_bytes": 260_000_000,
        "compressed_bytes": 48_000_000,
        "wall_seconds": 900.0,
        "peak_rss_bytes": 2**32,
    }
    return Summary.of(**(given | changes))


def test_figures_are_counted_and_derived():
    s = summarise()
    assert (s.n, s.base_accuracy, s.modifier_accuracy, s.compressed_accuracy) == (10, 0.1, 0.6, 0.6)
    assert s.scores["base"].unparsed == 2
    assert s.scores["base"].low < 0.1 < s.scores["base"].high
    assert s.scores["base"].parsed_accuracy == pytest.approx(1 / 8)
    assert s.gain == pytest.approx(0.5)
    assert s.gain_interval[0] < 0.5 < s.gain_interval[1]
    assert s.compression_loss == 0
    assert s.mcnemar_p == pytest.approx(binomtest(1, 7).pvalue)
    assert s.ratio == pytest.approx(48 / 260)
    assert s.cost_usd == pytest.approx(1.0)
    assert s.saving == pytest.approx(0.75)


def test_shares_and_what_nobody_solved_add_up_to_all_failures():
    s = summarise()
    assert s.tier_shares == pytest.approx({"1": 0.65, "2": 0.20, "3": 0.12})
    assert s.unsolved_share == pytest.approx(0.03)
    assert sum(s.tier_shares.values()) + s.unsolved_share == pytest.approx(1.0)
    assert s.failures == 100


def test_summary_json_has_the_figures_by_name(tmp_path):
    s = summarise()
    write_summary(s, tmp_path / "deep/summary.json")
    stored = json.loads((tmp_path / "deep/summary.json").read_text())
    expected = {
        "wall_seconds": float,
        "peak_rss_bytes": int,
        "base_accuracy": float,
        "modifier_accuracy": float,
        "compressed_accuracy": float,
        "n": int,
        "mcnemar_p": float,
        "adapter_bytes": int,
        "compressed_bytes": int,
        "ratio": float,
        "cost_usd": float,
        "cost_single_teacher_usd": float,
        "saving": float,
        "tier_shares": dict,
    }
    assert {name: type(stored[name]) for name in expected} == expected
    assert set(stored["scores"]) == {"base", "modifier", "compressed"}
    assert {"n", "low", "high", "unparsed"} <= set(stored["scores"]["base"])
    assert read_summary(tmp_path / "deep/summary.json") == s


def test_a_summary_of_unknown_figures_is_refused(tmp_path):
    stored = json.loads(summarise().model_dump_json()) | {"accuracy": 1.0}
    (tmp_path / "summary.json").write_text(json.dumps(stored))
    with pytest.raises(ValidationError, match="accuracy"):
        read_summary(tmp_path / "summary.json")


@pytest.mark.parametrize(
    ("compressed", "message"),
    [
        (verdicts("pppp"), "not judged on the same test tasks: 6 differ"),
        (verdicts("p" * 10) + verdicts("p"), "11 verdicts on 10 tasks"),
    ],
)
def test_models_judged_on_different_tasks_are_not_compared(compressed, message):
    with pytest.raises(DataError, match=message):
        summarise(compressed=compressed)


def test_without_verdicts_there_is_nothing_to_compare():
    with pytest.raises(DataError, match="no verdicts"):
        summarise(base=[], modifier=[], compressed=[])


def test_a_single_teacher_that_is_free_saves_nothing():
    assert summarise(cost_single_teacher_usd=0.0).saving == 0.0
    assert summarise(tiers=[]).tier_shares == {}


def test_an_answer_key_is_called_what_it_is():
    real = [dataclasses.replace(t, teacher=f"gpt-{t.tier}", answer_key=False) for t in TIERS]
    assert "answer key" not in teacher_statement(real)
    assert "gpt-1 (tier 1), gpt-2 (tier 2), gpt-3 (tier 3)" in teacher_statement(real)
    mixed = teacher_statement([TIERS[0], *real[1:]])
    assert mixed.startswith("answer-key-small (tier 1): no language model")
    assert "replays the tasks' own answer key" in mixed
    assert "gpt-2 (tier 2), gpt-3 (tier 3)" in mixed
    assert summarise().teacher_statement == teacher_statement(TIERS)


def printed(summary):
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=120))
    return text.getvalue()


def test_the_printed_table_has_every_headline_figure():
    text = printed(summarise(max_ratio=48 / 260))
    for expected in ("10.0%", "60.0%", "+50.0 points", "p = 0.125", "48.0 MB of 260.0 MB", "18.5% (limit 18.5%)"):
        assert expected in text
    for expected in ("65.0% / 20.0% / 12.0% of 100, 3.0% unsolved", "75.0% saved", "15 min 0 s", "4.00 GiB"):
        assert expected in text
    assert "replays the tasks' own answer key" in " ".join(text.replace("│", " ").split())


def test_real_teachers_get_no_note_about_answer_keys():
    real = [dataclasses.replace(t, teacher="gpt", answer_key=False) for t in TIERS]
    assert "About the teachers" not in printed(summarise(tiers=real))


def test_small_p_values_are_never_printed_as_zero():
    assert "e-" in printed(
        summarise(base=verdicts("f" * 300), modifier=verdicts("p" * 300), compressed=verdicts("p" * 300))
    )


def test_a_p_value_too_small_for_a_number_is_not_printed_as_zero():
    gained = verdicts("p" * 1200)
    summary = summarise(base=verdicts("f" * 1200), modifier=gained, compressed=gained)
    assert p_value(summary) == "p < 1e-300"


def test_sizes_and_times_in_words():
    assert [megabytes(n) for n in (3_410_000, 48_000_000)] == ["3.41 MB", "48.0 MB"]
    assert [duration(s) for s in (5, 65, 3725)] == ["5 s", "1 min 5 s", "1 h 2 min"]
