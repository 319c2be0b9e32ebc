"""ZeRO 0 to 3 with two workers train what one process trains without DeepSpeed, and go on from each other.

On CPUs; where there are GPUs, on one and on two of them too.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from pages import mapped
from stand_in import free_port, save_tiny_base

from cascade.config import Base, Lora, Training
from cascade.models.base import load_base
from cascade.training import deepspeed_engine
from cascade.training.deepspeed_engine import DeepSpeedEngine
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora
from cascade.training.packing import Step, plan_steps
from cascade.training.state_file import write_state

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
SETTINGS = Lora(rank=3, learning_rate=5e-3, epochs=2, tokens_per_step=90, max_length=48, gradient_clip=0.7)
FROZEN = SETTINGS.model_copy(update={"freeze_a": True})
PLUS = SETTINGS.model_copy(update={"lora_plus": 4.0})
STAGES = (0, 1, 2, 3)
BREAK = 3
"""Steps after which a training is broken off and another goes on."""


def make_plan(workers: int) -> list[Step]:
    examples = [
        EncodedExample(
            f"e{i}", tuple(5 + (i * 31 + j * 7) % 250 for j in range(n)), tuple(j >= n // 2 for j in range(n))
        )
        for i, n in enumerate([12, 30, 7, 40, 9, 22, 15, 33, 8, 19])
    ]
    return plan_steps(examples, SETTINGS, seed=1, workers=workers)


def make_module(folder: str, fused: bool, settings: Lora = SETTINGS) -> TargetLoss:
    base = load_base(Base(model=folder, dtype="float32"), here())
    return TargetLoss(add_lora(base, settings, seed=3), fused=fused)


def make_engine(folder: str, stage: int, settings: Lora = SETTINGS, *, offload: bool = False) -> DeepSpeedEngine:
    training = Training(lora=settings, zero_stage=stage, offload=offload)  # type: ignore[arg-type]
    return DeepSpeedEngine(make_module(folder, stage < 3, settings), training, here(), torch.float32)


def here() -> torch.device:
    """This worker's GPU if it was told to take one."""
    gpu = os.environ.get("DS_ACCELERATOR") == "cuda"
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")


def spread_everything() -> None:
    """DeepSpeed keeps parameters of fewer than 100,000 numbers whole, which are all that a tiny base has."""
    ordinary = deepspeed_engine.deepspeed_config

    def config(training: Training, dtype: torch.dtype) -> dict[str, Any]:
        found = ordinary(training, dtype)
        found["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        return found

    deepspeed_engine.deepspeed_config = config


def join(rank: int, world: int, port: int, accelerator: str = "cpu") -> None:
    """Become one of several workers."""
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, DS_ACCELERATOR=accelerator)
    if accelerator == "cuda":
        torch.cuda.set_device(here())
    spread_everything()


def add_up(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64, device=here())
    torch.distributed.all_reduce(total)
    return float(total)


def run(engine: DeepSpeedEngine, rank: int, world: int, start: int = 0, end: int | None = None) -> list[Any]:
    steps = run_steps(engine, make_plan(world), SETTINGS, start=start, rank=rank, world=world, reduce_sum=add_up)
    return [(r.loss, r.gradient_norm) for r in itertools.islice(steps, None if end is None else end - start)]


def train(rank: int, folder: str, port: int, out: str, world: int = 2, accelerator: str = "cpu") -> None:
    """One of `world` workers: each stage in turn, with a checkpoint; the first writes losses and weights."""
    join(rank, world, port, accelerator)
    found: dict[Any, Any] = {}
    for stage in STAGES:
        engine = make_engine(folder, stage)
        curve = run(engine, rank, world, end=BREAK)
        state = engine.state(BREAK)
        found[stage] = (curve + run(engine, rank, world, start=BREAK), engine.weights())
        if state is not None:  # written late, as it is while training goes on: later steps must not show in it
            write_state(state, Path(out).parent / f"stage{stage}")
        frozen = make_engine(folder, stage, FROZEN)
        run(frozen, rank, world, end=2)
        found[stage, "frozen"] = frozen.weights()
    offloaded = make_engine(folder, 2, offload=True)
    found["offload"] = (run(offloaded, rank, world), offloaded.weights())
    if rank == 0:
        torch.save(found, out)


def go_on(rank: int, world: int, folder: str, port: int, out: str) -> None:
    """One of `world` workers: every stage goes on from another stage's checkpoint, which two workers wrote."""
    join(rank, world, port)
    found = {}
    for stage in STAGES:
        came_from = STAGES[stage - 1]
        engine = make_engine(folder, stage)
        start = engine.load(Path(out).parent / f"stage{came_from}")
        assert start == BREAK
        found[stage] = (run(engine, rank, world, start=start), engine.weights())
    if rank == 0:
        torch.save(found, out)


def plus(rank: int, folder: str, port: int, out: str) -> None:
    """One of two workers: LoRA+, whose parameters are two groups, goes from each stage on in another."""
    join(rank, 2, port)
    found = {}
    for stage in STAGES:
        engine = make_engine(folder, stage, PLUS)
        curve = run(engine, rank, 2, end=BREAK)
        if (state := engine.state(BREAK)) is not None:
            write_state(state, f"{out}{stage}")
        torch.distributed.barrier()
        engine = make_engine(folder, STAGES[stage - 1], PLUS)
        assert engine.load(f"{out}{stage}") == BREAK
        found[stage] = (curve + run(engine, rank, 2, start=BREAK), engine.weights())
    if rank == 0:
        torch.save(found, out)


