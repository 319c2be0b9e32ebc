"""How far a trial of the pruning search goes: early ends by rank among those as far, and the switch for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cascade.artifacts import Run, Store
from cascade.config import Compression
from ray_jobs._trial import STAGES, Stage, _loss

ROWS = [SimpleNamespace(targets=10) for _ in range(8)]


class Bench:
    """Rows that all have the same loss."""

    def __init__(self, loss: float) -> None:
        self.rows, self.loss, self.measured = ROWS, loss, 0
        self.slot = SimpleNamespace(fill=lambda adapter: None)

    def mean_loss(self, rows: list[Any]) -> float:
        self.measured += len(rows)
        return self.loss


@pytest.fixture
def setting(tmp_path):
    def make(*, halving: bool) -> Any:
        run = Run(Store(str(tmp_path)), "sums", "search", f"halving-{halving}")
        return SimpleNamespace(run=run, config=SimpleNamespace(compression=Compression(halving=halving)))

    return make


def measure(setting: Any, key: str, loss: float, size: int, *, hopeless: bool = False) -> tuple[float, float, int]:
    bench: Any = Bench(loss)
    share, found = _loss(setting, key, bench, None, size, hopeless=hopeless)  # type: ignore[arg-type]
    return share, found, bench.measured


def test_a_trial_that_is_behind_ends_after_a_quarter(setting):
    halved = setting(halving=True)
    assert measure(halved, "good", 0.2, 100) == (1.0, 0.2, 8)
    assert measure(halved, "better", 0.1, 90) == (1.0, pytest.approx(0.1), 8)
    assert measure(halved, "worst", 3.0, 200) == (0.25, 3.0, 2)
    assert measure(halved, "smallest", 2.0, 10)[0] == 1.0, "nothing beats it in both"


def test_without_halving_every_trial_is_measured_whole(setting):
    whole = setting(halving=False)
    for key, loss, size in (("good", 0.2, 100), ("better", 0.1, 90), ("worst", 3.0, 200)):
        assert measure(whole, key, loss, size) == (1.0, pytest.approx(loss), 8)
    assert measure(whole, "too large", 3.0, 300, hopeless=True)[0] == 1.0
    assert whole.run.read(STAGES, Stage) == []


def test_what_does_not_fit_ends_at_the_first_look(setting):
    assert measure(setting(halving=True), "too large", 0.1, 10, hopeless=True) == (0.25, 0.1, 2)
