"""A model over several processes: layers split by tensor parallelism, parameters sharded by FSDP2."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from solo_vlm.train.parallel.layout import UNIT, layers_at_once
from solo_vlm.train.parallel.processes import DATA, TENSOR, Processes
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def shard(model: PreTrainedModel, recipe: Recipe, processes: Processes, unit: int = UNIT) -> None:
    """Share a model among processes, in place; its parameters may still be on the meta device.

    Layers are split over the mesh's tensor dimension by the model family's own plan. Then the parameters of
    each layer, or of several small ones together, and those outside of layers, are sharded over the data
    dimension (FSDP2): float32 shards, gathered in the recipe's precision while they are needed. Gradients
    are summed, not averaged, over the data: the loss is already divided by the supervised tokens of all.

    Args:
        model: a SOLO model or an LLM of transformers, maybe with adapters.
        recipe: for precision and layout.
        processes: with a mesh.
        unit: see `layers_at_once`.

    Raises:
        SoloError: the model's family cannot be split as the recipe asks.
    """
    assert processes.mesh is not None
    layers = decoder_layers(model)
    if processes.layout.tensor > 1:
        _split_layers(model, layers, processes.mesh[TENSOR])
    dtype = torch.bfloat16 if recipe.precision == "bf16" else None
    options: dict[str, Any] = {
        "mesh": processes.mesh[DATA],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    together = layers_at_once(len(layers), sum(p.numel() for p in layers[0].parameters()), unit)
    for first in range(0, len(layers), together):
        some = layers[first : first + together]
        fully_shard(some, reshard_after_forward=recipe.parallel.reshard, **options)
    # What lies outside of the layers is used first and last: it stays gathered in between.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def fill(
    model: PreTrainedModel, state: dict[str, Any], buffers: dict[str, Tensor], device: torch.device
) -> None:
    """Give a sharded model on the meta device its values.

    Args:
        model: after `shard`.
        state: full tensors by name in the first process, empty in all others.
        buffers: all of them by name, in every process.
        device: to hold the shards.
    """
    model.to_empty(device=device)
    model.tie_weights()  # to_empty has untied what was tied
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def reshard(model: nn.Module) -> None:
    """Free all gathered weights, so that the model's parameters are the shards that the optimizer holds.

    After a forward pass without a backward pass, FSDP keeps what lies outside of layers gathered, and the
    layers, too, with `parallel.reshard: false`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def agree_on_replicas(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of what tensor parallelism has not split over the processes that hold copies.

    The copies' gradients are equal but for the order of sums on an accelerator; without this they would
    drift apart.
    """
    group, size = mesh.get_group(TENSOR), mesh[TENSOR].size()
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and TENSOR not in (gradient.device_mesh.mesh_dim_names or ()):
            dist.all_reduce(gradient.to_local(), group=group)
            gradient.to_local().div_(size)


def _split_layers(model: PreTrainedModel, layers: list[nn.Module], mesh: DeviceMesh) -> None:
    config = model.config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan or not set(plan.values()) <= _STYLES.keys():
        raise SoloError(f"parallel.tensor: {config.model_type} models cannot be split; set it to 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % mesh.size():
            raise SoloError(
                f"parallel.tensor = {mesh.size()} does not divide the model's {name}, {getattr(config, name)}"
            )
    styles = {re.sub(r"^layers\.\*\.", "", name): _STYLES[style] for name, style in plan.items()}
    for layer in layers:
        parallelize_module(layer, mesh, {name: style() for name, style in styles.items()})


# The styles in transformers' plans whose layers compute on local heads and features. The norms of single
# heads ("replicated") get whole heads: their input is split over heads, (batch, length, heads, head_dim).
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "replicated_with_grad_allreduce": partial(SequenceParallel, sequence_dim=2, use_local_output=True),
}
