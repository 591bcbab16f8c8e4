"""Tensor parallelism: decoder layers split over processes, by the plans of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial, wraps
from inspect import signature
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from solo_vlm.models.load import model_without_weights
from solo_vlm.utils.errors import SoloError

Split = Callable[[nn.Module, nn.Module, DeviceMesh], Any]
"""Splits a module in place; the second argument is the module that has it as a child."""

# What transformers' plans lack, by model type.
_ATTENTION = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
_MLP = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_OF_HEADS = "replicated_with_grad_allreduce"  # a norm of each head alone

_ADDITIONS: dict[str, dict[str, str]] = {
    "falcon_h1": {
        **_ATTENTION,
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    },
    "hunyuan_v1_dense": {
        **_ATTENTION,
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.query_layernorm": _OF_HEADS,
        "layers.*.self_attn.key_layernorm": _OF_HEADS,
        **_MLP,
    },
    "lfm2": {
        **_ATTENTION,
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.self_attn.q_layernorm": _OF_HEADS,
        "layers.*.self_attn.k_layernorm": _OF_HEADS,
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
    },
    "apertus": {"layers.*.mlp.act_fn": "applied_to_parts"},  # its parameters see split features
    "gpt_oss": {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn": "local_params",
        "layers.*.mlp.experts": "moe_tp_experts",
    },
    "llama4_text": {"layers.*.feed_forward.shared_expert": "copied"},  # changed in place
}


def tensor_parallel_obstacle(config: PreTrainedConfig, size: int = 2) -> str | None:
    """Return why the decoder layers of a model cannot be split over `size` processes; None if they can.

    Args:
        config: Configuration of a SOLO model or a plain LLM; no weights are needed.
    """
    return _find_obstacle(model_without_weights(config), size)


def check_tensor_parallel(config: PreTrainedConfig, size: int) -> None:
    """Raise SoloError if the decoder layers of a model cannot be split over `size` processes."""
    if size == 1:
        return
    model = model_without_weights(config)
    if obstacle := _find_obstacle(model, size):
        smaller = [n for n in range(2, size) if size % n == 0 and not _find_obstacle(model, n)]
        raise SoloError(
            f"parallel.tensor = {size}: tensor parallelism does not support this {model.config.model_type} "
            f"model: {obstacle}; set parallel.tensor to {' or '.join(map(str, [1, *smaller]))}"
        )


def split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the decoder layers of a model in place; its parameters may still be on the meta device.

    The model must have passed `check_tensor_parallel`. Split parameters become DTensors, and so do parameters
    whose gradients are partial, because each process applies them to its own features only. All others stay
    as they are.
    """
    modules, plan = dict(model.named_modules()), _plan(model)
    sharing = _sharing_inputs(model, plan)
    for name, style in plan.items():
        owner = modules[_owner(name)]
        if name not in modules:
            placement = Shard(_dimension(model.get_parameter(name), style))
            _distribute(owner, name.rpartition(".")[2], mesh, placement)
        elif style == "colwise" and _owner(name) in sharing:
            split_outputs(modules[name], mesh)
        else:
            _STYLES[style](modules[name], owner, mesh)
    for name in sharing:
        sum_input_gradients(modules[name], mesh)


def keep_share(model: PreTrainedModel, size: int) -> None:
    """Reduce a model without weights, in place, to what one of `size` processes holds and computes.

    Instead of the other processes' parts, it has its own once more, so shapes are those of a whole model.
    """
    modules = dict(model.named_modules())
    for name, style in _plan(model).items():
        module = modules.get(name)
        if module is None:
            _narrow(modules[_owner(name)], name.rpartition(".")[2], _DIMENSIONS[style], size)
        elif style == "moe_tp_experts":
            _keep_experts(module, size)
        elif style in _SPLIT_FEATURES:
            _keep_features(module, style, size)


class Exchange(NamedTuple):
    """Values per token that processes exchange for one module of the plan.

    Attributes:
        kind: Kind of the collective.
        forward, backward: Values of the forward pass, and of the backward pass without recomputation.
        is_last: Whether no other module of its layer exchanges anything after it in the forward pass.
    """

    kind: Literal["all-reduce", "all-gather"]
    forward: int
    backward: int
    is_last: bool = False


