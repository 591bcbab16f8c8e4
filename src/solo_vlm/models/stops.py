"""Tokens that end answers, and tokens that no answer has, in settings of generation."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.processing_solo import SoloProcessor
from solo_vlm.utils.errors import SoloError


def stop_ids(settings: Any, processor: SoloProcessor | None = None) -> list[int]:
    """Return the IDs of all tokens that end an answer.

    Args:
        settings: `GenerationConfig` or model configuration, with `eos_token_id`.
        processor: Processor whose EOS token and end-of-turn tokens are added.
    """
    ids = getattr(settings, "eos_token_id", None)
    own = [ids] if isinstance(ids, int) else list(ids or [])
    return list(dict.fromkeys([*own, *(processor.end_of_turn_ids if processor else [])]))


def stray_stops(
    settings: Any, tokenizer: Any, ends: Collection[int], images: Collection[int] = ()
) -> list[int]:
    """Return the stop tokens of settings that would cut answers short, as tokens of text, or cannot occur.

    Special tokens, such as one that opens a turn, may stop a model, too; tokens of reasoning are text.

    Args:
        settings: See `stop_ids`.
        tokenizer: The model's tokenizer.
        ends: IDs of EOS and of the tokens that the chat template writes after answers.
        images: IDs of tokens of images.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(set(stop_ids(settings)) - {*ends, *(special - set(images))})


def forbidden_ids(settings: GenerationConfig) -> set[int]:
    """Return the IDs of tokens that generation never chooses."""
    words = {word[0] for word in settings.bad_words_ids or () if len(word) == 1}
    return {*(settings.suppress_tokens or ()), *(words - set(stop_ids(settings)))}  # as transformers does


def unused_ids(tokenizer: Any, rows: int) -> set[int]:
    """Return the IDs below the number of embeddings that stand for no token of the tokenizer."""
    return set(range(rows)) - set(tokenizer.get_vocab().values())


def stop_fault(
    settings: GenerationConfig, tokenizer: Any, ends: Collection[int], images: Collection[int] = ()
) -> str | None:
    """Return why answers would be cut short, or would not end; see `stray_stops` for arguments."""
    if stray := stray_stops(settings, tokenizer, ends, images):
        return f"eos_token_id has {named(tokenizer, stray)}, where no answer ends: remove it"
    if both := forbidden_ids(settings) & {*ends, *stop_ids(settings)}:
        where = "suppress_tokens" if both & {*(settings.suppress_tokens or ())} else "bad_words_ids"
        return f"{where} has {named(tokenizer, both)}, an end of answers: remove it"
    return None


def check_stops(path: str | Path, settings: GenerationConfig, processor: SoloProcessor) -> None:
    """Check that the answers of a SOLO model end where its chat template ends them, and nowhere else.

    Ends that the settings lack are no fault: see `complete_generation`.

    Raises:
        SoloError: Text would end an answer, or an end is forbidden.
    """
    images = processor.image_input_ids(2, 1).tolist()
    if fault := stop_fault(settings, processor.tokenizer, processor.end_of_turn_ids, images):
        raise SoloError(f"{path}: generation_config.json: {fault}")


def complete_generation(settings: GenerationConfig, config: SoloConfig, processor: SoloProcessor) -> None:
    """Let answers end where the chat template ends them, without tokens of images or rows of padding."""
    settings.eos_token_id = stop_ids(settings, processor)
    unused = unused_ids(processor.tokenizer, config.text_config.vocab_size)
    suppressed = {*(settings.suppress_tokens or ()), *config.vision_token_ids, *unused}
    settings.suppress_tokens = sorted(suppressed)


def named(tokenizer: Any, ids: Iterable[int]) -> str:
    """Return the first of some tokens with its ID, and the number of the others, for messages."""
    first, *others = sorted(ids)
    token = (tokenizer.convert_ids_to_tokens(first) if first >= 0 else None) or "a token of no text"
    return f"{token!r} ({first})" + (f" and {len(others)} more" if others else "")
