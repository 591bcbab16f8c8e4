"""Activation checkpointing, layer by layer, and compilation of the layers."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from solo_vlm.models.load import decoder_layers
from solo_vlm.utils.errors import SoloError

Mode = Literal["full", "selective", "none"]
MODES: tuple[Mode, ...] = ("full", "selective", "none")

SAVED_OPERATORS = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
}
"""Operators that are expensive to compute: matrix products and attention. "selective" saves their results,
and recomputes everything else."""


@dataclass(frozen=True)
class LayerModes:
    """Numbers of layers by their activation checkpointing, in order from the first layer.

    The last layers keep most: the backward pass begins with them, and has freed their activations when it
    recomputes a whole layer.

    Attributes:
        full: Layers that keep only their input.
        selective: Layers that also keep their expensive results.
        none: Layers that keep everything.
    """

    full: int = 0
    selective: int = 0
    none: int = 0

    @classmethod
    def uniform(cls, mode: Mode, layers: int) -> Self:
        """Return the same mode for all layers."""
        return cls(**{mode: layers})

    @property
    def layers(self) -> list[Mode]:
        """Mode of each layer."""
        return [mode for mode, count in zip(MODES, astuple(self), strict=True) for _ in range(count)]

    @property
    def recomputed(self) -> float:
        """Share of the layers whose products are computed again."""
        return self.full / max(sum(astuple(self)), 1)

    def __str__(self) -> str:
        return f"full in {self.full} layers, selective in {self.selective}, none in {self.none}"


def prepare_layers(
    model: PreTrainedModel, modes: LayerModes | Mode, is_compiled: bool = False, is_split: bool = False
) -> LayerModes:
    """Set the activation checkpointing of each decoder layer, and compile it on its own, in place.

    Equal layers share compiled code, and FSDP's hooks stay outside of it.

    References: Chen et al. 2016, "Training deep nets with sublinear memory cost"; Korthikanti et al. 2022,
    "Reducing activation recomputation in large transformer models".

    Args:
        is_split: Whether tensor parallelism splits the layers.

    Returns:
        The modes.
    """
    layers = decoder_layers(model)
    if not layers and (is_compiled or modes != "none"):
        raise SoloError(
            "activation_checkpointing and compile: the decoder has no list of layers; unset both settings"
        )
    if isinstance(modes, str):
        modes = LayerModes.uniform(modes, len(layers))
    for layer, mode in zip(layers, modes.layers, strict=True):
        # A selection is only effective inside compiled code. But torch cannot compile a checkpoint around a
        # layer that is split, so that stays outside.
        compile_first = mode == "full" and is_split
        if is_compiled and compile_first:
            _compile(layer)
        _checkpoint(layer, mode)
        if is_compiled and not compile_first:
            _compile(layer)
    return modes


def _checkpoint(layer: nn.Module, mode: Mode) -> None:
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _checkpoint_policy)
    # The class's, so that layers share compiled code; after compilation, the compiled one.
    forward = vars(layer).get("forward") or partial(type(layer).forward, layer)
    layer.forward = partial(checkpoint, forward, **options)  # type: ignore[method-assign]


def _compile(layer: nn.Module) -> None:
    layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]


def _checkpoint_policy(
    context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    is_saved = operator._schema.name in SAVED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