def list_exchanges(model: PreTrainedModel) -> list[Exchange]:
    """Return what processes that split the layers of a model exchange; it needs no weights."""
    modules, plan = dict(model.named_modules()), _plan(model)
    sharing = _sharing_inputs(model, plan)
    by_layer: dict[str, list[Exchange]] = {}
    for name, style in plan.items():
        if name in modules and not (style == "colwise" and _owner(name) in sharing):
            found = _exchanges_of(modules[name], modules[_owner(name)], style, model.config)
            by_layer.setdefault(_layer_of(name), []).extend(found)
    for layer in by_layer.values():
        last = max((i for i, exchange in enumerate(layer) if exchange.forward), default=None)
        if last is not None:
            layer[last] = layer[last]._replace(is_last=True)
    sums = [
        Exchange("all-reduce", 0, next(c.in_features for c in modules[n].modules() if type(c) is nn.Linear))
        for n in sharing
    ]
    return [*chain.from_iterable(by_layer.values()), *sums]


def _exchanges_of(module: Any, owner: Any, style: str, config: PreTrainedConfig) -> list[Exchange]:
    text: Any = config.get_text_config(decoder=True)
    match style:
        case "colwise":
            return [Exchange("all-reduce", 0, module.in_features)]
        case "rowwise":
            return [Exchange("all-reduce", module.out_features, 0)]
        case "colwise_gather_output":
            return [
                Exchange("all-reduce", 0, module.in_features),
                Exchange("all-gather", module.out_features, 0),
            ]
        case "rowwise_split_input":
            return [
                Exchange("all-reduce", module.out_features, 0),
                Exchange("all-gather", 0, module.in_features),
            ]
        case "mla_kv_a_proj":
            return [Exchange("all-reduce", 0, owner.qk_rope_head_dim)]
        case "moe_tp_experts" | "all_reduce":  # of states, and in the backward pass of their weights
            routed = getattr(text, "num_experts_per_tok", 0) if style == "moe_tp_experts" else 0
            return [Exchange("all-reduce", text.hidden_size, text.hidden_size + routed)]
    return []


def _layer_of(name: str) -> str:
    return re.sub(r"([.]\d+)[.].*", r"\1", name, count=1)


def _keep_features(module: nn.Module, style: str, size: int) -> None:
    is_input = _SPLIT_FEATURES[style] in ("in_features", "num_embeddings")
    if isinstance(module, nn.Embedding):
        _narrow(module, "weight", 0 if is_input else 1, size)
    else:
        _narrow(module, "weight", 1 if is_input else 0, size)
        if module.bias is not None and not is_input:
            _narrow(module, "bias", 0, size)
    if style in ("colwise_gather_output", "embedding_colwise"):
        module.register_forward_hook(lambda module, args, output: torch.cat([output] * size, dim=-1))
    elif style == "rowwise_split_input":
        module.register_forward_pre_hook(lambda module, args: (args[0].chunk(size, dim=-1)[0],))


def _keep_experts(experts: nn.Module, size: int) -> None:
    """Keep a share of the experts, and of the tokens that are routed to any."""
    for name, _ in list(experts.named_parameters(recurse=False)):
        _narrow(experts, name, 0, size)
    if len(signature(type(experts).forward).parameters) - 1 == _ROUTED:  # besides self
        experts.num_experts = next(experts.parameters()).shape[0]  # type: ignore[assignment]
    forward = experts.forward

    def run(*args: Tensor, **kwargs: Tensor) -> Tensor:
        def own(states: Tensor) -> Tensor:
            return states.chunk(size)[0]

        output = forward(*map(own, args), **{name: own(states) for name, states in kwargs.items()})
        return torch.cat([output] * size)

    experts.forward = run  # type: ignore[method-assign]


