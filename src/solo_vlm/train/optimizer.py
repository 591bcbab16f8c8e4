"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from solo_vlm.train.recipe import OptimizerSettings

PATCH_EMBEDDING = "embed_vision_patch."  # part of its weight's name, with and without adapters
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state per parameter


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Create AdamW over the trainable parameters; norms and biases are not decayed, as in Megatron-LM.

    The patch embedding may have its own learning rate: under Adam, the change of a layer's output grows with
    its fan-in (Yang et al. 2022, "Tensor Programs V", table 3: rate ~ 1 / fan-in). A patch has 3,072 values,
    more than the hidden size of a small decoder.
    """
    rate = settings.patch_learning_rate or settings.learning_rate
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named_trainable(model):
        is_patch = PATCH_EMBEDDING in name
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        scale = rate / settings.learning_rate if is_patch else 1.0
        # A fused step needs parameters of a single mesh, and tensor-parallel ones have another mesh.
        key = (decay, scale, getattr(parameter, "device_mesh", None))
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
    optimizer = torch.optim.AdamW(
        list(groups.values()), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )
    # Initialized now, so that every checkpoint holds the same tensors.
    for _, parameter in named_trainable(model):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay (SOLO paper, section 3).

    Args:
        step: Index of the step, from 0; the first step already has a positive rate.
        total_steps: Steps of the whole run.
        settings: Warm-up and bounds.
    """
    peak, minimum = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total_steps - 1 - settings.warmup_steps)
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups, each multiplied by its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over (name, parameter) of the trainable parameters; tied ones come once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
