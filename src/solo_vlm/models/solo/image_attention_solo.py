"""Attention in both directions between the patches of one image, where a configuration asks for it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate

PACKED_ATTENTION = "solo_packed"  # of training: it makes its masks itself, document by document
_TAKE_MASKS = ("eager", "sdpa", "flex_attention")


def image_index(input_ids: Tensor, image_token_id: int, vision_start_token_id: int) -> Tensor:
    """Which image of its row a patch belongs to.

    Args:
        input_ids: (batch, length) int64.
        image_token_id: of `<vpatch>`.
        vision_start_token_id: of `<vision>`.

    Returns:
        (batch, length) int64, counted from 0; -1 for everything that is no patch.
    """
    return (input_ids == vision_start_token_id).cumsum(-1) * (input_ids == image_token_id) - 1


def image_masks(
    config: PreTrainedConfig,
    index: Tensor,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> Any:
    """The decoder's own causal masks, opened between the patches of an image.

    Args:
        config: of the decoder.
        index: (batch, length), see `image_index`.
        inputs_embeds: (batch, length, hidden).
        attention_mask: (batch, length) with what the cache holds, 0 at padding.
        position_ids: (batch, length); where they restart, another document begins.
        past_key_values: cache of what came before.

    Returns:
        (batch, 1, length, all keys), or a dict of such by kind of layer.

    Raises:
        ValueError: the attention in use takes no masks.
    """
    if config._attn_implementation not in _TAKE_MASKS:
        raise ValueError(
            f"attention in both directions inside images works with {', '.join(_TAKE_MASKS)}, not with "
            f"{config._attn_implementation}"
        )
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    return create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        block_sequence_ids=F.pad(index, (past, 0), value=-1),  # no image goes on from what is cached
    )


__all__ = ["PACKED_ATTENTION", "image_index", "image_masks"]
