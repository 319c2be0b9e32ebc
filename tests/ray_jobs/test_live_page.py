"""The page that follows a pipeline: what it shows while the jobs run, and when they have ended."""

from __future__ import annotations

import re
import time
from pathlib import Path

import boto3
import pytest
from browser import CHROMIUM, Browser
from moto.server import ThreadedMotoServer
from pipelines import undrawn, write_config

from cascade.config import load_config
from cascade.errors import BudgetExceeded
from cascade.reports.progress import TYPICAL_SECONDS, Step, time_left
from ray_jobs import JOBS, _live_page, _progress
from ray_jobs._live_page import LivePage, showing
from ray_jobs._meter import TierState
from ray_jobs._progress import Row, Several, Tracked
from ray_jobs._runs import Runs

METRICS = {"tier": 1, "teacher": "answer-key-1", "asked": 55, "verified": 20, "cost_usd": 0.01}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return undrawn(Runs(load_config(write_config(tmp_path))))


@pytest.fixture
def page(runs: Runs) -> LivePage:
    """A pipeline in its fourth job: the first reused, tier 1 over, tier 2 at work."""
    runs.test_domain.start(runs.config)
    runs.test_domain.note(seconds=130.0)
    runs.test_domain.finish({"tested": 60, "passed": 5})
    page = LivePage(runs, JOBS)
    page.reused("test_domain")
    page.started("generate_tier1")
    page.tier("generate_tier1", TierState(1, "answer-key-1", 54, 55, 20, 0.009, 0.4, 300.0, 1.0))
    page.finished("generate_tier1", METRICS)
    page.started("test_tier1")
    page.finished("test_tier1", {"accuracy": 0.75})
    page.started("generate_tier2")
    page.tier("generate_tier2", TierState(2, "answer-key-<2>", 10, 40, 9, 0.02, 0.3, 120.0, 95.0))
    return page


def shown(runs: Runs) -> str:
    return runs.store.read_bytes(f"{runs.config.domain}/progress.html").decode()


def rows(text: str) -> dict[str, str]:
    """The cells of each row of the tables as plain text, by the second cell's first word."""
    found = {}
    for row in re.findall(r"<tr class.*?</tr>|<tr><td>\d.*?</tr>", text, re.DOTALL):
        plain = " ".join(re.sub(r"<[^>]+>", " ", row).split())
        found[next(w for w in plain.split() if len(w) > 1)] = plain
    return found


def test_a_running_pipeline_is_shown_with_progress_spend_and_time_left(page: LivePage, runs: Runs) -> None:
    page.write()
    text, table = shown(runs), rows(shown(runs))
    assert re.search(r'<meta http-equiv="refresh" content="2">', text)
    assert '<strong data-figure="steps">3 of 10</strong>' in text
    assert '<strong data-figure="spent">$0.0300</strong>' in text
    assert re.search(r"about \d+ min( \d+ s)? left", text)
    assert table["test_domain"].endswith("tested 60, passed 5 2 min 10 s")
    assert "accuracy 0.75" in table["test_tier1"]
    assert "10 of 40" in table["generate_tier2"]
    assert table["generate_tier3"] == "· generate_tier3"
    assert "55 of 55 20 35 $0.0100" in table["answer-key-1"]
    assert "10 of 40 9 1 $0.0200 120 1 min 35 s" in table["answer-key-&lt;2&gt;"]
    assert f'href="{runs.test_domain.name}/manifest.json"' in text
    assert "generate_tier2@" not in text  # nothing to see there yet


def test_a_finished_pipeline_links_its_report_and_asks_for_no_news(page: LivePage, runs: Runs) -> None:
    page.connected("http://127.0.0.1:8265")
    page.write()
    assert 'href="http://127.0.0.1:8265"' in shown(runs)
    assert "report.html" not in shown(runs)
    with page.kept():
        for job in JOBS[3:]:
            page.started(job)
            page.finished(job, {})
    text = shown(runs)
    assert 'href="report.html"' in text
    assert "http-equiv" not in text
    assert "8265" not in text  # that Ray has ended
    assert f"tensorboard --logdir &#39;{runs.store.path(runs.compress_modifier.folder)}/search&#39;" in text
    assert "study.journal" in text


def test_commands_for_the_search_come_with_the_search(page: LivePage, runs: Runs) -> None:
    page.write()
    assert "tensorboard" not in shown(runs)
    page.started("compress_modifier")
    page.write()
    assert f"{runs.compress_modifier.name}/search" in shown(runs)
    assert f"{runs.compress_modifier.name}/study.journal" in shown(runs)


def test_a_failure_is_told_and_marked_at_its_step(page: LivePage, runs: Runs) -> None:
    with pytest.raises(BudgetExceeded), page.kept():
        raise BudgetExceeded("the budget of <$0.50> is reached")
    text = shown(runs)
    assert "the budget of &lt;$0.50&gt; is reached" in text
    assert rows(text)["generate_tier2"].startswith("✗")
    assert "http-equiv" in text  # the run may be going on in another process, or again


