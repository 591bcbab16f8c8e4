"""Tensor parallelism and FSDP2 for SOLO models and LLMs of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from solo_vlm.models.load import decoder_layers
from solo_vlm.train.parallel.context import REPLICATE, SHARD, TP, DistributedContext
from solo_vlm.train.parallel.tensor_parallel import split_layers
from solo_vlm.train.parallel.vocabulary import split_head
from solo_vlm.train.recipe import Recipe

FSDP_UNIT_SIZE = 100_000_000
"""Parameters gathered together where single layers are smaller."""


def layers_per_fsdp_unit(num_layers: int, layer_size: int, unit_size: int = FSDP_UNIT_SIZE) -> int:
    """Return how many layers are gathered, and their gradients reduced, together; sizes are in parameters.

    Each unit costs a constant overhead of Python and communication, which dominates small models sharded
    layer by layer. Large layers are separate units, to limit the weights gathered at a time.
    """
    units = min(num_layers, max(1, math.ceil(num_layers * layer_size / unit_size)))
    return math.ceil(num_layers / units)


def shard_model(
    model: PreTrainedModel, recipe: Recipe, context: DistributedContext, unit_size: int = FSDP_UNIT_SIZE
) -> None:
    """Shard a model in place; its parameters may still be on the meta device.

    Layers are split over the `tp` dimension by the tensor-parallel plan of the model's family. Then each FSDP
    unit (one or several layers), and the parameters outside layers, are sharded over the `shard` dimension:
    float32 shards, gathered in the recipe's precision. Gradients are summed over all processes, not averaged,
    because the loss is already divided by the supervised tokens of all of them.
    """
    mesh = context.parameter_mesh
    assert mesh is not None
    layers = decoder_layers(model)
    if context.dims.tp > 1:
        split_layers(model, mesh[TP])
        split_head(model, mesh[TP])
    dtype = torch.bfloat16 if recipe.precision == "bf16" else None
    options: dict[str, Any] = {
        "mesh": mesh[REPLICATE, SHARD] if context.dims.replicate > 1 else mesh[SHARD],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    size = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    count = layers_per_fsdp_unit(len(layers), round(size / len(layers)), unit_size) if layers else 1
    for first in range(0, len(layers), count):
        unit = layers[first : first + count]
        fully_shard(unit, reshard_after_forward=recipe.parallel.reshard, **options)
    # Parameters outside layers are used first and last, so they stay gathered in between.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def load_full_state_dict(
    model: PreTrainedModel, state_dict: dict[str, Any], buffers: dict[str, Tensor], device: torch.device
) -> None:
    """Materialize a sharded model from the meta device.

    Args:
        state_dict: Full tensors by name in rank 0, empty in all other ranks.
        buffers: All buffers by name, in every rank.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    model.to_empty(device=device)
    for first, *others in names.values():  # to_empty unties them; tie_weights does not know adapters
        for name in others:
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_parameter(own, model.get_parameter(first))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if state_dict:
            whole.copy_(state_dict[name])
        dist.broadcast(whole, src=0)
        assert isinstance(parameter, DTensor)
        layout = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(whole, *layout, src_data_rank=None))


def reduce_gradients(model: nn.Module, is_last: bool, deferred: bool) -> None:
    """Choose which gradients the next backward pass of a sharded model sums over processes.

    Args:
        is_last: Whether it is the last of its step. Only then are gradients summed over copies of the
            parameters.
        deferred: Whether to sum gradients over shards only then, too.
    """
    if not isinstance(model, FSDPModule):
        return
    if deferred:
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)


def gather_outside_layers(model: nn.Module) -> None:
    """Gather the weights outside layers, which generation uses before it calls the model; see `reshard`."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Free all gathered weights, so that the model's parameters are the shards held by the optimizer.

    After a forward pass without backward, FSDP keeps the weights outside layers gathered, and with
    `parallel.reshard: false` those of layers, too.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_replicated_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of parameters that tensor parallelism replicates.

    The replicas' gradients differ only by the order of sums on an accelerator; without averaging, the
    replicas would drift apart.
    """
    group, size = mesh.get_group(TP), mesh[TP].size()
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and TP not in (gradient.device_mesh.mesh_dim_names or ()):
            dist.all_reduce(gradient.to_local(), group=group)
            gradient.to_local().div_(size)