def _narrow(module: nn.Module, name: str, dimension: int, size: int) -> None:
    """Keep the first of `size` parts of a parameter."""
    parameter = module.get_parameter(name)
    part = parameter.detach().chunk(size, max(dimension, -parameter.ndim))[0]
    module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the style of each module and parameter in decoder layers that has one, by name.

    Experts are distributed whole. transformers' plan splits each of them; but their gate and up projections
    are one tensor, of which each process would hold two pieces, and a checkpoint can only describe one.
    """
    config = model.config.get_text_config(decoder=True)
    rules = (getattr(config, "base_model_tp_plan", None) or {}) | _ADDITIONS.get(config.model_type, {})
    styles = {
        re.compile(r"(.*\.)?" + re.escape(rule).replace(r"\*", r"\d+")): style
        for rule, style in rules.items()
    }
    modules = dict(model.named_modules())
    layers = tuple(f"{n}." for n, module in modules.items() if isinstance(module, GradientCheckpointingLayer))
    names = [name for name in (*modules, *dict(model.named_parameters())) if name.startswith(layers)]
    found = {name: style for name in names for rule, style in styles.items() if rule.fullmatch(name)}
    return {
        name: style
        for name, style in found.items()
        if name in modules or found.get(_owner(name)) != "moe_tp_experts"
    }


def _dimension(parameter: nn.Parameter, style: str) -> int:
    """Return the dimension along which a style splits a single parameter."""
    return max(parameter.ndim + _DIMENSIONS[style], 0)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _find_obstacle(model: PreTrainedModel, size: int) -> str | None:
    plan = _plan(model)
    if not plan:
        return "transformers has no plan for its layers"
    for name, reason in _obstacles(model, plan, size):
        return f"{re.sub(r'.*?[.][0-9]+[.]', '', name, count=1)} {reason}"
    return None


def _obstacles(model: PreTrainedModel, plan: dict[str, str], size: int) -> Iterator[tuple[str, str]]:
    """Yield the name of each part that cannot be split as planned, with the reason."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, style in plan.items():
        module = modules.get(name)
        owner = modules[_owner(name)]
        if style not in (_DIMENSIONS if module is None else _STYLES):
            yield name, f"is planned as {style}, which is not supported"
        elif module is None:
            if (length := parameters[name].shape[_dimension(parameters[name], style)]) % size:
                yield name, f"has a size of {length}, not divisible by {size}"
        elif style == "moe_tp_experts":
            if not _is_distributable(module):
                yield name, "are not the experts of which processes can take a share each"
            elif module.num_experts % size:
                yield name, f"are {module.num_experts}, not divisible by {size}"
        elif style in _SPLIT_FEATURES:
            if not isinstance(module, nn.Linear | nn.Embedding):
                yield name, f"is a {type(module).__name__}, neither a linear layer nor an embedding"
            elif (features := getattr(module, _SPLIT_FEATURES[style])) % size:
                yield name, f"has {features} features, not divisible by {size}"
            elif style == "colwise" and (heads := _num_heads(name, module, owner)) % size:
                yield name, f"has {heads} heads, not divisible by {size}"
    yield from _unplanned(model, plan)


def _num_heads(name: str, projection: Any, owner: Any) -> int:
    """Return the heads of a projection by attention, or the features of any other linear layer."""
    head_dim = getattr(owner, "head_dim", None)
    if name.endswith("v_proj"):
        head_dim = getattr(owner, "v_head_dim", head_dim)
    features: int = projection.out_features
    if head_dim and features % head_dim == 0:
        return features // head_dim
    if hasattr(owner, "num_heads"):
        return int(owner.num_heads)
    if "attention" in type(owner).__name__.lower():
        return int(owner.config.num_attention_heads)
    return features


def _is_distributable(experts: nn.Module) -> bool:
    """Return whether every parameter has a row per expert, and forward takes routed or sorted tokens."""
    count = getattr(experts, "num_experts", None) or next(experts.parameters()).shape[0]
    rows = {parameter.shape[0] for parameter in experts.parameters(recurse=False)}
    return rows == {count} and len(signature(experts.forward).parameters) in (_SORTED, _ROUTED)