def test_the_page_is_written_again_and_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_live_page, "_EVERY_S", 0.02)
    with showing(runs, "x", ("test_domain",)) as progress:
        progress.started("test_domain")
        for done in (1, 2):
            progress.update("test_domain", done, 3, "tasks")
            end = time.monotonic() + 20
            while f"{done} of 3" not in shown(runs):
                assert time.monotonic() < end
                time.sleep(0.01)
    assert not [n for n in runs.store.list(runs.config.domain) if n.endswith(".tmp")]


def test_a_page_that_cannot_be_written_stops_nobody(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(runs.store), "write_bytes", full)
    with showing(runs, "x", ("test_domain",)) as progress:
        progress.started("test_domain")


def test_one_job_shows_what_was_done_before(page: LivePage, runs: Runs) -> None:
    with showing(runs, "x", ("generate_tier1",), before=("test_domain",)):
        pass
    assert "tested 60" in rows(shown(runs))["test_domain"]


def test_the_time_left_is_that_of_the_present_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 200.0, 230.0])
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: next(clock))
    row = Row(state="running")
    row.update(20, 100, "embedded")  # at 100 s; a resumed stage begins with what it has
    assert row.seconds_left is None
    row.update(40, 100, "embedded")
    assert row.seconds_left == 30  # 20 in 10 s, 60 to go
    row.update(0, 50, "answered")  # at 200 s
    assert row.seconds_left is None
    row.update(30, 50, "answered")
    assert row.seconds_left == 20
    row.update(50, 50, "answered")
    assert row.seconds_left is None


def test_the_pipelines_time_left_follows_the_pace_of_the_steps_behind_it() -> None:
    steps = {name: Step(name) for name in TYPICAL_SECONDS}
    whole = sum(TYPICAL_SECONDS.values())
    assert time_left(steps) is None
    steps["generate_tier1"] = Step("generate_tier1", "done", seconds=500.0)  # too short to tell anything
    assert time_left(steps) is None
    steps["generate_tier1"] = Step("generate_tier1", "done", seconds=20.0)
    steps["test_domain"] = Step("test_domain", "reused", seconds=260.0)
    assert time_left(steps) == pytest.approx(2 * (whole - 140))
    steps["test_tier1"] = Step("test_tier1", "running", seconds=74.0)
    assert time_left(steps) == pytest.approx(2 * (whole - 140) - 74)
    steps["test_tier1"] = Step("test_tier1", "running", seconds=1000.0, seconds_left=30.0)
    assert time_left(steps) == pytest.approx(2 * (whole - 140 - 137) + 30)
    assert set(TYPICAL_SECONDS) == set(JOBS)
    assert time_left({name: Step(name, "done", seconds=1.0) for name in TYPICAL_SECONDS}) == 0
    assert time_left({**steps, "another": Step("another")}) is None


def test_several_displays_are_all_told() -> None:
    both = [Tracked(JOBS), Tracked(JOBS)]
    progress = Several(*both)
    progress.connected("http://x")
    progress.reused("test_domain")
    progress.started("test_tier1")
    progress.update("test_tier1", 1, 2, "steps")
    progress.finished("generate_tier1", {"a": 1})
    progress.tier("generate_tier2", TierState(2, "t", 1, 4, 1, 0.1, 0.2, 0.0, None))
    for display in both:
        states = {job: row.state for job, row in display.rows.items() if row.state}
        assert states == {"test_domain": "reused", "test_tier1": "running", "generate_tier1": "done"}
        assert (display.rows["test_tier1"].done, display.rows["generate_tier2"].total) == (1, 4)


@pytest.mark.filterwarnings("ignore")
def test_on_an_object_store_it_is_a_page_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="runs")
        storage = f"s3://runs/a?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        runs = undrawn(Runs(load_config(write_config(tmp_path, storage))))
        LivePage(runs, JOBS).write()
        found = client.get_object(Bucket="runs", Key=f"a/{runs.config.domain}/progress.html")
        assert found["ContentType"] == "text/html"
        assert b'content="10"' in found["Body"].read()
    finally:
        server.stop()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_it_fits_and_loads_itself_again(page: LivePage, runs: Runs) -> None:
    page.write()
    file = Path(runs.store.path(f"{runs.config.domain}/progress.html"))
    with Browser(file.as_uri(), width=500) as browser:
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.run("document.title") == "3/10 sums"
        assert browser.run("getComputedStyle(document.getElementById('stale')).display") == "none"
        page.finished("generate_tier2", {})
        page.write()
        browser.wait_for("document.title == '4/10 sums'", seconds=30)
