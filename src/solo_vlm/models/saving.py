"""Save a model with its processor so that other software generates as this project does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from solo_vlm.models.solo.processing_solo import SoloProcessor


def save_model(folder: Path, model: PreTrainedModel, processor: Any, **options: Any) -> None:
    """Write a model and its processor, or an LLM and its tokenizer, into one folder.

    Batches of prompts are padded on the left, as generation needs it; and generation stops where the chat
    template ends a turn.

    Args:
        folder: an existing one.
        model: SOLO, or a plain LLM.
        processor: of the model; a plain LLM's tokenizer.
        **options: of `PreTrainedModel.save_pretrained`.
    """
    if isinstance(processor, SoloProcessor):
        model.generation_config.eos_token_id = stop_ids(model.generation_config, processor)
    pad_left(getattr(processor, "tokenizer", processor))
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)


def pad_left(tokenizer: Any) -> None:
    """Pad on the left, also once the tokenizer was saved and loaded: `init_kwargs` is what it saves."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def stop_ids(settings: Any, processor: SoloProcessor | None = None) -> list[int]:
    """Ids of all tokens that end an answer.

    Args:
        settings: has `eos_token_id`: a `GenerationConfig` or a model's configuration.
        processor: adds the tokenizer's EOS and what the chat template ends a turn with.
    """
    ids = getattr(settings, "eos_token_id", None)
    own = [ids] if isinstance(ids, int) else list(ids or [])
    return list(dict.fromkeys([*own, *(processor.end_of_turn_ids if processor else [])]))
