"""The report page: self-contained, safe, and every number of it recomputed from the Parquet beside it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from cascade.errors import DataError
from cascade.reports import figures
from cascade.reports.console import points
from cascade.reports.data import ReportData, TrialRow, front_of, general_rows, load_tables
from cascade.reports.heat_map import heat_map
from cascade.reports.html import render, write_report
from cascade.reports.summary import TierRow
from cascade.scoring.statistics import wilson
from cascade.tasks import Message, Task, Verdict
from cascade.teachers.economics import saving_interval

MODELS = ("base", "modifier", "compressed")


class Page(HTMLParser):
    """Texts of the elements that carry data-figure, and all tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.figures, self.tags, self._open = {}, [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "data-figure" in attributes:
            self._open.append((tag, attributes["data-figure"]))
            self.figures[attributes["data-figure"]] = ""
        elif self._open and tag == "small":
            self._open.append((tag, None))

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1][1]:
            self.figures[self._open[-1][1]] += data.strip()


PICTURES = ("accuracy", "tier_flow", "cost", "kinds", "training_curves", "pareto", "reliability")
DRAWN = {}


@pytest.fixture(autouse=True)
def _drawn_once(monkeypatch):
    """Pictures of the same data are drawn once for all variations of a page: drawing takes most of its time."""

    def once(draw):
        def drawn(*arguments):
            key = (draw.__name__, repr(arguments))
            if key not in DRAWN:
                DRAWN[key] = draw(*arguments)
            return DRAWN[key]

        return drawn

    for name in PICTURES:
        monkeypatch.setattr(figures, name, once(getattr(figures, name)))
    monkeypatch.setattr("cascade.reports.html.heat_map", once(heat_map))


