"""What the backward pass computes again instead of keeping it in memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from solo_vlm.train.parallel.shard import decoder_layers

# What takes long to compute: matrix products and attention. Everything else is computed again.
_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
}


def use_activation_checkpointing(model: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Let each decoder layer keep its input alone ("full"), or also the costly results ("selective").

    To be called before `compile_layers`: only what lies inside of compiled code can keep a selection.

    Sources: Chen et al. 2016, "Training deep nets with sublinear memory cost"; for the selection, Korthikanti
    et al. 2022, "Reducing activation recomputation in large transformer models".
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in decoder_layers(model):
        forward = partial(type(layer).forward, layer)  # by the class: layers alike share compiled code
        layer.forward = partial(checkpoint, forward, **options)  # type: ignore[method-assign]


def _policy(context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator._schema.name in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
