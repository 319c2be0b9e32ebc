"""The training loop: one function that runs a plan of steps on any engine (plain torch here, DeepSpeed beside it)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cascade.config import Lora
from cascade.errors import DataError
from cascade.training.fused import compile_layers, fuse_lora
from cascade.training.layout import Layout, layout_for
from cascade.training.measures import StepReport, mean
from cascade.training.memory import memory_bytes
from cascade.training.packing import Row, Step
from cascade.training.schedule import learning_rate_at

MOST_SKIPPED = 3
"""Steps in a row without a finite gradient that end a training: it would not come back."""


class TargetLoss(nn.Module):
    """Cross-entropy over target tokens alone, summed; logits are computed at those positions and nowhere else."""

    def __init__(self, model: nn.Module, *, fused: bool = True) -> None:
        """
        Args:
            fused: compute LoRA layers by `cascade.training.fused`, which goes past the hooks of A and B.
        """
        super().__init__()
        self.model = model
        if fused:
            fuse_lora(model)
        self.inputs: Layout = layout_for(model)
        """A row and a device to what `forward` takes."""
        self.cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = summed_cross_entropy

    def compile_parts(self, backend: Any = "inductor") -> None:
        """Let torch.compile join the operations of the decoder layers, and those of the loss, into fewer kernels.

        Compiled, the loss makes no float32 copies of the logits, the largest tensors of all.
        """
        compile_layers(self.model, backend)
        self.cross_entropy = torch.compile(summed_cross_entropy, dynamic=True, backend=backend)

    def forward(self, *, target_ids: torch.Tensor, **row: Any) -> torch.Tensor:
        """Sum of −log p over the row's targets (nats).

        Args:
            target_ids: shape (targets,). row: what `logits` takes.
        """
        return self.cross_entropy(self.logits(**row), target_ids)

    def each(self, *, target_ids: torch.Tensor, **row: Any) -> torch.Tensor:
        """−log p of each of the row's targets (nats, float32), shape (targets,); arguments as those of `forward`."""
        return nn.functional.cross_entropy(self.logits(**row).float(), target_ids, reduction="none")

    def logits(
        self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, target_index: torch.Tensor, **bounds: Any
    ) -> torch.Tensor:
        """Of the targets, shape (targets, vocabulary); shapes as `Row.tensors` gives them.

        Args:
            bounds: where examples begin, for the attention (`cascade.training.layout`).
        """
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=target_index,
            **bounds,
        ).logits
        return logits[0]


def summed_cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Sum of −log p (nats) in float32; logits of shape (targets, vocabulary)."""
    return nn.functional.cross_entropy(logits.float(), target_ids, reduction="sum")


class Engine(Protocol):
    """What runs forward, backward and the optimiser."""

    device: torch.device

    def loss(self, row: Row) -> torch.Tensor:
        """Summed loss of a row, with gradient."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient's norm before clipping. One that is not finite updates nothing."""


class TorchEngine:
    """A plain single-process engine: AdamW on the trainable parameters."""

    def __init__(self, module: TargetLoss, settings: Lora) -> None:
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.clip = settings.gradient_clip
        self.optimizer = adamw(module, settings)

    def loss(self, row: Row) -> torch.Tensor:
        loss: torch.Tensor = self.module(**self.module.inputs(row, self.device))
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        set_rate(self.optimizer, learning_rate)
        norm = clip_or_drop(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)


def clip_or_drop(parameters: Sequence[nn.Parameter], most: float) -> torch.Tensor:
    """Clip gradients to a norm, or drop them if they are not finite: the optimiser then leaves all as it is.

    Returns:
        Their norm before.
    """
    norm = nn.utils.clip_grad_norm_(parameters, most)
    if not torch.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
    return norm


def adamw(module: nn.Module, settings: Lora) -> torch.optim.AdamW:
    """Fused AdamW on the trainable parameters; LoRA+ has B in a group whose rate is so many times A's."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if settings.lora_plus is None:
        groups: list[dict[str, Any]] = [{"params": [p for _, p in named], "rate_factor": 1.0}]
    else:
        a, b = ([p for name, p in named if ("lora_B" in name) == is_b] for is_b in (False, True))
        groups = [{"params": a, "rate_factor": 1.0}, {"params": b, "rate_factor": settings.lora_plus}]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's learning rate to its multiple of this one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)


def run_steps(
    engine: Engine,
    plan: Sequence[Step],
    settings: Lora,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    reduce_sum: Callable[[float], float] = lambda value: value,
) -> Iterator[StepReport]:
    """Run the steps `start`… of a plan, yielding what each measured (the same on every worker).

    The loss of a step is the mean over its target tokens on all workers, so the number of workers and how rows
    fall to them do not change what is learned. Engines average gradients over workers, hence the factor `world`.
    A step whose loss or gradient is not finite changes nothing and is reported as skipped.

    Args:
        reduce_sum: sums a number over all workers.

    Raises:
        DataError: several steps in a row were skipped; the last of them is not yielded, so that who takes no more than
            the plan has learns of it too.
    """
    skipped: list[StepReport] = []
    for number in range(start, len(plan)):
        step, began = plan[number], time.perf_counter()
        summed = torch.zeros((), device=engine.device)
        for row in step.share(rank, world):
            # A worker without a row still takes part in the collective work, with a loss of zero weight.
            loss = engine.loss(row or step.rows[0])
            weight = world / step.targets if row is not None else 0.0
            # A loss that is not finite makes all gradients so, on all workers: none of them takes the step.
            engine.backward(loss * torch.where(loss.detach().isfinite(), weight, math.nan))
            if row is not None:
                summed += loss.detach()  # read after the step: reading waits for a GPU
        rate = learning_rate_at(number, len(plan), settings)
        norm = engine.step(rate)
        loss_mean = reduce_sum(float(summed)) / step.targets
        seconds = time.perf_counter() - began
        counts = step.tokens, step.targets, seconds, step.sample_ids, world, memory_bytes(engine.device)
        found = StepReport(number, loss_mean, rate, norm, *counts)
        skipped = [*skipped, found] if found.skipped else []
        if len(skipped) >= min(MOST_SKIPPED, len(plan)):
            raise DataError(_not_finite(skipped))
        yield found


def _not_finite(skipped: Sequence[StepReport]) -> str:
    ids = list(dict.fromkeys(i for report in skipped for i in report.sample_ids))
    shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
    return (
        f"loss or gradient was not finite in {len(skipped)} steps in a row (from step {skipped[0].step + 1} on), which "
        f"were skipped; they learn from {shown}. Lower training.lora.learning_rate or training.lora.alpha, set "
        "base.dtype to float32, or take these examples out; what the last checkpoint holds is sound"
    )


def summed_loss(engine: Engine, step: Step, rank: int, world: int) -> float:
    """This worker's part of the loss (nats) summed over a step's targets; all workers do equally many rows."""
    total = 0.0
    for row in step.share(rank, world):
        loss = engine.loss(row or step.rows[0])
        total += float(loss) if row is not None else 0.0
    return total


@torch.no_grad()
def target_losses(module: TargetLoss, rows: Sequence[Row], device: torch.device) -> NDArray[np.float32]:
    """Loss of every target (nats) without learning, shape (targets,), row after row."""
    found = [module.each(**module.inputs(row, device)).cpu().numpy() for row in rows]
    return np.concatenate([np.empty(0, np.float32), *found])


def mean_loss(module: TargetLoss, rows: Sequence[Row], device: torch.device) -> float:
    """Mean loss per target token (nats) without learning; NaN for no rows."""
    return mean(target_losses(module, rows, device))
