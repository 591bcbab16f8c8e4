"""Faster layers where the hardware has them: torch.compile, and matrix products in float8."""

from __future__ import annotations

import torch
from torch import nn

from solo_vlm.train.parallel.shard import decoder_layers
from solo_vlm.utils.errors import SoloError

_FLOAT8_SINCE = (8, 9)  # compute capability: Ada, Hopper and later


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer by itself: equal layers share their code, and FSDP's hooks stay outside."""
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Let the decoder's linear layers multiply in float8, scaled by tensor; weights stay what they are.

    The patch embedding and the head stay in the recipe's precision.

    Raises:
        SoloError: the device cannot, or torchao is not installed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_SINCE:
        raise SoloError("float8: needs a CUDA GPU of the Ada or Hopper generation or later; set it to false")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise SoloError("float8: needs torchao; pip install torchao") from error
    for layer in decoder_layers(model):
        convert_to_float8_training(layer)