@pytest.fixture(scope="module")
def report(report_data, tmp_path_factory):
    return write_report(report_data, tmp_path_factory.mktemp("run") / "report.html")


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def tables(report):
    folder = report.with_name("report.tables")
    return {path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


NAMED = ("training/", "tier_shares/", "policy/", "reference/", "kind/", "shortcut/", "stage/", "general/")
"""Beginnings of figures' names that have tests of their own."""


def percent(x):
    return f"{x:.1%}"


def from_verdicts(rows):
    """Figures recomputed from the verdict and task tables, with nothing of the report's own code."""
    task = {t["id"]: t for t in rows["tasks"]}
    found, passed = {}, {}
    for model in MODELS:
        verdicts = rows[f"verdicts-{model}"]
        passed[model] = {v["task_id"]: v["outcome"] == "pass" for v in verdicts}
        found[f"accuracy/{model}"] = percent(sum(passed[model].values()) / len(verdicts))
        outcomes = Counter(v["outcome"] for v in verdicts)
        readable = len(verdicts) - outcomes["unparsed"] - outcomes["error"]
        found[f"parsed/{model}"] = percent(outcomes["pass"] / readable)
        for outcome in ("pass", "fail", "unparsed", "timeout", "error"):
            found[f"outcome/{outcome}/{model}"] = str(outcomes[outcome])
        for key in ("category", "difficulty"):
            groups = {}
            for v in verdicts:
                groups.setdefault(task[v["task_id"]][key], []).append(v["outcome"] == "pass")
            for name, results in groups.items():
                found[f"{key}/{name}/{model}"] = percent(sum(results) / len(results))
    found["base_accuracy"], found["compressed_accuracy"] = found["accuracy/base"], found["accuracy/compressed"]
    base, compressed = passed["base"], passed["compressed"]
    gain = sum(compressed.values()) / len(compressed) - sum(base.values()) / len(base)
    found["gain"] = f"{100 * gain:+.1f}"
    only = [sum(a[t] and not b[t] for t in task) for a, b in ((base, compressed), (compressed, base))]
    found["mcnemar_p"] = f"p = {binomtest(only[0], sum(only)).pvalue:.1e}"
    return found


def test_every_number_of_the_verdicts_is_recomputed_from_parquet(report, page):
    expected = from_verdicts(tables(report))
    assert len(expected) > 50
    assert {name: page.figures[name] for name in expected} == expected


def test_every_number_of_the_tiers_is_recomputed_from_parquet(report, page):
    tiers = tables(report)["tiers"]
    failures = tiers[0]["tasks_in"]
    for t in tiers:
        assert page.figures[f"tier_shares/{t['tier']}"] == percent((t["tasks_in"] - t["escalated"]) / failures)
    cost = sum(t["cost_usd"] for t in tiers)
    assert page.figures["cost_usd"] == f"${cost:.4f}"
    single = float(page.figures["cost_single_teacher_usd"].removeprefix("$"))
    assert page.figures["saving"] == page.figures["saving/text"] == percent(1 - cost / single)
    rows = tables(report)["costs"]
    low_high = saving_interval([r["paid_usd"] for r in rows], [r["single_usd"] for r in rows])
    assert page.figures["saving_interval"] == f"{percent(low_high.low)} – {percent(low_high.high)}"
    share = wilson(tiers[0]["tasks_in"] - tiers[0]["escalated"], failures)
    assert f"{percent(share.low)} – {percent(share.high)}" in report.read_text()


def test_every_number_of_the_kinds_is_recomputed_from_parquet(report, page):
    for row in tables(report)["kinds"]:
        for tier, settled in enumerate(row["settled"], 1):
            assert page.figures[f"kind/{row['number']}/tier{tier}"] == str(settled)
        assert page.figures[f"kind/{row['number']}/cost"] == f"${row['cost_usd']:.4f}"
        assert sum(row["settled"]) + row["unsolved"] == row["failures"]


def test_what_a_shortcut_saved_comes_with_its_interval(report, page):
    for row in tables(report)["shortcuts"]:
        assert page.figures[f"shortcut/{row['tier']}"] == f"${row['saving_usd']:.4f}"
    assert "[$-0.0002, $0.0020]" in report.read_text()


def test_every_number_of_the_stages_is_recomputed_from_parquet(report, page):
    rows = tables(report)["stages"]
    for row in rows:
        name = f"stage/{row['stage']}"
        assert page.figures[f"{name}/disk"] == f"{row['disk_bytes']:,}"
        assert page.figures[f"{name}/resident"] == f"{row['resident_bytes']:,}"
        assert page.figures[f"{name}/loss"] == f"{row['loss']:.4f}"
    html = report.read_text()
    assert percent(rows[-1]["disk_bytes"] / rows[0]["disk_bytes"]) in html
    assert f"{rows[2]['loss'] - rows[1]['loss']:+.4f}" in html


def test_every_number_of_the_training_is_recomputed_from_parquet(report, page):
    rows = tables(report)["curve"]
    found = {
        "training/steps": str(len(rows)),
        "training/tokens_per_s": f"{sum(r['tokens_per_s'] for r in rows) / len(rows):.0f}",
        "training/memory": f"{max(r['memory_bytes'] for r in rows) / 1e9:.2f} GB",
    }
    for row in rows:
        if row["validation_loss"] is not None:
            found[f"training/loss/{row['step'] + 1}"] = f"{row['validation_loss']:.4f}"
        if row["answered"]:
            found[f"training/accuracy/{row['step'] + 1}"] = percent(row["passed"] / row["answered"])
    assert len(found) == 3 + 8 + 4
    assert {name: text for name, text in page.figures.items() if name.startswith("training/")} == found
    last = wilson(rows[-1]["passed"], rows[-1]["answered"])
    assert f"<small> {percent(last.low)} – {percent(last.high)}</small>" in report.read_text()


PANELS = ("loss", "right answers, validation", "learning rate", "norm of the gradient", "tokens per second", "memory")


def test_each_curve_of_the_training_has_a_panel(report):
    picture = figure_of(report.read_text(), "Training, step by step")
    assert [p for p in PANELS if f">{p}" not in picture] == []


def test_a_curve_from_before_norms_and_memory_were_kept_is_drawn_without_them(report_data, tmp_path):
    page = write_report(report_data, tmp_path / "report.html")
    table = page.with_name("report.tables") / "curve.parquet"
    old = pq.read_table(table).drop_columns(["gradient_norm", "memory_bytes", "answered", "passed"])
    pq.write_table(old, table)
    html = render(load_tables(page), tables="t")
    picture = figure_of(html, "Training, step by step")
    assert [p for p in PANELS if f">{p}" in picture] == ["loss", "learning rate", "tokens per second"]
    assert "at most in one worker" not in html


def test_the_choice_is_explained(report):
    html = report.read_text()
    assert re.search(r"Why this one\..*prune 75%, rank 64, int4: the smallest within 2\.0%", html)


def test_every_layer_has_its_cell(report, report_data):
    html = report.read_text()
    picture = figure_of(html, "What is left of each layer")
    for title in ("rank, of 96", "% of A kept", "% of B kept"):
        assert title in picture
    for layer in report_data.layers:
        assert f"{layer.rank}<small> A {percent(layer.density_a)}, B {percent(layer.density_b)}</small>" in html
        assert f">{100 * layer.density_b:.0f}<" in picture


def figure_of(html, label):
    return html[html.index(f'aria-label="{label}"') :].split("</svg>")[0]


def test_ranks_alone_are_shown_where_nothing_was_pruned(report_data):
    layers = [dataclasses.replace(c, density_a=1.0, density_b=1.0) for c in report_data.layers]
    html = render(dataclasses.replace(report_data, layers=layers[:-1]), tables="t")
    picture = figure_of(html, "What is left of each layer")
    assert "rank, of 96" in picture
    assert "kept" not in picture
    assert '<td class="num">–</td>' in html, "a module that one block lacks"


def test_tasks_of_every_kind_can_be_read(report):
    html = report.read_text()
    assert "It is 8, &lt;b&gt;I think&lt;/b&gt;" in html
    assert "repaired by tier 2, answer-key-medium" in html
    assert "unsolved; last asked: answer-key-large" in html
    assert html.count("Verified answer<") == 2
    assert html.count("Refused answer<") == 1


def test_every_marked_number_is_covered_by_these_tests(report, page):
    covered = set(from_verdicts(tables(report))) | {
        *("cost_usd", "cost_single_teacher_usd", "saving", "saving/text", "saving_interval", "ratio", "probe_seconds")
    }
    others = {n for n in page.figures if n not in covered and not n.startswith(NAMED)}
    assert others == set()


def test_references_are_recomputed_from_parquet(report, page):
    for row in tables(report)["references"]:
        assert page.figures[f"reference/{row['benchmark']}"] == f"{row['ours']:.1f}"
        assert row["ratio"] == pytest.approx(row["ours"] / row["score"])
        interval = wilson(row["n"] * row["ours"] / 100, row["n"])
        assert (row["low"], row["high"]) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.05)
        shown = (
            f"{row['low']:.1f} – {row['high']:.1f}",
            f"{row['low'] / row['score']:.1%} – {row['high'] / row['score']:.1%}",
        )
        assert all(text in report.read_text() for text in shown)