def _unplanned(model: PreTrainedModel, plan: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield parameters beside split projections that the plan does not mention, unless they see whole states.

    A norm of heads, for example, whose gradient would be that of a few heads. Projections of the hidden
    states see whole states, and so do further parts of latent attention.
    """
    hidden = model.config.get_text_config(decoder=True).hidden_size
    modules = dict(model.named_modules())
    split = {name: style for name, style in plan.items() if style == "colwise"}
    for owner in dict.fromkeys(map(_owner, split)):
        inputs = {
            getattr(modules.get(name), "in_features", hidden) for name in split if _owner(name) == owner
        }
        for name, parameter in modules[owner].named_parameters(prefix=owner):
            is_planned = any(f"{name}.".startswith(f"{n}.") for n in plan if n != owner)
            sees_all = parameter.shape[-1] == hidden or inputs != {hidden}
            if not is_planned and (_owner(name) == owner or not sees_all):
                yield name, "is beside split layers, but not in the plan"


def _sharing_inputs(model: PreTrainedModel, plan: dict[str, str]) -> set[str]:
    """Return the names of modules whose hidden states only split projections see.

    Their gradients are summed once per module, not once per projection.
    """
    modules, styles = (
        dict(model.named_modules()),
        {"colwise", "rowwise", "replicated_with_grad_allreduce", "applied_to_parts"},
    )
    found = set()
    for owner in {_owner(name) for name, style in plan.items() if style == "colwise" and name in modules}:
        inside = {name: style for name, style in plan.items() if name.startswith(f"{owner}.")}
        parameters = [name for name, _ in modules[owner].named_parameters(prefix=owner)]
        is_planned = all(any(f"{name}.".startswith(f"{part}.") for part in inside) for name in parameters)
        is_plain = all(
            type(modules[name]) is nn.Linear
            for name in inside
            if inside[name] == "colwise" and name in modules
        )
        if is_planned and is_plain and set(inside.values()) <= styles:
            found.add(owner)
    return found


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by a DTensor."""
    parameter = module.get_parameter(name)
    shards = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(shards, requires_grad=parameter.requires_grad))


