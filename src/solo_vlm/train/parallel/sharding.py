"""Tensor parallelism and FSDP2 for SOLO models and LLMs of transformers."""

from __future__ import annotations

import math
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from solo_vlm.train.parallel.context import DP, TP, DistributedContext
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

FSDP_UNIT_SIZE = 100_000_000
"""Parameters gathered together where single layers are smaller."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


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
    unit (one or several layers), and the parameters outside layers, are sharded over the `dp` dimension:
    float32 shards, gathered in the recipe's precision. Gradients are summed, not averaged, over `dp`, because
    the loss is already divided by the supervised tokens of all processes.
    """
    assert context.mesh is not None
    layers = decoder_layers(model)
    if context.dims.tp > 1:
        _split_layers(model, context.mesh[TP])
    dtype = torch.bfloat16 if recipe.precision == "bf16" else None
    options: dict[str, Any] = {
        "mesh": context.mesh[DP],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    count = layers_per_fsdp_unit(len(layers), sum(p.numel() for p in layers[0].parameters()), unit_size)
    for first in range(0, len(layers), count):
        unit = layers[first : first + count]
        fully_shard(unit, reshard_after_forward=recipe.parallel.reshard, **options)
    # Parameters outside layers are used first and last, so they stay gathered in between.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def load_full_state_dict(
    model: PreTrainedModel, state_dict: dict[str, Any], buffers: dict[str, Tensor], device: torch.device
) -> None:
    """Materialize a sharded model from the meta device.

    Args:
        state_dict: Full tensors by name in rank 0, empty in all other ranks.
        buffers: All buffers by name, in every rank.
    """
    model.to_empty(device=device)
    model.tie_weights()  # to_empty unties them
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state_dict, options=options)


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


def tensor_parallel_obstacle(config: PreTrainedConfig, size: int = 2) -> str | None:
    """Return why the layers of a decoder cannot be split over `size` processes; None if they can.

    Args:
        config: Configuration of a SOLO model or a plain LLM; weights are not needed.
    """
    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    return _find_obstacle(model, size)


def _split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    config = model.config.get_text_config()
    if obstacle := _find_obstacle(model, mesh.size()):
        raise SoloError(f"tensor parallelism does not support {config.model_type}: {obstacle}")
    for name, style in _tensor_parallel_plan(model).items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        if parameter in module._parameters:
            _shard_parameter(module, parameter, mesh, _DIMENSIONS[style])
        else:
            if style == "mla_kv_a_proj":
                model.get_submodule(name).rotary_size = config.qk_rope_head_dim
            _STYLES[style](model.get_submodule(name), mesh)


def _find_obstacle(model: PreTrainedModel, size: int) -> str | None:
    config = model.config.get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        return "transformers has no plan for it"
    plan = _tensor_parallel_plan(model)
    if unknown := sorted(set(plan.values()) - _STYLES.keys()):
        return f"its plan uses {', '.join(unknown)}"
    return None


def _tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the style of each module and parameter in the decoder's layers that transformers' plan names."""
    rules = {
        re.compile(r"(?:.*\.)?" + re.escape(rule).replace(r"\*", r"\d+")): style
        for rule, style in model.config.get_text_config().base_model_tp_plan.items()
    }
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    inside = [name for name in names if any(name.startswith(f"{layer}.") for layer in layers)]
    matches = {name: style for name in inside for rule, style in rules.items() if rule.fullmatch(name)}
    experts = {name for name, style in matches.items() if style == "moe_tp_experts"}
    return {
        name: style
        for name, style in matches.items()
        if name.rpartition(".")[0] not in experts
        or style not in _DIMENSIONS
    }


def _shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None) -> None:
    """Replace a parameter by a DTensor, sharded along a dimension or replicated."""
    parameter = module._parameters[name]
    assert parameter is not None
    placement = Replicate() if dim is None else Shard(max(dim, -parameter.ndim) % parameter.ndim)
    sharded = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _copy(states: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the states, of equal value in all processes; their gradients are summed."""
    return DTensor.from_local(states, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _sum(states: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of the processes' states."""
    return DTensor.from_local(states, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def _with_local_parameters(module: nn.Module, forward: Callable[..., Any], partial_gradients: bool = False) -> Callable[..., Any]:
    """Wrap a module's forward so that it sees this process's shards of the module's own parameters."""

    def run(*args: Any, **kwargs: Any) -> Any:
        own = {n: p for n, p in module._parameters.items() if isinstance(p, DTensor)}
        options: dict[str, Any] = {"grad_placements": [Partial()]} if partial_gradients else {}
        module._parameters.update({n: p.to_local(**options) for n, p in own.items()})
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    return run


def _run_locally(module: nn.Module, mesh: DeviceMesh) -> None:
    module.forward = _with_local_parameters(module, module.forward)


def _replicate_with_partial_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Norms of heads: each process sees its own heads."""
    for name in list(module._parameters):
        if module._parameters[name] is not None:
            _shard_parameter(module, name, mesh, None)
    module.forward = _with_local_parameters(module, module.forward, partial_gradients=True)


def _split_experts(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process an equal number of whole experts.

    transformers' plan splits every expert instead. The shards of packed gate and up projections would then be
    strided, which checkpoints cannot describe.
    """
    for name in list(module._parameters):
        _shard_parameter(module, name, mesh, 0)
    count = module.num_experts // mesh.size()
    first = mesh.get_local_rank() * count
    module.num_experts = count
    forward = _with_local_parameters(module, module.forward)

    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        states, weights = _copy(hidden_states, mesh), _copy(top_k_weights, mesh)
        index = top_k_index - first
        token, slot = ((index >= 0) & (index < count)).nonzero(as_tuple=True)
        chosen, scale = index[token, slot], weights[token, slot]
        if not len(token):
            token, chosen, scale = token.new_zeros(1), chosen.new_zeros(1), 0 * weights[:1, 0]
        output = forward(states[token], chosen[:, None], scale[:, None])
        return _sum(torch.zeros_like(states).index_add(0, token, output), mesh)

    module.forward = run


def _sum_rotary_gradients(module, mesh):
    """Latent attention: the part of the keys with rotary positions is shared by all heads."""

    def hook(module, args, output):
        size = module.rotary_size
        latent, rotary = output.split([output.shape[-1] - size, size], dim=-1)
        return torch.cat([latent, _copy(rotary, mesh)], dim=-1)

    module.register_forward_hook(hook)


def _sum_outputs(module: nn.Module, mesh: DeviceMesh) -> None:
    module.register_forward_hook(lambda module, args, output: _sum(output, mesh))


def _torch(style: Callable[[], ParallelStyle]):
    def apply(module, mesh):
        parallelize_module(module, mesh, style())

    return apply


_DIMENSIONS = {"colwise": -2, "rowwise": -1, "packed_colwise": -2, "packed_rowwise": -1}
_STYLES = {
    "colwise": _torch(ColwiseParallel),
    "rowwise": _torch(RowwiseParallel),
    "colwise_gather_output": _torch(partial(ColwiseParallel, output_layouts=Replicate())),
    "rowwise_split_input": _torch(partial(RowwiseParallel, input_layouts=Replicate())),
    "replicated_with_grad_allreduce": _replicate_with_partial_gradients,
    "local_params": _run_locally,
    "moe_tp_experts": _split_experts,
    "mla_kv_a_proj": _sum_rotary_gradients,
    "all_reduce": _sum_outputs,
    "embedding_rowwise": _torch(partial(RowwiseParallel, input_layouts=Replicate())),
    "embedding_colwise": _torch(partial(ColwiseParallel, output_layouts=Replicate())),
}
