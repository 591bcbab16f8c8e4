"""Writes a folder of this project: configuration, weights as they stream in, generation rules, processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from solo_vlm.convert.safetensors_files import write_checkpoint
from solo_vlm.convert.tensors import PlannedTensor, StoredTensor
from solo_vlm.convert.tokenizer import copy_sentencepiece
from solo_vlm.models.saving import stop_ids
from solo_vlm.models.solo.chat_template import SOLO_CHAT_TEMPLATE, with_images
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.models.solo.processing_solo import ImageLayout, SoloProcessor
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder

_OLD_BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Converted:
    """What a conversion has made.

    Attributes:
        out: the new folder.
        tensors: how many.
        bytes: of all tensors.
        dtype: of the token embedding.
        vocabulary: rows of the token embedding.
        tokens: what the tokenizer knows; None where the source had no tokenizer.
        vision_token_ids: `<vpatch>`, `<vision>`, `<vrow_sep>`, `</vision>`.
        layout: of images in chats.
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
    """Names and shapes of the weights that a model of this configuration has."""
    with torch.device("meta"):
        model = SoloForConditionalGeneration(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def plan(config: SoloConfig, found: Mapping[str, StoredTensor]) -> dict[str, PlannedTensor]:
    """Weights under this project's names, in the model's order, checked against the model.

    Args:
        config: of the model.
        found: by this project's names; buffers that older models stored are left out.

    Raises:
        SoloError: naming the key, and its file, that is missing, unknown or of the wrong shape.
    """
    expected = expected_shapes(config)
    for name, tensor in found.items():
        if name not in expected and not name.endswith(_OLD_BUFFERS):
            raise SoloError(f"{tensor.file}: {tensor.key} is no weight of this model")
    weights = {}
    for name, shape in expected.items():
        if name not in found:
            raise SoloError(f"{_folder_of(found)} lacks the weight {name}")
        tensor = found[name]
        if tensor.shape != shape:
            raise SoloError(
                f"{tensor.file}: {tensor.key} has the shape {list(tensor.shape)}, but config.json leads to "
                f"{list(shape)}"
            )
        weights[name] = PlannedTensor(name, tensor.dtype, shape, tensor.read)
    return weights


def _folder_of(found: Mapping[str, StoredTensor]) -> str:
    return ", ".join(sorted({str(tensor.file.parent) for tensor in found.values()}))


def release_processor(
    tokenizer: PreTrainedTokenizerFast, patch_size: int, layout: ImageLayout
) -> SoloProcessor:
    """The processor of a model in the release's vocabulary."""
    return SoloProcessor(
        image_processor=SoloImageProcessor(patch_size=patch_size),
        tokenizer=tokenizer,
        chat_template=with_images(SOLO_CHAT_TEMPLATE, "<vpatch>"),
        image_token="<vpatch>",
        image_layout=layout,
    )


def generation_config(config: SoloConfig) -> GenerationConfig:
    """Greedy; never speaks in tokens of the release's own, vision or other, nor in rows that pad."""
    text = config.text_config
    generation = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.eos_token_id
    )
    generation.suppress_tokens = list(range(config.vision_start_token_id, text.vocab_size)) or None
    return generation


def write_project_folder(
    out: Path,
    config: SoloConfig,
    weights: Mapping[str, PlannedTensor],
    tokenizer: PreTrainedTokenizerFast | None,
    layout: ImageLayout,
    tokenizer_folder: Path,
) -> Converted:
    """Write everything; the folder appears under its name only when it is complete.

    Args:
        out: the new folder.
        config: of the model.
        weights: by name, already checked; they are written one at a time.
        tokenizer: of the release, or None: then the folder gets no processor.
        layout: of images in chats.
        tokenizer_folder: what the tokenizer was read from; its SentencePiece model is kept.

    Raises:
        SoloError: `out` exists, or a weight turns out to be broken.
    """
    with new_folder(out) as folder:
        write_checkpoint(folder, list(weights.values()))
        config.save_pretrained(folder)
        generation = generation_config(config)
        if tokenizer is not None:
            processor = release_processor(tokenizer, config.vision_patch_size, layout)
            generation.eos_token_id = stop_ids(generation, processor)
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
