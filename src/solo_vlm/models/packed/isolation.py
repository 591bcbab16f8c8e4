"""Isolation of the documents of a packed row in every layer of a decoder."""

from __future__ import annotations

from transformers import AttentionInterface, PreTrainedModel

from solo_vlm.models.packed.attention import packed_attention
from solo_vlm.models.solo.modeling_solo import PACKED_ATTENTION

_REPLACED = (None, "eager", "sdpa", PACKED_ATTENTION)


def isolate_documents(model: PreTrainedModel) -> None:
    """Make the decoder compute each document of a packed row as if it were alone, in place.

    Attention becomes `packed_attention`: torch's flash attention on CUDA, batched SDPA elsewhere. Models with
    soft-capped attention scores (Gemma 2), which neither supports, and models loaded with flash-attn or flex
    attention keep transformers' attention, which isolates documents by `position_ids`.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or config._attn_implementation not in _REPLACED:
        return
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation(PACKED_ATTENTION)
