"""Two-dimensional positions of image patches, in any decoder with rotary position embeddings (RoPE).

A token has a position in the text, a row and a column. Text has row and column 0, so that it is rotated as in
the LLM, to the bit. The tokens of an image share one text position; their rows and columns rotate a part of
the frequencies each, interleaved as in Qwen3-VL (`apply_interleaved_mrope` in transformers). The text after
an image continues after the largest coordinate (Wang et al. 2024, "Qwen2-VL", section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

_layout: ContextVar[Tensor | None] = ContextVar("layout of the images", default=None)

Arrangement = Callable[[Tensor], Tensor]
"""Function from a value per frequency, (..., n), to the layout of a rotary module's output."""


def image_layout(
    input_ids: Tensor, vision_token_ids: tuple[int, int, int, int], position_ids: Tensor | None = None
) -> Tensor:
    """Locate the images of a sequence, and the tokens within them.

    Args:
        input_ids: (batch, length) int64; an image may be cut off at the end, but not at the beginning.
        vision_token_ids: IDs of `<vpatch>`, `<vision>`, `<vrow_sep>` and `</vision>`.
        position_ids: (batch, length) int64, index of each token in its document. None: one document per row.

    Returns:
        (4, batch, length) int64: image of a patch, counted from 0 within the row of the batch, -1 for other
        tokens; and for 2-D positions: shift of the position in the text, row and column. A `<vrow_sep>` lies
        in the row that it ends, after the last column.
    """
    patch, start, separator, _ = vision_token_ids
    length = input_ids.shape[-1]
    index = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    starts, separators = input_ids == start, input_ids == separator
    inside = (input_ids == patch) | separators
    ended_rows = separators.cumsum(-1)
    rows_before_image = torch.where(starts, ended_rows, 0).cummax(-1).values
    line = torch.where(starts | separators, index, -1).cummax(-1).values
    row = inside * (ended_rows - separators.long() - rows_before_image)
    column = inside * (index - _previous(line) - 1)
    image = starts.cumsum(-1)
    # A running maximum that restarts with each image: the number of the image dominates it.
    floor = image * (length + 1)
    span = (floor + inside * (1 + torch.maximum(row, column))).cummax(-1).values - floor
    was_inside = _previous(inside)
    step = torch.where(was_inside, torch.where(inside, 0, _previous(span)), 1)
    shift = (step - 1).cumsum(-1)
    if position_ids is not None:
        document = torch.where(position_ids == 0, index, 0).cummax(-1).values
        shift = shift - shift.gather(-1, document)
    return torch.stack([image * (input_ids == patch) - 1, shift, row, column])


def _previous(values: Tensor) -> Tensor:
    """Shift (batch, length) values by one place; the first is 0."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], -1)


@contextmanager
def rotated_by(layout: Tensor) -> Iterator[None]:
    """Apply an `image_layout` to all rotary embeddings computed in the body, to the last tokens of each."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def use_2d_positions(decoder: nn.Module, config: PreTrainedConfig, base: float | None) -> None:
    """Make the rotary modules of a decoder follow `rotated_by`, in place.

    Args:
        decoder: Base model of an LLM.
        config: Its configuration.
        base: Base of the frequencies of rows and columns. None: those of the text.

    Raises:
        ValueError: The decoder has no rotary modules, or they cannot be wrapped.
    """
    # Of layers that are recomputed in the backward pass, outside of `rotated_by`.
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    in_layers = {id(module) for layers in lists for module in layers.modules()}
    rotary = [module for module in decoder.modules() if _frequency_names(module)]
    if not rotary or any(id(module) in in_layers for module in rotary):
        raise ValueError(
            f"image_positions=2d needs rotary position embeddings, computed once for all layers, which "
            f"{config.model_type} does not have: use 1d"
        )
    for module in rotary:
        arrange = _arrangement(module, config)
        module.register_forward_pre_hook(_shift_positions, with_kwargs=True)
        module.register_forward_hook(partial(_rotate, arrange=arrange, base=base), with_kwargs=True)


