"""Kernels of recurrent and convolution layers that keep the documents of a packed row apart themselves.

transformers passes `seq_idx` and `cu_seqlens` on to the kernels that are installed, but drops them without a
word for one that does not take them. So no list says which layer may have a whole row: a copy of each kind of
layer is measured against groups of documents, on its device.
"""

from __future__ import annotations

import sys
from functools import wraps
from inspect import Parameter, getclosurevars, isfunction, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

_LENGTHS = (70, 5, 300, 1, 64, 130)  # of documents, within and across the chunks of kernels


class Use(NamedTuple):
    """Key of the kernels that a layer calls.

    Attributes:
        kind: Class of the layer.
        training: Training mode, for which some layers have a fused kernel.
        dtype: Dtype of the hidden states.
        device: Device of the hidden states.
    """

    kind: type[nn.Module]
    training: bool
    dtype: torch.dtype
    device: torch.device


def compute_without_kernels_on_cpu(model: nn.Module) -> None:
    """Make the layers of a model run on a CPU as well where their kernels, which need a GPU, are installed.

    transformers chooses between a kernel and plain PyTorch when it is imported. This replaces its choice, in
    the modules of the model's classes, by one for each call.
    """
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        for name, function in list(vars(module).items()):
            if isfunction(function) and getclosurevars(function).nonlocals.get("is_new_implementation"):
                setattr(module, name, _by_device(function))


def _by_device(kernel: Any) -> Any:
    reference = kernel.__wrapped__

    @wraps(kernel)
    def dispatched(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if states.device.type != "cpu":
            return kernel(states, *args, **kwargs)
        if any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens")):
            raise ValueError(f"{kernel.__name__} needs a GPU to keep packed documents apart")
        return reference(states, *args, **kwargs)

    return dispatched


def row_arguments(bounds: Tensor, length: int) -> dict[str, Tensor]:
    """Return the arguments that tell kernels of the documents, as transformers' collator names them.

    Args:
        bounds: (documents + 1,) int64, cumulative document lengths.
        length: Tokens of the row.
    """
    documents = torch.arange(len(bounds) - 1, device=bounds.device, dtype=torch.int32)
    index = documents.repeat_interleave(bounds.diff(), output_size=length)
    return {"seq_idx": index[None], "cu_seq_lens_q": bounds}


def takes_row_arguments(layer: nn.Module) -> bool:
    """Return whether a layer maps hidden states alone to others, and passes other arguments on to kernels.

    Layers that tensor parallelism splits are left out: their copies would have to be split as well.
    """
    parameters = [*signature(layer.forward).parameters.values()]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_more = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    is_split = any(isinstance(parameter, DTensor) for parameter in layer.parameters())
    return required == ["hidden_states"] and takes_more and not is_split


def kernel_fault(layer: nn.Module, use: Use, config: PreTrainedConfig, in_groups: Any) -> str | None:
    """Return why kernels of a layer may not have whole rows, or None.

    A row has to give what its documents give in groups, up to rounding. And in the same shape, where rounding
    hides nothing, no document may change the outputs of another, or get a gradient from them.

    Args:
        layer: Layer of the kind; its weights are not used, because they may be sharded.
        use: Its use.
        config: Configuration of the decoder.
        in_groups: Function of the forward of a layer, its arguments and the bounds of the documents.

    Raises:
        Exception: Kernels are not installed, or do not run; any type.
    """
    twin, generator = _twin(layer, use, config), torch.Generator(use.device).manual_seed(1)
    bounds = torch.tensor([0, *_LENGTHS], device=use.device).cumsum(0)
    shape = 1, sum(_LENGTHS), config.hidden_size
    states, other, weight = (torch.randn(shape, generator=generator, device=use.device) for _ in range(3))
    arguments = row_arguments(bounds, shape[1])
    is_odd = (arguments["seq_idx"] % 2).bool()[..., None]

    def run(states: Tensor, weight: Tensor, is_whole: bool = True) -> tuple[Tensor, Tensor]:
        own = states.to(use.dtype).requires_grad_()
        with torch.enable_grad():
            output = (
                twin(own, **arguments)
                if is_whole
                else in_groups(twin.forward, {"hidden_states": own}, bounds)
            )
            output = output if isinstance(output, Tensor) else output[0]
            (gradient,) = torch.autograd.grad((output * weight).sum(), own)
        return output.detach().float(), gradient.float()

    output, gradient = run(states, weight)  # without kernels, this ends at once
    expected, expected_gradient = run(states, weight, is_whole=False)
    after, gradient_of_odd = run(states.where(is_odd, other), weight * is_odd)
    error = max(_size(output - expected, expected), _size(gradient - expected_gradient, expected_gradient))
    leak = max(_size((after - output) * is_odd, output), _size(gradient_of_odd * ~is_odd, gradient_of_odd))
    precision = torch.finfo(use.dtype).eps
    if leak > max(precision, 1e-5):
        return f"its kernels let a document change the next by {leak:.2g}"
    return f"its kernels differ from documents alone by {error:.2g}" if error > precision**0.5 else None


@torch.no_grad()
def _twin(layer: nn.Module, use: Use, config: PreTrainedConfig) -> nn.Module:
    """Return a layer with random weights."""
    generator, weights = torch.Generator(use.device).manual_seed(0), next(layer.parameters())
    with torch.device(use.device):
        twin: nn.Module = use.kind(config, layer_idx=layer.layer_idx)  # type: ignore[call-arg]
    twin = twin.to(use.device, weights.dtype).train(use.training).requires_grad_(False)
    for parameter in twin.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(std=scale, generator=generator)
    for name, buffer in layer.named_buffers(recurse=False):  # some are set by the decoder
        twin.register_buffer(name, buffer)
    return twin


def _size(values: Tensor, reference: Tensor) -> float:
    """Return the largest value, relative to that of the reference; infinite for NaN."""
    size = float(values.abs().max() / reference.abs().max())
    return size if size == size else float("inf")