def test_what_was_forgotten_is_recomputed_from_parquet(report, page, report_data):
    rows = tables(report)["general"]
    assert [row["benchmark"] for row in rows] == ["all", "arc", "mmlu"]
    for row in rows:
        assert page.figures[f"general/{row['benchmark']}"] == points(row["after"] - row["before"])
    without = render(dataclasses.replace(report_data, general=[]), tables="t")
    assert "What was forgotten" in report.read_text()
    assert "What was forgotten" not in without


def test_forgetting_is_paired_by_task_and_by_benchmark():
    tasks = [
        Task(f"{b}/{i}", b, "d", "test", (Message("user", "q"),), None) for b in ("arc", "mmlu") for i in range(40)
    ]
    before = [Verdict(t.id, "m", "", "pass", "", "") for t in tasks]
    after = [Verdict(t.id, "m", "x", "fail" if t.benchmark == "mmlu" else "pass", "", "") for t in reversed(tasks)]
    everything, arc, mmlu = general_rows(tasks, before, after)
    assert (everything.benchmark, everything.n, everything.before, everything.after) == ("all", 80, 1.0, 0.5)
    assert everything.low < -0.5 < everything.high
    assert (arc.n, arc.before, arc.after, arc.p) == (40, 1.0, 1.0, 1.0)
    assert mmlu.after == 0.0
    assert mmlu.low == -1.0 < mmlu.high < -0.8  # forty of forty, and not certain all the same
    assert mmlu.p < 1e-9
    only = [t for t in tasks if t.benchmark == "arc"]
    assert [r.benchmark for r in general_rows(only, before[:40], after[40:])] == ["arc"]
    assert general_rows([], [], []) == []
    with pytest.raises(DataError, match="same test tasks"):
        general_rows(only, before[:40], after[:40])


def test_the_page_made_from_its_tables_is_the_same_page(report, report_data):
    DRAWN.clear()
    again = load_tables(report)
    assert again.summary == report_data.summary
    assert list(again.tasks) == list(report_data.tasks)
    assert render(again, tables="report.tables") == report.read_text(encoding="utf-8")


