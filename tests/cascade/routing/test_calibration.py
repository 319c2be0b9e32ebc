"""Calibration against outcomes drawn from known probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from cascade.routing.calibration import Calibrator, calibrate, expected_calibration_error, fit, reliability

RNG = np.random.default_rng(0)
TRUE = RNG.uniform(0.05, 0.95, 4000)
OUTCOMES = RNG.random(4000) < TRUE


def test_temperature_undoes_overconfidence() -> None:
    calibrator = fit("temperature", logit(TRUE) * 3, OUTCOMES)
    assert calibrator.parameters[0] == pytest.approx(3, rel=0.1)
    assert np.abs(calibrator(logit(TRUE) * 3) - TRUE).max() < 0.03


def test_platt_undoes_scale_and_offset() -> None:
    logits = logit(TRUE) * 2 + 1
    assert fit("platt", logits, OUTCOMES).parameters == pytest.approx((0.5, -0.5), abs=0.07)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_outcomes_that_count_alike_leave_their_numbers_out(method: str) -> None:
    logits = np.repeat([-1.0, 1.0], 500)
    wrong = np.tile([True, False, False, False, False], 200)
    outcomes = np.where(logits > 0, ~wrong, wrong)
    many = np.concatenate([np.flatnonzero(outcomes)] * 9 + [np.flatnonzero(~outcomes)])
    uneven = fit(method, logits[many], outcomes[many])(0.0)  # type: ignore[arg-type]
    even = fit(method, logits[many], outcomes[many], even=True)  # type: ignore[arg-type]
    assert uneven > 0.75
    assert even([-1.0, 0.0, 1.0]) == pytest.approx([0.2, 0.5, 0.8], abs=0.01)


def test_isotonic_follows_any_monotone_bend() -> None:
    logits = np.where(TRUE > 0.5, TRUE * 20, TRUE)
    p = fit("isotonic", logits, OUTCOMES)(logits)
    assert np.abs(p - TRUE).mean() < 0.04
    order = np.argsort(logits)
    assert (np.diff(p[order]) >= 0).all()


@pytest.mark.parametrize(
    ("logits", "best"),
    [(logit(TRUE) * 4, {"temperature", "platt"}), (logit(TRUE) * 2 + 2, {"platt"}), (TRUE**8 * 30, {"isotonic"})],
)
def test_the_method_is_chosen_on_data_it_has_not_seen(logits: np.ndarray, best: set[str]) -> None:
    result = calibrate(logits, OUTCOMES, seed=1)
    assert result.calibrator.method in best
    assert result.loss[result.calibrator.method] == min(result.loss.values())
    assert expected_calibration_error(result.held_out, OUTCOMES) < 0.03
    assert expected_calibration_error(expit(logits), OUTCOMES) > 0.1


def test_held_out_probabilities_do_not_know_their_outcome() -> None:
    """On pure noise, isotonic regression fits the data it saw well; held out, nothing can be won."""
    noise, coin = RNG.normal(size=60), RNG.random(60) < 0.5
    result = calibrate(noise, coin, seed=2)
    entropy = np.log(2)
    assert all(loss > entropy - 0.03 for loss in result.loss.values())


@pytest.mark.parametrize("outcomes", [[True] * 6, [False] * 6, [], [True]])
def test_few_or_one_sided_outcomes_stay_short_of_certainty(outcomes: list[bool]) -> None:
    p = calibrate(np.linspace(-9, 9, len(outcomes)), outcomes, seed=0).calibrator([-100.0, 100.0])
    assert (p > 0).all()
    assert (p < 1).all()


def test_error_and_diagram_on_a_small_example() -> None:
    p, y = [0.1, 0.15, 0.9, 0.9], [False, True, True, True]
    bins = reliability(p, y)
    assert [(b.lower, b.n, b.accuracy) for b in bins] == [(0.1, 2, 0.5), (0.9, 2, 1.0)]
    assert bins[0].low < 0.5 < bins[0].high
    assert expected_calibration_error(p, y) == pytest.approx((2 * 0.375 + 2 * 0.1) / 4)
    assert expected_calibration_error([], []) == 0


def test_an_identity_is_the_plain_sigmoid() -> None:
    assert Calibrator()([0.0, 1.0]) == pytest.approx([0.5, expit(1)])
