"""The dashboard asks for what is counted."""

from __future__ import annotations

import inspect
import json
import re
from importlib import resources

from serve import meters


def test_the_dashboard_shows_every_figure_that_is_counted_and_no_other() -> None:
    dashboard = json.loads(resources.files("serve").joinpath("grafana.json").read_text(encoding="utf-8"))
    asked = set(re.findall(r"ray_(cascade_\w+?)(?:_total|_bucket)", json.dumps(dashboard)))
    counted = set(re.findall(r'"(cascade_\w+)"', inspect.getsource(meters.RayMeters)))
    assert asked == counted
    labels = set(re.findall(r"by \(([^)]*)\)", json.dumps(dashboard)))
    used = {label.strip() for group in labels for label in group.split(",")} - {"le"}
    assert used <= set(re.findall(r'"(route|reason|kind|status|rating)"', inspect.getsource(meters.RayMeters)))
