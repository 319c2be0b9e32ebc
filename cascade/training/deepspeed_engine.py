"""The training loop's engine on DeepSpeed: ZeRO 0 to 3, CPU offload, bf16 with float32 master weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cascade.config import Training
from cascade.errors import DataError
from cascade.training.loop import TargetLoss, adamw, clip_or_drop, set_rate
from cascade.training.memory import has_room
from cascade.training.packing import Row
from cascade.training.pissa import START
from cascade.training.state_file import State, apart, joined, pinned, read_state

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter beside the number of its steps."""


def deepspeed_config(training: Training, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration for our settings.

    Gradient accumulation is the loop's (`managed_gradient_accumulation` off): a step has as many rows as it has.
    Stage 0 trains the adapter in float32 beside a base of any dtype, so it needs no master weights; it clips in the
    engine below, which DeepSpeed does not tell the norm of. The other stages skip a step whose gradient is not finite.
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
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at both ends of a step
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
        named = dict(module.model.named_parameters())
        self.trainable = {name: p for name, p in named.items() if p.requires_grad}
        # Kept as they are: DeepSpeed rounds them to bfloat16, and spreads them over the workers in stage 3.
        self.frozen = {name: _on_cpu(p) for name, p in named.items() if "lora_" in name and not p.requires_grad}
        self.start = {name: named[name] for name in self.frozen if f".{START}." in name}
        """What PiSSA takes off again, of the model."""
        self.norm: torch.Tensor | None = None
        optimizer = adamw(module, training.lora)
        if not self.stage:
            optimizer.register_step_pre_hook(lambda *_: self._clip(training.lora.gradient_clip))
        for name, parameter in named.items():
            if "lora_" not in name:
                # DeepSpeed's mark of what it does not send from the first worker to the others. They have the base, and
                # on a CPU as pages of its file, which all processes of a machine share until one is written to.
                setattr(parameter, "ds_optim_param", True)  # noqa: B010 (a name that mypy does not know)
        if device.type == "cuda":
            pinned()  # now, for the checkpoints: to pin memory holds up all work on the GPU
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=list(self.trainable.values()),
            config=deepspeed_config(training, dtype),
        )
        if not self.stage:
            # DeepSpeed looks for gradients in all modules of the base; and with one worker it would copy those of all
            # layers together and back only to divide them by one.
            self.engine.zero_grad = optimizer.zero_grad
            self.engine.enable_backward_allreduce = torch.distributed.get_world_size() > 1

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
        self.norm = clip_or_drop(list(self.trainable.values()), most)

    def state(self, step: int) -> State | None:
        """A checkpoint for `write_state`, fit for any stage and number of workers: copies of weights and moments, as
        they are now, the next step, and PiSSA's start.

        The copies are where the originals are, if the steps to come leave room there, else on the CPU: on a GPU they
        take its memory, not the training's time.

        LoRA's state is small enough to be gathered whole. Every worker calls it, the first gets it.
        """
        if updates := self._updates():
            self._link_moments()
        first = torch.distributed.get_rank() == 0
        trainable = self.trainable if self.stage or first else {}  # others only take part in gathering
        weights = [self._whole(parameter) for parameter in trainable.values()]
        moments = {key: [self._moment(p, key) for p in trainable.values()] for key in MOMENTS} if updates else {}
        if not first:
            return None
        numbers = sum(weight.numel() for weight in weights)
        stay = has_room(self.device, 4 * numbers * (1 + len(moments)))
        return State(
            next_step=step,
            updates=updates,
            shapes={name: tuple(weight.shape) for name, weight in zip(trainable, weights, strict=True)},
            weights=joined(weights, stay=stay),
            moments={key: joined(tensors, stay=stay) for key, tensors in moments.items()},
            start={name: self.frozen[name].bfloat16() for name in self.start},  # whose numbers they are
        )

    def load(self, folder: str | Path) -> int:
        """Continue from a checkpoint; returns the next step.

        Raises:
            DataError: it is none, or one of another adapter.
        """
        state = read_state(folder)
        if set(self.trainable) != set(state.shapes):
            raise DataError(f"{folder} is a checkpoint of another adapter or base than this one")
        if state.updates:
            self._make_moments(state.updates)
        for name, weight in apart(state.weights, state.shapes):
            self._set_weight(self.trainable[name], weight)
        for key, moments in state.moments.items():
            for name, moment in apart(moments, state.shapes):
                self._set(self.trainable[name], moment, key)
        for name, start in state.start.items():  # which another machine may not have computed alike
            self.frozen[name].copy_(start)
            self.start[name].data.copy_(start)
        return state.next_step

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters of the adapter by name in the model, the frozen ones too, whole and in float32, on the CPU.

        Every worker calls it.
        """
        return self.frozen | {name: _on_cpu(self._whole(p)) for name, p in self.trainable.items()}

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if not self.stage:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        whole: torch.Tensor = safe_get_full_fp32_param(parameter)
        return whole.reshape(getattr(parameter, "ds_shape", parameter.shape))

    def _moment(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        if not self.stage:
            return self.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW that DeepSpeed's optimiser of stage 1 to 3 holds, or itself."""
        inner: torch.optim.Optimizer = self.optimizer.optimizer if self.stage else self.optimizer
        return inner

    def _stepped(self) -> list[torch.Tensor]:
        """What AdamW has in its hands: the parameters, or this worker's flat parts of them."""
        if not self.stage:
            return list(self.trainable.values())
        parts = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, parts))

    def _updates(self) -> int:
        """Steps that AdamW has taken; those that were skipped are none."""
        states = [self._inner.state.get(tensor, {}) for tensor in self._stepped()]
        found = [torch.as_tensor(state["step"]) for state in states if "step" in state]
        return int(torch.stack(found).max()) if found else 0  # read at once: each reading waits for a GPU

    def _make_moments(self, updates: int) -> None:
        """AdamW's state as it is after so many steps, with moments of zero."""
        for tensor in self._stepped():
            step = torch.tensor(float(updates), device=tensor.device)
            self._inner.state[tensor] = {"step": step, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed find the parameters' places in the flat moments of stages 1 and 2.

        It looks once, after the first step of the first of AdamW's groups: the other one of LoRA+ has none by then.
        """
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_weight(self, parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        """Of the model, in its own dtype, and the exact one that AdamW goes on from."""
        from deepspeed import zero

        with zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3), torch.no_grad():
            parameter.copy_(weight)
        if self.stage:
            self._set(parameter, weight)

    def _set(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Of a whole tensor, what AdamW has of it here: a moment, or the parameter itself without a key."""
        from deepspeed import utils

        if not self.stage:
            self.optimizer.state[parameter][key].copy_(value)
            return
        if self.stage < 3:
            write, part = "full", value
        else:  # DeepSpeed's own setter of whole tensors does not fill up those that the workers do not divide
            spread: Any = parameter
            write, count = "local", spread.ds_tensor.numel()
            flat = torch.nn.functional.pad(value.flatten(), (0, count * torch.distributed.get_world_size()))
            part = flat.narrow(0, count * torch.distributed.get_rank(), count)
        if key is None:
            getattr(utils, f"safe_set_{write}_fp32_param")(parameter, part)
        else:
            getattr(utils, f"safe_set_{write}_optimizer_state")(parameter, part, key)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
