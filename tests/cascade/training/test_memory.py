"""Whether something may stay in memory beside the steps of a training."""

from __future__ import annotations

import pytest
import torch

from cascade.training.memory import fits, has_room


@pytest.mark.parametrize(
    ("size", "share", "at_hand", "room"),
    [
        (30, 100, 200, True),
        (31, 100, 200, False),  # the process would be stopped at its share
        (30, 200, 100, True),
        (31, 200, 100, False),  # others, or the driver, have the rest
    ],
)
def test_what_stays_must_fit_beside_the_most_that_a_step_took(size: int, share: int, at_hand: int, room: bool) -> None:
    assert fits(size, peak=70, share=share, at_hand=at_hand) == room


def test_a_copy_on_a_cpu_stays_there() -> None:
    assert has_room(torch.device("cpu"), 10**18)
