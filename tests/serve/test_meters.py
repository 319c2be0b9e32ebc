"""The dashboard asks for what is counted."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from importlib import resources

from engine_events import collect

from serve import meters


def test_the_dashboard_shows_every_figure_that_is_counted_and_no_other() -> None:
    dashboard = json.loads(resources.files("serve").joinpath("grafana.json").read_text(encoding="utf-8"))
    asked = set(re.findall(r"ray_(cascade_\w+?)(?:_total|_bucket)", json.dumps(dashboard)))
    counted = set(re.findall(r'"(cascade_\w+)"', inspect.getsource(meters)))
    assert asked == counted
    labels = set(re.findall(r"by \(([^)]*)\)", json.dumps(dashboard)))
    used = {label.strip() for group in labels for label in group.split(",")} - {"le"}
    assert used <= set(re.findall(r'"(route|reason|kind|status|rating)"', inspect.getsource(meters)))


async def test_a_swap_is_counted_once_whoever_comes_in_with_it(engine, work) -> None:
    swaps: list[float] = []
    engine.swapped = swaps.append
    await asyncio.gather(*(collect(engine, work("letters", f"question {i}", 4)) for i in range(4)))
    assert len(swaps) == 1
    await collect(engine, work("letters", "again", 4))
    assert len(swaps) == 1
    await collect(engine, work("sums", "other", 4))
    assert len(swaps) == 2
