"""The training loop's engine on DeepSpeed: ZeRO 0 to 3, CPU offload, bf16 with float32 master weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cascade.config import Training
from cascade.training.loop import TargetLoss, adamw, set_rate
from cascade.training.packing import Row


def deepspeed_config(training: Training, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration for our settings.

    Gradient accumulation is the loop's (`managed_gradient_accumulation` off): a step has as many rows as it has.
    Stage 0 trains the adapter in float32 beside a base of any dtype, so it needs no master weights, and its
    checkpoints fit any number of workers; it clips in the engine below, which DeepSpeed does not tell the norm of.
    """
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload and training.zero_stage >= 1:
        zero["offload_optimizer"] = offload
    if training.offload and training.zero_stage == 3:
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.lora.gradient_clip if training.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16 and training.zero_stage > 0},
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """`cascade.training.loop.Engine` on `deepspeed.initialize`. Needs an initialised process group."""

    def __init__(self, module: TargetLoss, training: Training, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # On a CPU DeepSpeed would compile a shared-memory operator at first use: that takes minutes and a C++ compiler,
        # which the machine may not have, and a process killed meanwhile leaves a lock on which all later ones wait for
        # ever. Without it gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device, self.module, self.stage = device, module, training.zero_stage
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.norm: torch.Tensor | None = None
        optimizer = adamw(module, training.lora)
        if not self.stage:
            optimizer.register_step_pre_hook(lambda *_: self._clip(training.lora.gradient_clip))
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=self.parameters,
            config=deepspeed_config(training, dtype),
        )

    def loss(self, row: Row) -> torch.Tensor:
        loss: torch.Tensor = self.engine(**self.module.inputs(row, self.device))
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        set_rate(self.optimizer, learning_rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.stage else self.norm
        return float(norm) if norm is not None else float("nan")

    def _clip(self, most: float) -> None:
        """Clip gradients that were just averaged over the workers, before the optimiser takes its step."""
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, most)

    def save(self, folder: str | Path, step: int) -> None:
        """This worker's part of a checkpoint: trainable weights, optimiser, next step. Every worker calls it."""
        self.engine.save_checkpoint(
            str(folder), tag="state", client_state={"next_step": step}, exclude_frozen_parameters=True
        )

    def load(self, folder: str | Path) -> int:
        """Continue from a checkpoint; returns the next step."""
        path, state = self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"no DeepSpeed checkpoint in {folder}")
        return int(state["next_step"])

    def weights(self) -> dict[str, torch.Tensor]:
        """Trainable parameters by name in the model, whole and in float32, on the CPU. Every worker calls it."""
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.model.named_parameters():
            if parameter.requires_grad:
                full = safe_get_full_fp32_param(parameter) if self.stage else None
                whole = parameter if full is None else full.reshape(getattr(parameter, "ds_shape", parameter.shape))
                found[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return found
