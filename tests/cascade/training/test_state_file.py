"""The file of a checkpoint: what was written is read, as pages of it, and what is not whole is named."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.errors import DataError
from cascade.training import state_file
from cascade.training.state_file import STATE, State, apart, joined, read_state, write_state


def made(count: int = 4) -> State:
    """Of one parameter."""
    moments = {"exp_avg": joined([torch.ones(count)]), "exp_avg_sq": joined([torch.zeros(count)])}
    start = {"a.A": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), "a.B": torch.zeros(3, 0, dtype=torch.bfloat16)}
    return State(3, 2, {"a": (2, count // 2)}, joined([torch.arange(float(count))]), moments, start)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state(made(), tmp_path / "checkpoint")
    found = read_state(tmp_path / "checkpoint")
    assert (found.next_step, found.updates, found.shapes) == (3, 2, {"a": (2, 2)})
    assert found.weights.tolist() == [0, 1, 2, 3]
    assert {key: moments.tolist() for key, moments in found.moments.items()} == {
        "exp_avg": [1, 1, 1, 1],
        "exp_avg_sq": [0, 0, 0, 0],
    }
    assert found.start["a.A"].tolist() == [[1.5, -2.0]]
    assert found.start["a.A"].dtype == torch.bfloat16
    assert found.start["a.B"].shape == (3, 0)


def test_other_programs_read_it_as_safetensors(tmp_path: Path) -> None:
    write_state(made(), tmp_path)
    found = load_file(tmp_path / STATE)
    assert set(found) == {"weights", "moment.exp_avg", "moment.exp_avg_sq", "start.a.A", "start.a.B"}
    assert found["weights"].tolist() == [0, 1, 2, 3]


def test_before_the_first_update_there_are_no_moments(tmp_path: Path) -> None:
    write_state(replace(made(), updates=0, moments={}, start={}), tmp_path)
    found = read_state(tmp_path)
    assert (found.updates, found.moments, found.start) == (0, {}, {})


def test_what_is_read_may_be_changed_and_stays_when_the_file_goes(tmp_path: Path) -> None:
    write_state(made(), tmp_path)
    found = read_state(tmp_path)
    found.weights.add_(1)
    assert read_state(tmp_path).weights.tolist() == [0, 1, 2, 3]
    (tmp_path / STATE).unlink()
    assert found.weights.tolist() == [1, 2, 3, 4]
    assert found.moments["exp_avg"].tolist() == [1, 1, 1, 1]


def test_joined_tensors_are_copies_that_come_apart_again() -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor([7, 8], dtype=torch.bfloat16)]
    together = joined(tensors)
    tensors[0].zero_()
    found = dict(apart(together, {"a": (2, 3), "b": (2,)}))
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].tolist() == [7, 8]
    assert found["b"].dtype == torch.float32


def test_where_the_device_is_full_the_copy_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cat, devices = torch.cat, []

    def full_at_first(tensors: list[torch.Tensor]) -> torch.Tensor:
        devices.append(tensors[0].device)
        if len(devices) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cat(tensors)

    monkeypatch.setattr(torch, "cat", full_at_first)
    assert joined([torch.ones(2), torch.zeros(1)]).tolist() == [1, 1, 0]
    assert len(devices) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_checkpoint_written_beside_training_holds_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is fetched while its originals change and others want memory; the last piece is a small one."""
    monkeypatch.setattr(state_file, "_PIECE", 3 * 2**20 + 4)
    weights = [torch.full((1_000_000,), float(i), device="cuda") for i in range(20)]
    state = State(3, 3, {}, joined(weights), {"exp_avg": joined(weights)})
    writer = threading.Thread(target=write_state, args=(state, tmp_path))
    writer.start()
    while writer.is_alive():
        for weight in weights:
            weight.add_(1)
        torch.full((20_000_000,), -1.0, device="cuda")
    found = read_state(tmp_path)
    for kept in (found.weights, found.moments["exp_avg"]):
        assert [part.unique().tolist() for part in kept.split(1_000_000)] == [[float(i)] for i in range(20)]


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / STATE)
    with pytest.raises(DataError, match=rf"{STATE} is no checkpoint of this version"):
        read_state(tmp_path)


@pytest.mark.parametrize("length", [None, 0, 4, 500, 9000, 160_500])
def test_a_file_that_is_not_there_or_not_whole_is_named(tmp_path: Path, length: int | None) -> None:
    write_state(made(20_000), tmp_path)
    if length is None:
        (tmp_path / STATE).unlink()
    else:  # as a machine leaves it that lost its power
        whole = (tmp_path / STATE).read_bytes()
        assert len(whole) > length
        (tmp_path / STATE).write_bytes(whole[:length])
    with pytest.raises(DataError, match=rf"{STATE}.*(no checkpoint of this version|is not whole)"):
        read_state(tmp_path)
