"""When validation is looked at, which look was best, and when training ends for want of a better one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascade.config import Lora, Training, Validation
from cascade.training.looks import Look, best_of, is_better, is_enough, look_steps, needs_loss


def training(epochs=3.0, **validation):
    return Training(lora=Lora(epochs=epochs), validation=Validation(**validation))


def test_each_epoch_ends_with_a_look():
    assert look_steps(90, training()) == {30, 60, 90}
    assert look_steps(90, training(every_epochs=0.5)) == {15, 30, 45, 60, 75, 90}
    assert look_steps(90, training(epochs=2.5, every_epochs=1)) == {36, 72, 90}
    assert look_steps(90, training(every_epochs=7)) == {90}
    assert look_steps(90, training(tasks=0)) == frozenset()
    assert look_steps(90, training(tasks=0, answered=5)) == {30, 60, 90}
    assert look_steps(0, training()) == frozenset()


@given(st.integers(1, 300), st.floats(0.1, 9), st.floats(0.01, 20))
def test_looks_are_steps_and_the_last_is_one(total, epochs, every):
    steps = look_steps(total, training(epochs=epochs, every_epochs=every))
    assert max(steps) == total
    assert min(steps) >= 1


def look(step, loss, passed=0, answered=0, best=False):
    return Look(step, loss, answered, passed, best)


def test_the_better_look_by_what_decides():
    by_loss, by_accuracy = training(keep="best_loss", answered=9), training(keep="best_accuracy", answered=9)
    low, right = look(1, 0.5, passed=3, answered=9), look(2, 0.7, passed=5, answered=9)
    assert is_better(low, right, by_loss)
    assert not is_better(right, low, by_loss)
    assert is_better(right, low, by_accuracy)
    assert not is_better(low, right, by_accuracy)
    assert is_better(look(3, 0.6, passed=5, answered=9), right, by_accuracy)  # as right, and surer
    assert is_better(low, None, by_loss)
    assert not is_better(low, low, by_loss)


def test_a_loss_that_is_no_number_is_worse_than_any():
    unmeasured, measured = look(1, float("nan")), look(2, 9.0)
    for keep in ("last", "best_loss", "best_accuracy"):
        settings = training(keep=keep, answered=9)
        assert is_better(measured, unmeasured, settings)
        assert not is_better(unmeasured, measured, settings)
        assert not is_better(unmeasured, unmeasured, settings)


def test_what_is_decided_by_loss():
    assert needs_loss(training(keep="best_loss", answered=9))
    assert needs_loss(training(patience=2))
    assert not needs_loss(training(patience=2, answered=9))
    assert not needs_loss(training(keep="best_accuracy", answered=9))
    assert not needs_loss(training())


def test_patience_counts_looks_since_the_best():
    looks = [look(1, 3.0, best=True), look(2, 2.0, best=True), look(3, 2.5), look(4, 2.4)]
    patient = training(patience=2)
    assert [is_enough(looks[:n], patient) for n in range(5)] == [False, False, False, False, True]
    assert not is_enough(looks, training())
    assert best_of(looks) == looks[1]
    assert best_of([]) is None
