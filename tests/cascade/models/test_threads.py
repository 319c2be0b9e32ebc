"""Computing in one thread leaves the others' number as it was."""

from __future__ import annotations

import torch

from cascade.models.threads import alone


def test_what_is_computed_alone_leaves_the_callers_threads_as_they_were():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
