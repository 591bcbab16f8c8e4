"""Weights in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from solo_vlm.utils.errors import SoloError

PATCH_EMBEDDING = "embed_vision_patch"
HEAD = "lm_head"

Quantization = Literal["int8", "nf4"]


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to hold the decoder's linear layers in few bits.

    The patch embedding, through which all that is seen must go, and the head stay as they are.

    Args:
        kind: "int8" (LLM.int8: Dettmers et al. 2022), or "nf4" for 4-bit NormalFloat, twice quantised
            (QLoRA: Dettmers et al. 2023, section 3).
        dtype: what is computed in; int8 has its own arithmetic.

    Raises:
        SoloError: bitsandbytes or accelerate is not installed, or `kind` is neither.
    """
    from transformers.utils import is_accelerate_available, is_bitsandbytes_available

    if not (is_bitsandbytes_available() and is_accelerate_available()):
        raise SoloError("quantize: needs bitsandbytes; pip install 'solo-vlm[quantize]'")
    untouched = [PATCH_EMBEDDING, HEAD]
    match kind:
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=untouched)
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=untouched,
            )
        case _:
            raise SoloError(f"quantize: int8 or nf4, not {kind}")
