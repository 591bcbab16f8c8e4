"""One optimizer step: the gradient of a global batch, over all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from solo_vlm.data.collate import PackedBatch
from solo_vlm.data.encode import IGNORE_INDEX
from solo_vlm.train.parallel.processes import Processes
from solo_vlm.train.parallel.shard import agree_on_replicas
from solo_vlm.train.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """What came of a step.

    Attributes:
        loss: mean over all supervised tokens of the global batch.
        gradient_norm: before clipping.
        finite: whether both are, and so the weights were changed.
        losses: of each of this process's sequences: their shares of `loss`.
    """

    loss: float
    gradient_norm: float
    finite: bool
    losses: list[float]


def take_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    supervised: int,
    recipe: Recipe,
    processes: Processes,
) -> Step:
    """Move the weights by the gradient of the mean loss over all supervised tokens of all processes.

    They stay as they are where loss or gradient is not finite.

    Args:
        model: in training mode.
        optimizer: over its trainable parameters, its rate set.
        batches: this process's packed sequences of the global batch, one forward and backward pass each.
        supervised: tokens with a label in the whole global batch.
        recipe: for precision and clipping.
        processes: those that take the step together.
    """
    losses = forward_backward(model, batches, supervised, precision(recipe, processes))
    (loss,) = processes.sum(sum(losses))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if processes.mesh is not None and processes.layout.tensor > 1:
        agree_on_replicas(parameters, processes.mesh)
    norm = clip_gradients(parameters, recipe.optimizer.max_grad_norm)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return Step(loss, norm, finite, losses)


def forward_backward(
    model: PreTrainedModel,
    batches: Sequence[PackedBatch],
    supervised: int,
    precision: AbstractContextManager[Any],
) -> list[float]:
    """Accumulate gradients; return each batch's sum of losses over `supervised`."""
    losses = []
    for batch in batches:
        with precision:
            inputs = model_inputs(model, batch)
            loss = model(**inputs, use_cache=False, num_items_in_batch=max(supervised, 1)).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def model_inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """The batch on the model's device; an LLM is not given the (empty) image inputs."""
    images = ("pixel_values", "image_grid_thw")
    return {
        name: value.to(model.device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if model.config.model_type == "solo" or name not in images
    }


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their common norm is at most `max_norm`; return what it was."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [
        _whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in by_mesh.values()
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm.item()


def supervised_tokens(batches: Sequence[PackedBatch]) -> int:
    """Tokens that carry a label; the first of a row never counts, nothing comes before it."""
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def precision(recipe: Recipe, processes: Processes) -> AbstractContextManager[Any]:
    """Autocast for a model that is not sharded; a sharded one gathers its weights in bfloat16 by itself."""
    is_sharded = processes.mesh is not None and not recipe.quantize
    if recipe.precision == "fp32" or is_sharded:
        return nullcontext()
    return torch.autocast(processes.device.type, dtype=torch.bfloat16)


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
