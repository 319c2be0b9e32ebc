"""The file of a checkpoint. What DeepSpeed makes of it is tests/integration/test_zero_stages.py's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade.errors import DataError
from cascade.training.deepspeed_engine import STATE, read_state, write_state


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state({"next_step": 3, "weights": {"a": torch.arange(4.0)}, "moments": {}}, tmp_path / "checkpoint")
    found = read_state(tmp_path / "checkpoint")
    assert found["next_step"] == 3
    assert found["weights"]["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [None, 0, 500, 9000])
def test_a_file_that_is_not_there_or_not_whole_is_named(tmp_path: Path, length: int | None) -> None:
    write_state({"weights": {"a": torch.zeros(4000)}, "moments": {}}, tmp_path)
    if length is None:
        (tmp_path / STATE).unlink()
    else:  # as a machine leaves it that lost its power
        (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:length])
    with pytest.raises(DataError, match=rf"{STATE}.*(no checkpoint of this version|is not whole)"):
        read_state(tmp_path)
