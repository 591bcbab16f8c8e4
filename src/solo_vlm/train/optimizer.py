"""Optimizers, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.optim.adamw import adamw
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solo_vlm.models.load import decoder_layers
from solo_vlm.train.experts import router_modules
from solo_vlm.train.recipe import OptimizerSettings
from solo_vlm.utils.errors import SoloError

PATCH_EMBEDDING = "embed_vision_patch."  # part of its weight's name, with and without adapters
BLOCK_SIZE = 64
"""Consecutive values of a row that share a scale in 8 bits; divides the sizes of LLMs, also split in 8."""

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5, 1e-7  # coefficients, steps and epsilon, as torch's Muon
_MUON_SCALE = 0.2  # RMS of AdamW's updates: Liu et al. 2025, "Muon is scalable for LLM training", section 2.2


def make_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Create the optimizer of the trainable parameters; norms and biases are not decayed, as in Megatron-LM.

    The patch embedding may have its own learning rate: under Adam, the change of a layer's output grows with
    its fan-in (Yang et al. 2022, "Tensor Programs V", table 3: rate ~ 1 / fan-in). A patch has 3,072 values,
    more than the hidden size of a small decoder.

    Raises:
        SoloError: 8-bit moments without torchao, or with blocks that cross the parts of a split matrix; no
            matrices for Muon.
    """
    if settings.name == "adamw_8bit":
        _require_torchao()
    rate = settings.patch_learning_rate or settings.learning_rate
    inside = _matrices(model, only_linear=settings.name == "muon")
    if settings.name == "muon" and not inside:
        raise SoloError("optimizer.name = muon: found no linear layers in decoder layers; use adamw")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named_trainable(model):
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        scale = rate / settings.learning_rate if PATCH_EMBEDDING in name else 1.0
        muon = settings.name == "muon" and parameter in inside
        # A fused step needs parameters of a single mesh, and tensor-parallel ones have another mesh.
        key = (decay, scale, muon, getattr(parameter, "device_mesh", None))
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "scale": scale, "muon": muon})
        group["params"].append(parameter)
    kinds = {"adamw": torch.optim.AdamW, "muon": Muon}
    optimizer = kinds.get(settings.name, CompactAdamW)(
        list(groups.values()), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )
    # Initialized now, so that every checkpoint holds the same tensors.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = _initial_state(parameter, settings.name, parameter in inside)
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


class CompactAdamW(torch.optim.AdamW):
    """AdamW with moments stored in bfloat16 or 8 bits, and computed in float32, one parameter at a time.

    8-bit moments (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization") are `exp_avg` and
    `exp_avg_sq` as codes, and one scale per block of a row. Codes and scales are sharded like the parameter,
    so a checkpoint restores them exactly in any layout.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = {name: _local(tensor) for name, tensor in self.state[parameter].items()}
                first, second = _read(state, "exp_avg"), _read(state, "exp_avg_sq")
                parts = (parameter, parameter.grad, first, second, state["step"])
                _adamw(group, *([_local(tensor)] for tensor in parts))
                _write(state, "exp_avg", first)
                _write(state, "exp_avg_sq", second)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for groups marked `muon`, AdamW for the others.

    The same as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, for sharded matrices as well: it
    takes the learning rate and weight decay of AdamW.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["muon"]:
                states = [self.state[parameter] for parameter in parameters]
                names = ("exp_avg", "exp_avg_sq", "step")
                moments = ([state[name] for state in states] for name in names)
                _adamw(group, parameters, [parameter.grad for parameter in parameters], *moments)
                continue
            alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
            for parameter in parameters:
                key = (parameter.shape, getattr(parameter, "placements", None))
                alike.setdefault(key, []).append(parameter)
            for matrices in alike.values():
                self._step_matrices(matrices, group["lr"], group["weight_decay"])

    def _step_matrices(self, matrices: Sequence[nn.Parameter], rate: float, decay: float) -> None:
        """Update matrices of one shape and layout."""
        updates = []
        for matrix in matrices:
            assert matrix.grad is not None
            buffer = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - self.momentum)
            updates.append(matrix.grad.lerp(buffer, self.momentum).bfloat16())
        scale = _MUON_SCALE * math.sqrt(max(matrices[0].shape))
        for matrix, update in zip(matrices, orthogonalize(updates), strict=True):
            matrix.mul_(1 - rate * decay).add_(update, alpha=-rate * scale)


def orthogonalize(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the nearest semi-orthogonal matrices, by Newton-Schulz iterations in bfloat16.

    Sharded matrices are exchanged by an all-to-all, so that each process computes some of them whole.

    Args:
        matrices: Matrices of one shape in bfloat16, sharded alike or not at all.
    """
    stacked = whole = torch.stack(list(matrices))
    if isinstance(stacked, DTensor):
        whole = stacked.redistribute(placements=[Shard(0)] * stacked.device_mesh.ndim)
    for matrix in _local(whole):
        matrix.copy_(_zeropower_via_newtonschulz(matrix, *_NEWTON_SCHULZ))
    if isinstance(stacked, DTensor) and isinstance(whole, DTensor):
        whole = whole.redistribute(placements=stacked.placements)
    return whole.unbind()