def _sum_gradients(states: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return states, equal in all processes, whose gradient is the sum of what each process computes."""
    return DTensor.from_local(states, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def reduce_parts(states: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """Return the whole of what each process has a part or an addend of."""
    whole = DTensor.from_local(states, mesh, [placement]).redistribute(placements=[Replicate()])
    return whole.to_local()


def _use_local_parameters(module: nn.Module, gradient: Placement | None = None) -> None:
    """Let forward see this process's part of the module's own parameters.

    Args:
        gradient: Placement of the parameters' gradients; default: that of the parameters.
    """
    forward = module.forward
    placements = [gradient] if gradient else None

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = {n: p for n, p in module._parameters.items() if isinstance(p, DTensor)}
        local = {n: p.to_local(grad_placements=placements) for n, p in own.items()}
        module._parameters.update(local)  # not leaves, so setattr would reject them
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = run  # type: ignore[method-assign]


def _by_torch(style: Callable[[], ParallelStyle]) -> Split:
    return lambda module, owner, mesh: parallelize_module(module, mesh, style())


def split_outputs(module: nn.Linear, mesh: DeviceMesh) -> None:
    """Split the output features of a linear layer, whose input has its gradients summed already."""
    for name, _ in list(module.named_parameters()):
        _distribute(module, name, mesh, Shard(0))

    def run(input: Tensor) -> Tensor:
        weight, bias = (p.to_local() if isinstance(p, DTensor) else p for p in (module.weight, module.bias))
        return F.linear(input, weight, bias)

    module.forward = run  # type: ignore[method-assign]


def sum_input_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of the first argument, the hidden states."""
    first = next(iter(signature(module.forward).parameters))

    def run(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (_sum_gradients(args[0], mesh), *args[1:]), kwargs
        return args, kwargs | {first: _sum_gradients(kwargs[first], mesh)}

    module.register_forward_pre_hook(run, with_kwargs=True)


def _run_on_parts(module: nn.Module, owner: nn.Module, mesh: DeviceMesh) -> None:
    _use_local_parameters(module)


def _apply_to_parts(module: nn.Module, owner: nn.Module, mesh: DeviceMesh) -> None:
    """Replicate a module that sees this process's features only, such as a norm of single heads."""
    for name, _ in list(module.named_parameters(recurse=False)):
        _distribute(module, name, mesh, Replicate())
    _use_local_parameters(module, Partial())


def _add_outputs(module: nn.Module, owner: nn.Module, mesh: DeviceMesh) -> None:
    """Add the outputs of a module whose own parameters are split."""
    _use_local_parameters(module)
    forward = module.forward

    def run(*args: Tensor, **kwargs: Tensor) -> Tensor:
        args = tuple(_sum_gradients(states, mesh) for states in args)
        kwargs = {name: _sum_gradients(states, mesh) for name, states in kwargs.items()}
        return reduce_parts(forward(*args, **kwargs), mesh, Partial())

    module.forward = run  # type: ignore[method-assign]


def _copy_output(module: nn.Module, owner: nn.Module, mesh: DeviceMesh) -> None:
    """Return a copy, because autograd forbids to change an all-reduced tensor in place."""
    module.register_forward_hook(lambda module, args, output: output.clone())


def _share_rotary_key(module: nn.Module, owner: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradient of the last features, the part of latent attention's keys that all heads share."""

    def run(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        size = owner.qk_rope_head_dim
        latent, rotary = output.tensor_split([-int(size)], dim=-1)  # type: ignore[arg-type]
        return torch.cat([latent, _sum_gradients(rotary, mesh)], dim=-1)

    module.register_forward_hook(run)


def _distribute_experts(module: nn.Module, owner: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process an equal share of the experts; it computes the tokens routed to them."""
    for name, _ in list(module.named_parameters(recurse=False)):
        _distribute(module, name, mesh, Shard(0))
    takes = signature(module.forward)
    count = next(module.parameters()).shape[0] // mesh.size()
    first = mesh.get_local_rank() * count
    module.num_experts = count  # type: ignore[assignment]
    _use_local_parameters(module)
    forward = module.forward

    def run_routed(*args: Tensor, **kwargs: Tensor) -> Tensor:
        states, experts, weights = takes.bind(*args, **kwargs).args
        states, weights = _sum_gradients(states, mesh), _sum_gradients(weights, mesh)
        experts = experts - first
        token, slot = ((experts >= 0) & (experts < count)).nonzero(as_tuple=True)
        chosen, scale = experts[token, slot], weights[token, slot]
        if not len(token):  # take part in the backward pass nevertheless
            token, chosen, scale = token.new_zeros(1), chosen.new_zeros(1), 0 * weights[0, :1]
        output = forward(states[token], chosen[:, None], scale[:, None])
        return reduce_parts(torch.zeros_like(states).index_add(0, token, output), mesh, Partial())

    def run_sorted(states: Tensor) -> Tensor:
        whole = DTensor.from_local(states, mesh, [Replicate()])
        return reduce_parts(forward(whole.redistribute(placements=[Shard(0)]).to_local()), mesh, Shard(0))

    module.forward = run_sorted if len(takes.parameters) == _SORTED else run_routed


_SORTED, _ROUTED = (
    1,
    3,
)  # arguments of experts: tokens sorted by expert, or tokens, their experts, and weights
_SPLIT_FEATURES = {
    "colwise": "out_features",
    "colwise_gather_output": "out_features",
    "rowwise": "in_features",
    "rowwise_split_input": "in_features",
    "embedding_rowwise": "num_embeddings",
    "embedding_colwise": "embedding_dim",
}
_DIMENSIONS = {"colwise": -2, "rowwise": -1}  # of a single parameter
_STYLES: dict[str, Split] = {
    "colwise": _by_torch(ColwiseParallel),
    "colwise_gather_output": _by_torch(partial(ColwiseParallel, output_layouts=Replicate())),
    "rowwise": _by_torch(RowwiseParallel),
    "rowwise_split_input": _by_torch(partial(RowwiseParallel, input_layouts=Replicate())),
    "embedding_rowwise": _by_torch(partial(RowwiseParallel, input_layouts=Replicate())),
    "embedding_colwise": _by_torch(partial(ColwiseParallel, output_layouts=Replicate())),
    "replicated_with_grad_allreduce": _apply_to_parts,  # norms of single heads
    "applied_to_parts": _apply_to_parts,
    "local_params": _run_on_parts,
    "all_reduce": _add_outputs,
    "copied": _copy_output,
    "mla_kv_a_proj": _share_rotary_key,
    "moe_tp_experts": _distribute_experts,
}
