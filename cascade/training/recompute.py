"""Gradient checkpointing that changes nothing but memory."""

from __future__ import annotations

from torch import nn


def recompute_activations(model: nn.Module) -> None:
    """Let a transformers model, with or without PEFT around it, compute activations again instead of keeping them.

    Transformers does so in training mode alone, in which a base may drop out or add noise: that is taken away first,
    since a setting of how to compute must not change what is learned (and no checkpoint holds a random state).
    """
    silence(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()


def silence(model: nn.Module) -> None:
    """Set every probability of dropout, and every size of noise, of a model to zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else []:
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(holder, name, 0.0)