def test_missing_tables_are_named(report_data, tmp_path):
    path = write_report(report_data, tmp_path / "report.html")
    (tmp_path / "report.tables/tiers.parquet").unlink()
    with pytest.raises(DataError, match=r"tiers\.parquet"):
        load_tables(path)


def test_the_page_needs_nothing_from_outside(report, page):
    assert {tag for tag, _ in page.tags} & {"link", "script", "img", "iframe", "object"} == set()
    links = [a[k] for _, a in page.tags for k in ("src", "href", "xlink:href") if a.get(k)]
    assert all(link.startswith("#") for link in links)
    style = re.sub(r'xmlns(:\w+)?="[^"]*"', "", report.read_text())
    assert "http" not in "".join(re.findall(r"<style.*?</style>|<svg.*?>", style, re.DOTALL))


def test_ids_are_unique_and_every_reference_has_a_target(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 0
    used = {a["xlink:href"][1:] for _, a in page.tags if a.get("xlink:href")}
    used |= {u for _, a in page.tags for value in a.values() for u in re.findall(r"url\(#([^)]+)\)", value or "")}
    assert used <= set(ids)


def test_light_and_dark_share_one_set_of_pictures(report):
    html = report.read_text()
    assert "prefers-color-scheme: dark" in html
    for colour, variable in figures._VARIABLES.items():
        assert colour not in html
        assert html.count(f"{variable}:") == 2, f"{variable} needs a light and a dark value"
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        hard = set(re.findall(r"#[0-9a-f]{6}\b", svg)) - {"#ffffff"}
        assert hard == set(), "a colour that no theme can change"


def test_every_picture_has_a_label_and_scales(page):
    pictures = [a for tag, a in page.tags if tag == "svg"]
    assert len(pictures) == 10
    assert all(a["role"] == "img" and a["aria-label"] and a["viewbox"] and "width" not in a for a in pictures)
    viewport = [a for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert viewport[0]["content"].startswith("width=device-width")


def test_what_models_wrote_cannot_become_markup(report_data):
    evil = dataclasses.replace(report_data.samples[0], base_answer="<script>alert(1)</script>", prompt="</pre><b>")
    html = render(dataclasses.replace(report_data, samples=[evil]), tables="t")
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "</pre><b>" not in html


def test_category_names_with_dollar_signs_and_markup_are_drawn_as_they_are(report_data):
    tasks = [dataclasses.replace(t, category=f"$x_{t.difficulty}$ <&>") for t in report_data.tasks]
    html = render(dataclasses.replace(report_data, tasks=tasks), tables="t")
    assert html.count("$x_1$ &lt;&amp;&gt; (100)") == 1


def test_long_and_foreign_category_names_leave_the_bars_their_room(report_data, recwarn):
    names = {1: "\n".join(["a very long name"] * 9), 2: "漢字", 3: "c"}
    tasks = [dataclasses.replace(t, category=names[t.difficulty]) for t in report_data.tasks]
    html = render(dataclasses.replace(report_data, tasks=tasks), tables="t")
    assert "a very long name a very long na… (100)" in html
    assert names[1] in html
    assert not recwarn.list


def test_a_p_value_too_small_for_a_number_is_no_zero(report_data):
    general = [dataclasses.replace(report_data.general[0], p=0.0)]
    assert "&lt; 1e-300" in render(dataclasses.replace(report_data, general=general), tables="t")


def test_the_answer_key_is_called_what_it_is(report, report_data):
    html = report.read_text()
    assert "About the teachers." in html
    assert html.count("replays an answer key") == 3
    real = [dataclasses.replace(t, answer_key=False, teacher="gpt") for t in report_data.tiers]
    teachers = tuple(t.model_copy(update={"answer_key": False}) for t in report_data.summary.teachers)
    summary = report_data.summary.model_copy(update={"teachers": teachers, "teacher_statement": "By gpt."})
    html = render(dataclasses.replace(report_data, tiers=real, summary=summary), tables="t")
    assert "About the teachers." not in html
    assert "answer key" not in html


def test_a_run_without_search_router_or_samples_still_has_a_report(report_data):
    bare = ReportData(report_data.summary, report_data.tasks, report_data.verdicts, report_data.tiers)
    html = render(bare, tables="t")
    assert html.count("<svg") == 5
    for heading in ("Router", "Training and compression", "Before and after", "Beside published scores"):
        assert heading not in html


def test_a_report_needs_the_verdicts_of_all_three(report_data):
    with pytest.raises(DataError, match="base, modifier, compressed"):
        ReportData(report_data.summary, report_data.tasks, {"base": []}, report_data.tiers)


def test_the_flow_shows_each_tiers_tasks():
    tiers = [
        TierRow(1, "a", False, 100, 70, 35, 1, 1, 1, 1.0),
        TierRow(2, "b", False, 35, 35, 0, 1, 1, 1, 1.0),
        TierRow(3, "c", False, 0, 0, 0, 0, 0, 0, 0.0),
    ]
    svg = figures.tier_flow(tiers)
    for text in ("100 in", "35 in", "0 in", "65 examples", "65.0%", "35.0%", "failures"):
        assert text in svg
    assert "unsolved" not in svg
    assert "nan" not in svg


def test_the_flow_shows_tasks_sent_past_a_tier():
    tiers = [
        TierRow(1, "a", False, 60, 50, 10, 1, 1, 1, 1.0, skipped=40),
        TierRow(2, "b", False, 50, 30, 20, 1, 1, 1, 1.0),
    ]
    svg = figures.tier_flow(tiers)
    for text in ("100", "60 in, 40 past", "50 in", "50 examples", "30 examples", "30.0%", "20 unsolved"):
        assert text in svg


def test_judged_answers_are_called_an_opinion(report_data):
    tiers = [dataclasses.replace(report_data.tiers[0], by_judge=12, judge_requests=30, judge_usd=0.001)]
    tiers += report_data.tiers[1:]
    summary = report_data.summary.model_copy(update={"judged": 12})
    html = render(dataclasses.replace(report_data, tiers=tiers, summary=summary), tables="t")
    assert "12 of the answers were accepted by a judge model" in html
    assert "12 by a judge" in html
    assert "judge model" not in render(report_data, tables="t")


def test_the_table_of_recipes_marks_the_front_and_shows_both_sizes(report_data):
    too_large = TrialRow("best of all, but too large", 10, 0.001, resident_bytes=9_000_000, fits=False)
    trials = [*report_data.trials, too_large]
    html = render(dataclasses.replace(report_data, trials=trials), tables="t")
    table = html.split("<summary>Recipes tried")[1].split("</table>")[0]
    rows = re.findall(r"<tr[^>]*><td>(.*?)</tr>", table)
    assert len(rows) == len(trials)
    marked = {row.split("<")[0].strip() for row in rows if "●" in row}
    assert marked == {t.recipe for t in front_of(trials)}
    assert 1 < len(marked) < len(trials)
    assert all("3.00 MB" in row or "9.00 MB" in row for row in rows)
    assert "best of all, but too large (too large)" in html
    shown = [None if t.drift is None else f"{t.drift:.4f}" for t in sorted(trials, key=lambda t: t.bytes)]
    assert [re.findall(r'"num">([^<]*)<', row)[3] for row in rows] == [drift or "–" for drift in shown]


def test_the_drawn_front_is_the_marked_one(report_data):
    """What does not fit changes the points that are drawn, not the line through the best."""

    def line(trials) -> str:
        svg = figures.pareto(trials, None)
        return re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke: var\(--modifier\)', svg)[0]

    best = front_of(report_data.trials)
    middle = dataclasses.replace(best[len(best) // 2], loss=best[-1].loss, fits=False)
    assert line([*report_data.trials, middle]) == line(report_data.trials)
    assert line([*report_data.trials, dataclasses.replace(middle, fits=True)]) != line(report_data.trials)
    assert "too large" in figures.pareto([*report_data.trials, middle], None)
    assert figures.pareto([middle], None), "a search without a front is drawn too"


def test_a_recipe_that_was_given_up_says_so_and_is_never_on_the_front(report_data):
    given_up = TrialRow("far too small", 1, 0.01, share=0.25)
    html = render(dataclasses.replace(report_data, trials=(*report_data.trials, given_up)), tables="t")
    assert "far too small (given up after 25 % of the examples)" in html
    assert "given up early" in figures.pareto([*report_data.trials, given_up], None)
    assert "given up early" not in figures.pareto(report_data.trials, None)
