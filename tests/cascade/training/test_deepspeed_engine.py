"""The file of a checkpoint, and one worker that goes on from it. More of them are in tests/integration."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade.config import Base, Lora, Training
from cascade.errors import DataError
from cascade.models.base import load_base
from cascade.training.deepspeed_engine import STATE, DeepSpeedEngine, _apart, _joined, read_state, write_state
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, run_steps
from cascade.training.lora import add_lora, lora_layers
from cascade.training.packing import plan_steps
from cascade.training.pissa import START, change_alone, factors

PISSA = Lora(rank=4, init="pissa", learning_rate=5e-3, epochs=2, tokens_per_step=40, max_length=48)


def made(count: int = 4) -> dict[str, Any]:
    """What `DeepSpeedEngine.state` makes of one parameter."""
    weights, moments = _joined([torch.arange(float(count))]), {"exp_avg": _joined([torch.ones(count)])}
    return {"next_step": 3, "updates": 3, "shapes": {"a": (count,)}, "weights": weights, "moments": moments}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state(made(), tmp_path / "checkpoint")
    found = read_state(tmp_path / "checkpoint")
    assert found["next_step"] == 3
    assert found["weights"].tolist() == [0, 1, 2, 3]
    assert found["moments"]["exp_avg"].tolist() == [1, 1, 1, 1]


def test_joined_tensors_are_copies_that_come_apart_again() -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor([7, 8], dtype=torch.bfloat16)]
    joined = _joined(tensors)
    tensors[0].zero_()
    found = dict(_apart(joined, {"a": (2, 3), "b": (2,)}))
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
    assert _joined([torch.ones(2), torch.zeros(1)]).tolist() == [1, 1, 0]
    assert len(devices) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_checkpoint_written_beside_training_holds_what_was(tmp_path: Path) -> None:
    """The copy is fetched while its originals change and others want memory."""
    weights = [torch.full((1_000_000,), float(i), device="cuda") for i in range(20)]
    state = made() | {"shapes": {}, "weights": _joined(weights), "moments": {"exp_avg": _joined(weights)}}
    writer = threading.Thread(target=write_state, args=(state, tmp_path))
    writer.start()
    while writer.is_alive():
        for weight in weights:
            weight.add_(1)
        torch.full((20_000_000,), -1.0, device="cuda")
    found = read_state(tmp_path)
    for kept in (found["weights"], found["moments"]["exp_avg"]):
        assert [part.unique().tolist() for part in kept.split(1_000_000)] == [[float(i)] for i in range(20)]


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    torch.save({"next_step": 3, "weights": {"a": torch.zeros(4)}}, tmp_path / STATE)
    with pytest.raises(DataError, match=rf"{STATE} is no checkpoint of this version"):
        read_state(tmp_path)


@pytest.mark.parametrize("length", [None, 0, 500, 9000])
def test_a_file_that_is_not_there_or_not_whole_is_named(tmp_path: Path, length: int | None) -> None:
    write_state(made(4000), tmp_path)
    if length is None:
        (tmp_path / STATE).unlink()
    else:  # as a machine leaves it that lost its power
        (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:length])
    with pytest.raises(DataError, match=rf"{STATE}.*(no checkpoint of this version|is not whole)"):
        read_state(tmp_path)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """The only worker there is. Of the module: DeepSpeed keeps the first group that it finds."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield
    torch.distributed.destroy_process_group()


def pissa_engine(folder: Path, stage: int, sign: int) -> DeepSpeedEngine:
    """Where the library for singular vectors gives them this sign: both are right."""
    model = add_lora(load_base(Base(model=str(folder), dtype="float32"), torch.device("cpu")), PISSA, seed=3)
    for layer in lora_layers(model).values():
        for factor in (*factors(layer), *factors(layer, START)):
            factor.data *= sign
    training = Training(lora=PISSA, zero_stage=stage)  # type: ignore[arg-type]
    return DeepSpeedEngine(TargetLoss(model), training, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pissa_goes_on_from_the_start_that_it_had(alone: None, tiny_folder: Path, tmp_path: Path, stage: int) -> None:
    examples = [EncodedExample(f"e{i}", tuple(range(5, 25 + i)), (False,) * 8 + (True,) * (12 + i)) for i in range(4)]
    plan = plan_steps(examples, PISSA, seed=1)
    assert len(plan) > 3
    first = pissa_engine(tiny_folder, stage, sign=1)
    curve = [report.loss for report in itertools.islice(run_steps(first, plan, PISSA), 2)]
    state = first.state(2)
    assert state is not None
    write_state(state, tmp_path)
    curve += [report.loss for report in run_steps(first, plan, PISSA, start=2)]
    second = pissa_engine(tiny_folder, stage, sign=-1)
    assert second.load(tmp_path) == 2
    assert [report.loss for report in run_steps(second, plan, PISSA, start=2)] == curve[2:]
    mine, theirs = first.weights(), second.weights()
    assert any(f".{START}." in name for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    layers = [lora_layers(engine.module.model) for engine in (first, second)]  # type: ignore[arg-type]
    for name in layers[0]:
        given = [mine[f"base_model.model.{name}.lora_{factor}.default.weight"] for factor in "AB"]
        found = (change_alone(which[name], *given) for which in layers)
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