def skip(rank: int, folder: str, port: int, out: str) -> None:
    """One of two workers: a gradient that is not finite, on one of them alone, changes no weight in any stage."""
    join(rank, 2, port)
    found = {}
    for stage in STAGES:
        engine = make_engine(folder, stage)
        run(engine, rank, 2, end=1)
        before, ordinary = engine.weights(), engine.backward
        engine.backward = lambda loss, whole=ordinary: whole(loss * (float("nan") if rank else 1.0))  # type: ignore
        reports = run(engine, rank, 2, start=1, end=2)
        after, updates = engine.weights(), engine._updates()
        engine.backward = ordinary  # type: ignore[method-assign]
        reports += run(engine, rank, 2, start=2, end=3)
        found[stage] = (reports, before, after, updates, engine.weights())
    if rank == 0:
        torch.save(found, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("zero") / "base"
    save_tiny_base(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(folder: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
    return train_alone(folder, SETTINGS)


def train_alone(folder: str, settings: Lora) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and weights of one process without DeepSpeed."""
    module = make_module(folder, fused=True, settings=settings)
    curve = [(r.loss, r.gradient_norm) for r in run_steps(TorchEngine(module, settings), make_plan(1), settings)]
    return curve, {n: p.detach() for n, p in module.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def trained(folder: str) -> dict[Any, Any]:
    out = Path(folder).parent / "found.pt"
    torch.multiprocessing.spawn(train, (folder, free_port(), str(out)), nprocs=2)
    found: dict[Any, Any] = torch.load(out)
    return found


def check_same(found: tuple[list[Any], dict[str, torch.Tensor]], curve: list[Any], weights: Any) -> None:
    for ours, theirs in zip(found[0], curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert found[1].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[1][name], weight, atol=2e-4, rtol=1e-3)


def test_all_stages_train_the_same_adapter(trained: dict[Any, Any], alone: Any) -> None:
    for key in (*STAGES, "offload"):
        check_same(trained[key], *alone)


@pytest.mark.parametrize("gpus", [1, 2])
def test_all_stages_train_the_same_adapter_on_gpus(gpus: int, alone: Any, folder: str) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    out = Path(folder).parent / f"gpus{gpus}.pt"
    torch.multiprocessing.spawn(train, (folder, free_port(), str(out), gpus, "cuda"), nprocs=gpus)
    found = torch.load(out, map_location="cpu")
    for key in (*STAGES, "offload"):
        check_same(found[key], *alone)


def test_an_adapter_with_frozen_a_is_whole_in_all_stages(trained: dict[Any, Any], folder: str) -> None:
    start = {n: p.detach() for n, p in make_module(folder, True, FROZEN).model.named_parameters() if "lora_A" in n}
    for stage in STAGES:
        found = trained[stage, "frozen"]
        assert len(found) == 2 * len(start)
        for name, weight in start.items():
            assert torch.equal(found[name], weight)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_stage_goes_on_from_another_with_other_workers(
    workers: int, trained: dict[Any, Any], alone: Any, folder: str
) -> None:
    out = Path(folder).parent / f"on{workers}.pt"
    torch.multiprocessing.spawn(go_on, (workers, folder, free_port(), str(out)), nprocs=workers)
    for found in torch.load(out).values():
        check_same(found, alone[0][BREAK:], alone[1])


def test_lora_plus_goes_on_in_another_stage(folder: str) -> None:
    out = Path(folder).parent / "plus.pt"
    torch.multiprocessing.spawn(plus, (folder, free_port(), str(out)), nprocs=2)
    for found in torch.load(out).values():
        check_same(found, *train_alone(folder, PLUS))


def test_a_gradient_that_is_not_finite_changes_nothing_in_any_stage(folder: str) -> None:
    out = Path(folder).parent / "skipped.pt"
    torch.multiprocessing.spawn(skip, (folder, free_port(), str(out)), nprocs=2)
    for reports, before, after, updates, later in torch.load(out).values():
        assert not torch.tensor(reports[0][1]).isfinite()
        assert torch.tensor(reports[1]).isfinite().all()
        assert updates == 1
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], later[name]) for name in before)


def share(rank: int, folder: str, port: int, out: str) -> None:
    """One of two workers: trains a step, then says how much of the base it holds for itself."""
    join(rank, 2, port)
    engine = make_engine(folder, 0)
    run(engine, rank, 2, end=1)
    torch.distributed.barrier()
    torch.save(mapped("model.safetensors"), f"{out}{rank}")
    torch.distributed.barrier()


def test_two_workers_of_a_machine_hold_the_base_once(folder: str) -> None:
    """On a CPU, in the numbers that its file is in: both compute from the same pages."""
    out = str(Path(folder).parent / "pages")
    torch.multiprocessing.spawn(share, (folder, free_port(), out), nprocs=2)
    for rank in (0, 1):
        pages = torch.load(f"{out}{rank}", weights_only=False)
        assert pages["Anonymous"] == 0, "copied pages"
        assert 0 < pages["Pss"] <= 0.6 * pages["Rss"], "half of each page is the other's"
