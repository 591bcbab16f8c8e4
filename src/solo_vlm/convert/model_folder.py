"""Write a converted model as a folder: config, streamed weights, generation config, processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from solo_vlm.convert.checkpoint_files import PlannedTensor, StoredTensor, write_checkpoint
from solo_vlm.models.original import copy_sentencepiece, original_generation_config, original_processor
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.models.solo.processing_solo import ImageLayout
from solo_vlm.models.stops import complete_generation
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder

logger = logging.getLogger(__name__)

_OBSOLETE_BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Converted:
    """Summary of a converted model.

    Attributes:
        out: New folder.
        tensors: Number of tensors.
        bytes: Total size of the tensors.
        dtype: Dtype of the token embedding.
        vocabulary: Rows of the token embedding.
        tokens: Number of tokens of the tokenizer; None if the source has none.
        vision_token_ids: IDs of `<vpatch>`, `<vision>`, `<vrow_sep>`, `</vision>`.
        layout: Layout of images in chats; None without a tokenizer.
    """

    out: str
    tensors: int
    bytes: int
    dtype: str
    vocabulary: int
    tokens: int | None
    vision_token_ids: tuple[int, ...]
    layout: ImageLayout | None


def expected_shapes(config: SoloConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights of a model with this configuration."""
    with torch.device("meta"):
        model = SoloForConditionalGeneration(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def plan_weights(config: SoloConfig, found: Mapping[str, StoredTensor]) -> dict[str, PlannedTensor]:
    """Return the weights in the model's order, checked against its configuration.

    Args:
        found: Stored tensors by the model's weight names. Obsolete buffers are ignored.

    Raises:
        SoloError: A key is missing, unknown or of the wrong shape; the message names it and its file.
    """
    expected = expected_shapes(config)
    for name, tensor in found.items():
        if name not in expected and not name.endswith(_OBSOLETE_BUFFERS):
            raise SoloError(f"{tensor.file}: {tensor.key} is not a weight of this model")
    weights = {}
    for name, shape in expected.items():
        if name not in found:
            folders = sorted({str(tensor.file.parent) for tensor in found.values()})
            raise SoloError(f"{', '.join(folders)} lacks the weight {name}")
        tensor = found[name]
        if tensor.shape != shape:
            raise SoloError(
                f"{tensor.file}: {tensor.key} has the shape {list(tensor.shape)}, but config.json implies "
                f"{list(shape)}"
            )
        weights[name] = PlannedTensor(name, tensor.dtype, shape, tensor.read)
    return weights


def write_model_folder(
    out: Path,
    config: SoloConfig,
    weights: Mapping[str, PlannedTensor],
    tokenizer: PreTrainedTokenizerFast | None,
    layout: ImageLayout,
    tokenizer_folder: Path,
) -> Converted:
    """Write a model folder; it appears under its name only when it is complete.

    Args:
        weights: Checked weights by name, written one at a time.
        tokenizer: Original tokenizer; None to write no processor, with a warning.
        layout: Layout of images in chats.
        tokenizer_folder: Source of the tokenizer; its SentencePiece model is copied.

    Raises:
        SoloError: `out` exists, or a weight cannot be read.
    """
    if tokenizer is None:
        logger.warning(
            "%s has no tokenizer: the new folder gets no processor, and its config the vision token IDs of "
            "SOLO-7B (32000 to 32004)",
            tokenizer_folder,
        )
    with new_folder(out) as folder:
        write_checkpoint(folder, list(weights.values()))
        config.save_pretrained(folder)
        generation = original_generation_config(config)
        if tokenizer is not None:
            processor = original_processor(tokenizer, config.vision_patch_size, layout)
            complete_generation(generation, config, processor)
            processor.save_pretrained(folder)
            copy_sentencepiece(tokenizer_folder, folder)
        generation.save_pretrained(folder)
    return Converted(
        out=str(out),
        tensors=len(weights),
        bytes=sum(weight.nbytes for weight in weights.values()),
        dtype=str(config.dtype).removeprefix("torch."),
        vocabulary=config.text_config.vocab_size,
        tokens=None if tokenizer is None else len(tokenizer),
        vision_token_ids=config.vision_token_ids,
        layout=None if tokenizer is None else layout,
    )
