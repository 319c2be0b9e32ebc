"""Structured logs: every line is an object that says which run and step it is of."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import ray
from pipelines import undrawn, write_config

from cascade.config import load_config
from cascade.errors import BudgetExceeded
from ray_jobs import _json_lines
from ray_jobs._context import connect_ray
from ray_jobs._json_lines import JsonLines
from ray_jobs._live_page import showing
from ray_jobs._meter import TierState
from ray_jobs._runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return undrawn(Runs(load_config(write_config(tmp_path, execution={"logs": "json"}))))


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_names_domain_run_and_step(runs: Runs) -> None:
    stream = io.StringIO()
    with JsonLines(runs, stream).told() as progress:
        progress.reused("test_domain")
        progress.started("generate_tier1")
        for done in range(0, 101):
            progress.tier("generate_tier1", TierState(1, "t", done, 100, done // 2, 0.01 * done, 0.5, 60.0, None))
        progress.finished("generate_tier1", {"verified": 50, "reason": "Grüße\nzwei"})
    said = lines(stream.getvalue())
    assert len({line["run"] for line in said}) == 1
    assert {line["domain"] for line in said} == {"sums"}
    assert [line["event"] for line in said] == [
        "began", "step reused", "step began", *["progress"] * 11, "step ended", "ended",
    ]  # fmt: skip
    assert said[1]["step"] == runs.test_domain.name
    assert {line["step"] for line in said[2:-1]} == {runs.generate_tier1.name}
    assert said[8] | {"done": 50, "verified": 25, "spent_usd": 0.5, "tier": 1} == said[8]
    assert said[-2]["metrics"] == {"verified": 50, "reason": "Grüße\nzwei"}
    assert said[-2]["seconds"] >= 0


def test_an_error_is_the_last_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def spend() -> None:
        with showing(runs, "x", ("test_domain",)) as progress:
            progress.started("test_domain")
            progress.update("test_domain", 1, 2, "tasks")
            raise BudgetExceeded("no money")

    with pytest.raises(BudgetExceeded):
        spend()
    said = lines(capsys.readouterr().out)
    assert [line["event"] for line in said] == ["began", "step began", "progress", "failed"]
    assert said[-1] | {"level": "ERROR", "error": "BudgetExceeded", "message": "no money"} == said[-1]
    assert b"no money" in runs.store.read_bytes("sums/progress.html")


def test_a_figure_that_is_no_number_leaves_a_line_that_is_json(runs: Runs) -> None:
    stream = io.StringIO()
    JsonLines(runs, stream).say("step ended", metrics={"kept": float("nan"), "sizes": [1.5, float("inf")]})
    assert '"metrics": {"kept": null, "sizes": [1.5, null]}' in stream.getvalue()


def test_ray_is_told_to_log_as_json_and_its_job_is_named(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    class Context:
        dashboard_url = "127.0.0.1:8265"

        def get_job_id(self) -> str:
            return "01000000"

    def init(**given: Any) -> Context:
        asked.update(given)
        return Context()

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(_json_lines.ray, "get_runtime_context", Context)
    with showing(runs, "x", ("test_domain",)) as progress:
        connect_ray(runs.config, progress)
    assert asked["logging_config"].encoding == "JSON"
    (connected,) = (line for line in lines(capsys.readouterr().out) if line["event"] == "connected")
    assert (connected["ray_job"], connected["dashboard"]) == ("01000000", "http://127.0.0.1:8265")


def test_the_way_of_logging_changes_no_result(runs: Runs, tmp_path: Path) -> None:
    text = undrawn(Runs(load_config(write_config(tmp_path))))
    assert runs.config.execution != text.config.execution
    assert runs.train_router.fingerprint == text.train_router.fingerprint
