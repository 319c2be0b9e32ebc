"""The pipeline's dashboard asks for what is counted, by the labels that it is counted with."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest
from documents import ROOT

from cascade.config import load_config
from ray_jobs import _meter, _metrics
from ray_jobs._meter import TierGauges
from ray_jobs._metrics import TierMetrics

DASHBOARD = json.loads(resources.files("ray_jobs").joinpath("grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The labels of every metric that the pipeline makes, by the name that Prometheus knows."""
    made: dict[str, set[str]] = {}

    class Counter:
        end = "_total"

        def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
            assert description
            made[f"ray_{name}{self.end}"] = set(tag_keys)

        def set(self, *_: object, **__: object) -> None: ...

    class Gauge(Counter):
        end = ""

    for module in (_metrics, _meter):
        assert "Gauge" in vars(module)
        monkeypatch.setattr(module, "Gauge", Gauge)
    monkeypatch.setattr(_metrics, "Counter", Counter)
    config = load_config(ROOT / "configs/quickstart.yaml")
    TierMetrics(config, 1)
    TierGauges(config.domain)
    return made


def test_every_figure_that_is_counted_is_shown_and_no_other(counted: dict[str, set[str]]) -> None:
    asked = {name for e in EXPRESSIONS for name in re.findall(r"ray_cascade_\w+", e)}
    assert asked == set(counted)


def test_the_labels_are_those_that_it_is_counted_with(counted: dict[str, set[str]]) -> None:
    for expression in EXPRESSIONS:
        for group, name in re.findall(r"by \(([^)]*)\) \((?:rate\()?(ray_cascade_\w+)", expression):
            assert set(group.split(", ")) <= counted[name], expression
        names = re.findall(r"(ray_cascade_\w+)(\S*)", expression)
        assert all(rest.startswith('{domain=~"$domain"}') for _, rest in names), expression


def test_legends_name_labels_that_are_left(counted: dict[str, set[str]]) -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (group, *_) = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(group.split(", "))


def test_panels_stand_beside_each_other_and_expressions_are_closed() -> None:
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]}
    assert len(places) == len(DASHBOARD["panels"]) == len({p["id"] for p in DASHBOARD["panels"]})
    assert all(e.count("(") == e.count(")") for e in EXPRESSIONS)
