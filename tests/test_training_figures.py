"""What perf/training_figures.py makes of steps that the worker and the bare loop took in turn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))

from training_figures import figures_in_turn

BETWEEN = 20
"""Steps between two checkpoints."""


def in_turn(store_s, *, step_s=0.157, slower=0.2, pause_s=0.0, blocks=61, more=0):
    """Turns of one step, while a checkpoint is stored for so many seconds behind every 20 of them.

    Args:
        slower: the share of its speed that a step loses while one is stored.
        pause_s: seconds for which the worker waits at a checkpoint.
        more: steps behind the last whole block.
    """
    now = end = 0.0
    pairs = []

    def take():
        nonlocal now
        began, beside = now, min(max(0.0, end - now), step_s / (1 - slower))
        now += beside + step_s - beside * (1 - slower)
        return now - began, beside

    for number in range(blocks * BETWEEN + more):
        waits = pause_s if number and number % BETWEEN == 0 else 0.0
        if number and number % BETWEEN == 0:
            now += waits
            end = now + store_s
        worker, _ = take()
        bare, beside = take()
        pairs.append((worker + waits, bare, beside))
    return [{"pairs": pairs, "seconds_to_store": [store_s] * blocks}]


@pytest.mark.parametrize(
    ("step_s", "store_s", "slower"), [(0.157, 0.25, 0.2), (0.157, 0.35, 0.2), (0.157, 1.5, 0.2), (1.0, 1.8, 0.3)]
)
def test_what_storing_takes_from_the_steps_is_counted_once(step_s, store_s, slower):
    found = figures_in_turn(in_turn(store_s, step_s=step_s, slower=slower), BETWEEN)
    alone = store_s * slower / (BETWEEN * step_s)
    assert found["ray_deepspeed_overhead_in_turn"]["value"] == pytest.approx(alone, rel=0.06)


@pytest.mark.parametrize("more", [0, 1, 5, 19])
def test_steps_behind_the_last_whole_block_do_not_count_with_its_checkpoint(more):
    found = figures_in_turn(in_turn(0.01, slower=0.0, pause_s=0.1, blocks=3, more=more), BETWEEN)
    overhead = found["ray_deepspeed_overhead_in_turn"]
    assert overhead["n"] == 2 * BETWEEN
    assert overhead["value"] == pytest.approx(0.1 / (BETWEEN * 0.157), rel=1e-5)


def test_storing_that_takes_longer_than_the_steps_between_leaves_the_figure_out(capsys):
    assert figures_in_turn(in_turn(7.0), BETWEEN) == {
        "in_turn_seconds_to_store": {"value": 7.0, "target": None, "met": True}
    }
    assert "no figure, a checkpoint is stored in 7.00 s" in capsys.readouterr().out