def _matrices(model: PreTrainedModel, only_linear: bool) -> set[nn.Parameter]:
    """Return the matrices of decoder layers, without routers.

    Args:
        only_linear: Leave out experts and whatever else is not the weight of a linear layer.
    """
    routers = router_modules(model)
    return {
        parameter
        for layer in decoder_layers(model)
        for module in layer.modules()
        if module not in routers
        for parameter in module.parameters(recurse=False)
        if (isinstance(module, nn.Linear | Conv1D) and parameter.ndim == 2)
        or (not only_linear and parameter.ndim > 1)
    }


def _initial_state(parameter: nn.Parameter, name: str, is_inside: bool) -> dict[str, Tensor]:
    """Return the zero state of a parameter.

    Args:
        name: Name of the optimizer.
        is_inside: Whether the parameter is a matrix of a decoder layer.
    """
    if name == "muon" and is_inside:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    dtype = torch.bfloat16 if name == "adamw_bf16" else parameter.dtype
    is_quantized = name == "adamw_8bit" and is_inside and parameter.shape[-1] % BLOCK_SIZE == 0
    if is_quantized:
        dtype = torch.uint8
        if width := _local(parameter).shape[-1] % BLOCK_SIZE:
            raise SoloError(
                f"optimizer.name = adamw_8bit: blocks of {BLOCK_SIZE} values do not divide the {width} "
                "columns that tensor parallelism leaves of a matrix; lower parallel.tensor, or use adamw_bf16"
            )
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment] = torch.zeros_like(parameter, dtype=dtype)
        if is_quantized:
            state[f"{moment}_scale"] = _zero_scales(parameter.detach())
    return state


def _require_torchao() -> None:
    try:
        import torchao.optim.quant_utils  # noqa: F401
    except ImportError as error:
        raise SoloError(
            "optimizer.name = adamw_8bit: requires torchao; pip install 'solo-vlm[low-bit]'"
        ) from error


def _adamw(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
) -> None:
    """Run torch's AdamW with the settings of a group."""
    beta1, beta2 = group["betas"]
    settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
    adamw(parameters, gradients, first, second, [], steps, beta1=beta1, beta2=beta2, **settings)


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    """Return a moment in float32."""
    moment = state[name]
    if f"{name}_scale" not in state:
        return moment.float()
    table = _quantization_map(name == "exp_avg", moment.device)
    blocks = table[moment.int()].unflatten(-1, (-1, BLOCK_SIZE))
    return (blocks * state[f"{name}_scale"][..., None]).flatten(-2)


def _write(state: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Store a moment given in float32."""
    if f"{name}_scale" not in state:
        state[name].copy_(values)
        return
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    blocks = values.unflatten(-1, (-1, BLOCK_SIZE))
    scale = state[f"{name}_scale"].copy_(blocks.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny))
    table = _quantization_map(name == "exp_avg", values.device)
    state[name].copy_(quantize_8bit_with_qmap((blocks / scale[..., None]).flatten(-2), table))


@cache
def _quantization_map(signed: bool, device: torch.device) -> Tensor:
    """Return the values of the 256 codes, ascending."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), device=device)


def _zero_scales(parameter: Tensor) -> Tensor:
    """Return a scale per block, sharded like the parameter."""
    local = _local(parameter)
    scales = local.new_zeros((*local.shape[:-1], local.shape[-1] // BLOCK_SIZE))
    if not isinstance(parameter, DTensor):
        return scales
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // BLOCK_SIZE))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        scales, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
