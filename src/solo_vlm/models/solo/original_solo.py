"""Format of original SOLO checkpoints (SOLO-7B): tokens, configuration and weight names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ORIGINAL_ARCHITECTURE = "SoloForCausalLM"

# Appended to Mistral's 32,000 tokens in this order. Some fine-tuned models lack the chat tokens.
VISION_TOKENS = ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")
LOCATION_TOKENS = tuple(f"<loc_{number}>" for number in range(1, 1025))
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
FIRST_VISION_ID = 32000

# Regular expressions of the original weight names, and their replacements here.
ORIGINAL_KEYS = {r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1."}

_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def is_original(settings: dict[str, Any]) -> bool:
    """Return whether a `config.json` is original: its model_type is "mistral", but not its architecture."""
    architectures = settings.get("architectures")
    return isinstance(architectures, list) and ORIGINAL_ARCHITECTURE in architectures


def config_from_original(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a `SoloConfig` for an original `config.json`, with SOLO-7B's vision IDs."""
    text = {name: settings[name] for name in (*_TEXT_FIELDS, "rope_parameters") if name in settings}
    return {
        "model_type": "solo",
        "architectures": ["SoloForConditionalGeneration"],
        "text_config": {"model_type": "mistral", **text},
        "vision_patch_size": settings.get("vision_patch_size", 32),
        "dtype": settings.get("torch_dtype") or settings.get("dtype"),
        **vision_token_ids([FIRST_VISION_ID + offset for offset in range(len(VISION_TOKENS))]),
    }


def vision_token_ids(ids: Sequence[int]) -> dict[str, int]:
    """Return the vision IDs of a `SoloConfig` from the ids of `VISION_TOKENS`."""
    by_token = dict(zip(VISION_TOKENS, ids, strict=True))
    return {
        "vision_start_token_id": by_token["<vision>"],
        "image_token_id": by_token["<vpatch>"],
        "vision_row_token_id": by_token["<vrow_sep>"],
        "vision_end_token_id": by_token["</vision>"],
    }


def config_to_original(config: Any, dtype: str) -> dict[str, Any]:
    """Return the original `config.json` of a `SoloConfig` over Mistral; `dtype` is that of the weights."""
    text = config.text_config
    settings = {name: getattr(text, name) for name in _TEXT_FIELDS if hasattr(text, name)}
    return {
        "architectures": [ORIGINAL_ARCHITECTURE],
        "model_type": "mistral",
        **settings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vision_patch_size": config.vision_patch_size,
    }


__all__ = ["config_from_original", "config_to_original", "is_original", "vision_token_ids"]