def _frequency_names(module: nn.Module) -> list[str]:
    """Return the names of a rotary module's frequencies, one per layer type in some families."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if name.endswith("inv_freq") and "original" not in name]


def _arrangement(module: nn.Module, config: PreTrainedConfig) -> Arrangement:
    """Find out how a rotary module lays out its frequencies, from a copy on the CPU at position 1.

    Raises:
        ValueError: The layout is unknown.
    """
    kind: Any = type(module)
    try:
        with torch.device("cpu"):
            twin = kind(config)
            name = _frequency_names(twin)[0]
            layer_type = name.removesuffix("_inv_freq") if name != "inv_freq" else None
            options = {"layer_type": layer_type} if layer_type else {}
            states = torch.zeros(1, 1, 1, dtype=torch.float32)  # a model may be loaded in 16 bits
            output = twin(states, position_ids=torch.ones(1, 1, dtype=torch.long), **options)
    except Exception as error:  # any type, from any model family
        raise ValueError(
            f"image_positions=2d: {kind.__name__} cannot be wrapped ({error}): use 1d"
        ) from error
    frequencies = getattr(twin, name).float()
    angles = output.angle() if isinstance(output, Tensor) else torch.atan2(output[1], output[0])
    for arrange in (_once, _twice, _in_pairs):
        expected = torch.remainder(arrange(frequencies) + math.pi, 2 * math.pi) - math.pi
        if expected.shape == angles[0, 0].shape and torch.allclose(expected, angles[0, 0], atol=1e-4):
            return arrange
    raise ValueError(f"image_positions=2d: the layout of {kind.__name__} is unknown: use 1d")


def _once(values: Tensor) -> Tensor:
    return values


def _twice(values: Tensor) -> Tensor:
    return torch.cat([values, values], -1)


def _in_pairs(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, -1)


def _shift_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _layout.get() is None:
        return None
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": _shifted(kwargs["position_ids"])}
    return (args[0], _shifted(args[1]), *args[2:]), kwargs


def _shifted(position_ids: Tensor) -> Tensor:
    return position_ids + _of_last(position_ids.shape[-1])[1]


def _of_last(length: int) -> Tensor:
    """Return the layout of the last tokens; a decoder may rotate cached ones again, or only new ones."""
    layout: Any = _layout.get()
    if layout.shape[-1] < length:
        raise ValueError(
            f"image_positions=2d: the decoder rotates {length} tokens, but the layout has "
            f"{layout.shape[-1]}: pass the layout of the whole sequence"
        )
    return layout[..., -length:]


def _rotate(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    arrange: Arrangement,
    base: float | None,
) -> Any:
    """Rotate a module's output, for positions in the text, further by rows and columns."""
    if _layout.get() is None:
        return None
    layout = _of_last((output if isinstance(output, Tensor) else output[0]).shape[-2])
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    prefix = f"{layer_type}_" if layer_type else ""
    frequencies: Any = getattr(module, f"{prefix}inv_freq")
    # LongRoPE changes its frequencies with the length of a text, which rows and columns do not have.
    frequencies = getattr(module, f"{prefix}original_inv_freq", frequencies).to(frequencies.device)
    number = frequencies.numel()
    if base is not None:
        frequencies = base ** -(torch.arange(number, device=frequencies.device) / number)
    rows, columns = layout[2:, ..., None].float() * frequencies.float()  # (batch, length, n) each
    axis = _axes(number, frequencies.device)
    angle = torch.where(axis == 1, rows, torch.where(axis == 2, columns, 0.0))
    if isinstance(output, Tensor):
        return output * torch.polar(torch.ones_like(angle), arrange(angle))
    cos, sin = output
    more_cos, more_sin = arrange(angle.cos()), arrange(angle.sin())
    return (cos * more_cos - sin * more_sin).to(cos.dtype), (sin * more_cos + cos * more_sin).to(sin.dtype)


def _axes(number: int, device: torch.device) -> Tensor:
    """Return the axis of each frequency, (number,): 0 for text, 1 for rows, 2 for columns.

    Rows and columns have 20 frequencies of 64 each, every third one from the highest on, as in Qwen3-VL
    (`mrope_section` 24, 20, 20).
    """
    index = torch.arange(number, device=device)
    return torch.where(index < 3 * (number * 5 // 16), index % 3, 0)


__all__ = ["image_layout", "rotated_by", "use_2d_positions"]
