"""One worker that goes on from a checkpoint. More of them are in tests/integration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from cascade.config import Base, Lora, Training
from cascade.models.base import load_base
from cascade.training import deepspeed_engine
from cascade.training.deepspeed_engine import DeepSpeedEngine
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, run_steps
from cascade.training.lora import add_lora, lora_layers
from cascade.training.packing import plan_steps
from cascade.training.pissa import START, change_alone, factors
from cascade.training.state_file import write_state

SETTINGS = Lora(rank=4, learning_rate=5e-3, epochs=2, tokens_per_step=40, max_length=48)
PISSA = SETTINGS.model_copy(update={"init": "pissa"})
PLUS = SETTINGS.model_copy(update={"lora_plus": 4.0})
EXAMPLES = [EncodedExample(f"e{i}", tuple(range(5, 25 + i)), (False,) * 8 + (True,) * (12 + i)) for i in range(4)]


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
    model = make_model(folder, PISSA)
    for layer in lora_layers(model).values():
        for factor in (*factors(layer), *factors(layer, START)):
            factor.data *= sign
    return make_engine(model, stage, PISSA)


def make_model(folder: Path, lora: Lora) -> PeftModel:
    return add_lora(load_base(Base(model=str(folder), dtype="float32"), torch.device("cpu")), lora, seed=3)


def make_engine(model: PeftModel, stage: int, lora: Lora) -> DeepSpeedEngine:
    training = Training(lora=lora, zero_stage=stage)  # type: ignore[arg-type]
    return DeepSpeedEngine(TargetLoss(model), training, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pissa_goes_on_from_the_start_that_it_had(alone: None, tiny_folder: Path, tmp_path: Path, stage: int) -> None:
    plan = plan_steps(EXAMPLES, PISSA, seed=1)
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


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lora_plus_goes_on_with_the_moments_of_both_groups(
    alone: None, tiny_folder: Path, tmp_path: Path, stage: int
) -> None:
    plan = plan_steps(EXAMPLES, PLUS, seed=1)
    first = make_engine(make_model(tiny_folder, PLUS), stage, PLUS)
    assert len(first._inner.param_groups) == 2
    list(itertools.islice(run_steps(first, plan, PLUS), 2))
    state = first.state(2)
    assert state is not None
    write_state(state, tmp_path)
    curve = [report.loss for report in run_steps(first, plan, PLUS, start=2)]
    second = make_engine(make_model(tiny_folder, PLUS), stage, PLUS)
    assert second.load(tmp_path) == 2
    assert [report.loss for report in run_steps(second, plan, PLUS, start=2)] == curve
    mine, theirs = first.weights(), second.weights()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("room", [True, False])
def test_copies_stay_on_a_gpu_only_if_the_next_steps_leave_room_for_all(
    alone: None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    asked, stayed, ordinary = [], [], deepspeed_engine.joined

    def has_room(device: torch.device, size: int) -> bool:
        asked.append(size)
        return room

    def joined(tensors: list[torch.Tensor], *, stay: bool) -> torch.Tensor:
        stayed.append(stay)
        return ordinary(tensors, stay=stay)

    monkeypatch.setattr(deepspeed_engine, "has_room", has_room)
    monkeypatch.setattr(deepspeed_engine, "joined", joined)
    engine = make_engine(make_model(tiny_folder, SETTINGS), 0, SETTINGS)
    next(run_steps(engine, plan_steps(EXAMPLES, SETTINGS, seed=1), SETTINGS))
    state = engine.state(1)
    assert state is not None
    assert asked == [sum(tensor.nbytes for tensor in state.tensors().values())]
    assert stayed == [room] * 3
