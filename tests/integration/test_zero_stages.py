"""ZeRO 0, 2 and 3 with two workers train the adapter that one process trains without DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from stand_in import free_port, save_tiny_base

from cascade.config import Base, Lora, Training
from cascade.models.base import load_base
from cascade.training.deepspeed_engine import DeepSpeedEngine
from cascade.training.examples import EncodedExample
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora
from cascade.training.packing import Step, plan_steps

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SETTINGS = Lora(rank=4, learning_rate=5e-3, epochs=2, tokens_per_step=90, max_length=48, gradient_clip=0.7)
STAGES = (0, 2, 3)


def make_plan(workers: int) -> list[Step]:
    examples = [
        EncodedExample(
            f"e{i}", tuple(5 + (i * 31 + j * 7) % 250 for j in range(n)), tuple(j >= n // 2 for j in range(n))
        )
        for i, n in enumerate([12, 30, 7, 40, 9, 22, 15, 33, 8, 19])
    ]
    return plan_steps(examples, SETTINGS, seed=1, workers=workers)


def make_module(folder: str, fused: bool) -> TargetLoss:
    base = load_base(Base(model=folder, dtype="float32"), torch.device("cpu"))
    return TargetLoss(add_lora(base, SETTINGS, seed=3), fused=fused)


def work(rank: int, folder: str, port: int, out: str) -> None:
    """One of two workers: each stage in turn; the first writes losses and weights."""
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, DS_ACCELERATOR="cpu")
    found = {}
    for stage in STAGES:
        engine = DeepSpeedEngine(
            make_module(folder, fused=stage < 3),
            Training(lora=SETTINGS, zero_stage=stage),
            torch.device("cpu"),
            torch.float32,
        )

        def add_up(value: float) -> float:
            total = torch.tensor([value], dtype=torch.float64)
            torch.distributed.all_reduce(total)
            return float(total)

        reports = list(run_steps(engine, make_plan(2), SETTINGS, rank=rank, world=2, reduce_sum=add_up))
        found[stage] = ([(r.loss, r.gradient_norm) for r in reports], engine.weights())
    if rank == 0:
        torch.save(found, out)


def test_all_stages_train_the_same_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_tiny_base(folder)
    out = tmp_path / "found.pt"
    torch.multiprocessing.spawn(work, (str(folder), free_port(), str(out)), nprocs=2)
    alone = make_module(str(folder), fused=True)
    expected = [(r.loss, r.gradient_norm) for r in run_steps(TorchEngine(alone, SETTINGS), make_plan(1), SETTINGS)]
    weights = {n: p.detach() for n, p in alone.model.named_parameters() if p.requires_grad}
    found = torch.load(out)
    assert set(found) == set(STAGES)
    for curve, trained in found.values():
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
        assert trained.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, atol=2e-4, rtol=1e-3)
