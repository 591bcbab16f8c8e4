"""AdamW, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from solo_vlm.train.recipe import OptimizerSettings

PATCH_EMBEDDING = "embed_vision_patch."  # in the name of its weight, under adapters, too
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases are not decayed (as Megatron-LM has it).

    The patch embedding may have a rate of its own: under Adam the change of a layer's output grows with
    its inputs (Yang et al. 2022, "Tensor Programs V", table 3: rate ~ 1 / fan-in), and a patch has 3,072 of
    them, more than the hidden size of a small decoder.
    """
    rate = settings.patch_learning_rate or settings.learning_rate
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named_trainable(model):
        is_patch = PATCH_EMBEDDING in name
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        scale = rate / settings.learning_rate if is_patch else 1.0
        # One fused step takes parameters of one mesh: those that tensor parallelism splits are on another.
        key = (decay, scale, getattr(parameter, "device_mesh", None))
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
    optimizer = torch.optim.AdamW(
        list(groups.values()),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    # From the start, so that a checkpoint holds the same tensors whenever it is written.
    for _, parameter in named_trainable(model):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `min_learning_rate` (SOLO paper, section 3).

    Args:
        step: 0 for the first step, which already moves the weights.
        steps: of the whole run.
        settings: warm-up and bounds.
    """
    peak, floor = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all parameter groups, each in its proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters with their names, a tied one once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
