"""A model under check, with documents, chats and images to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from solo_vlm.data.collate import collate, model_inputs
from solo_vlm.data.encode import Document, Encoder, make_labels
from solo_vlm.data.sample import Sample, SampleError

Pieces = Sequence[int | tuple[int, int]]  # numbers of text tokens, and grids of images

LONG: tuple[Pieces, ...] = ((4, (2, 3), 5, (1, 2), 6), (7,), (1, (3, 1), 18))
SHORT: tuple[Pieces, ...] = ((3, (1, 2), 5), (5,), (9,))

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of outputs that are equal up to rounding, relative to their size."""

QUANTIZED = 1e-1
"""The same for weights of 8 or 4 bits."""

_GRIDS = ((2, 3), (3, 1), (2, 2), (1, 2), (1, 1))
_PADDING = 3  # tokens
_TEXT_IDS = 8000  # at most; later rows of an embedding may be padding
_SYSTEM, _QUESTIONS, _ANSWERS = (
    "Follow rule seven.",
    ("Which letters are here?", "And how many birds?"),
    ("Only quiet zebras jump.", "Forty vexed wizards."),
)


@dataclass(frozen=True)
class Probe:
    """A model under check.

    Attributes:
        model: Model in evaluation mode, on its device.
        encoder: Encoder of the model's samples; None: chats cannot be checked.
        llm: LLM that the model was made of.
        processor: Processor of an image-text model that is no SOLO model.
        tolerance: Largest difference of outputs that are equal up to rounding, relative to their size.
        shapes: Text and images of the documents.
        weights: Origin of weights that are not the model's own.
    """

    model: PreTrainedModel
    encoder: Encoder | None = None
    llm: PreTrainedModel | None = None
    processor: Any = None
    tolerance: float = TOLERANCES[torch.float32]
    shapes: tuple[Pieces, ...] = LONG
    weights: str = ""

    @property
    def sees_images(self) -> bool:
        """Whether the model is a SOLO model."""
        return self.model.config.model_type == "solo"

    @property
    def is_foreign(self) -> bool:
        """Whether the model reads images in another way."""
        return not self.sees_images and self.model.config.get_text_config() is not self.model.config

    @property
    def sees_whole_prompt(self) -> bool:
        """Whether tokens of a prompt attend to later ones by design, as in PaliGemma."""
        settings = self.model.config.get_text_config()
        return self.is_foreign and getattr(settings, "use_bidirectional_attention", None) is True

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None without one."""
        return self.encoder.tokenizer if self.encoder else getattr(self.processor, "tokenizer", None)

    @cached_property
    def image_inputs(self) -> dict[str, Any] | None:
        """Inputs for a question about an image of an image-text model that is no SOLO model."""
        if self.processor is None:
            return None
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
        inputs = _ask(self.processor, image)
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    @cached_property
    def documents(self) -> list[Document]:
        """Documents of random tokens, with images where the model sees them."""
        return [
            random_document(self.model.config, pieces, self.sees_images, seed)
            for seed, pieces in enumerate(self.shapes)
        ]

    @cached_property
    def samples(self) -> list[Sample]:
        """A conversation and a text for the model's encoder."""
        return make_samples(self.encoder) if self.encoder else []

    @cached_property
    def encoded(self) -> list[Document]:
        """Documents that the encoder makes of the samples."""
        return [self.encoder(sample) for sample in self.samples] if self.encoder else []

    def inputs(self, document: Document) -> dict[str, Any]:
        """Return the model's inputs for one document alone."""
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(document.input_ids)[None]}
        if self.sees_images and len(document.pixel_values):
            inputs["pixel_values"] = torch.from_numpy(document.pixel_values)
            inputs["image_grid_thw"] = torch.from_numpy(document.image_grid_thw)
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def packed(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Return the model's inputs for a packed row of documents, with some padding, as training does."""
        length = sum(map(len, documents)) + _PADDING
        batch = collate(documents, length, int(documents[0].input_ids[0]))
        return model_inputs(self.model, batch)


def random_document(config: PreTrainedConfig, pieces: Pieces, with_images: bool, seed: int) -> Document:
    """Return a document of random text tokens and, if the model sees them, images of noise.

    Without images, a grid stands for as many text tokens. Text is supervised.
    """
    generator = np.random.default_rng(seed)
    text_ids = _text_ids(config)
    ids: list[NDArray[np.int64]] = []
    grids = [piece for piece in pieces if isinstance(piece, tuple)] if with_images else []
    for piece in pieces:
        if isinstance(piece, tuple) and with_images:
            ids.append(_image_ids(config, *piece))
        else:
            ids.append(generator.choice(text_ids, int(np.prod(piece))))
    input_ids = np.concatenate(ids)
    supervised = np.isin(input_ids, config.vision_token_ids, invert=True) if with_images else input_ids >= 0
    patch_dim = config.patch_dim if with_images else 0
    num_patches = sum(rows * columns for rows, columns in grids)
    return Document(
        input_ids,
        make_labels(input_ids, supervised),
        generator.integers(0, 256, (num_patches, patch_dim), dtype=np.uint8),
        np.array([(1, *grid) for grid in grids], np.int64).reshape(-1, 3),
    )


def changed_after(document: Document, cut: int, config: PreTrainedConfig) -> Document:
    """Return a document with other text from a position on, and other images where they begin after it."""
    text_ids = _text_ids(config)
    later = np.arange(len(document)) >= cut
    is_text = np.isin(document.input_ids, text_ids)
    following = text_ids[(np.searchsorted(text_ids, document.input_ids) + 1) % len(text_ids)]
    input_ids = np.where(later & is_text, following, document.input_ids)
    pixel_values = document.pixel_values
    if len(pixel_values):
        places = np.flatnonzero(document.input_ids == config.image_token_id)
        pixel_values = np.where((places >= cut)[:, None], 255 - pixel_values, pixel_values)
    return Document(input_ids, document.labels, pixel_values, document.image_grid_thw)


def make_samples(encoder: Encoder) -> list[Sample]:
    """Return a conversation, with images where the encoder sees them, and a document.

    A system message, or the conversation, is left out where the chat template rejects it.
    """
    document = Sample([_message("assistant", _ANSWERS[0])], [])
    if not encoder.sees_images:
        return [document, Sample([_message("assistant", _ANSWERS[1])], [])]
    images: list[Any] = [png(pixels) for pixels in make_images(encoder.processor.image_processor)]
    turns = [
        _message("user", _QUESTIONS[0], len(images)),
        _message("assistant", _ANSWERS[0]),
        _message("user", _QUESTIONS[1]),
        _message("assistant", _ANSWERS[1]),
    ]
    chat = Sample([_message("system", _SYSTEM), *turns], images)
    for sample in (chat, Sample(turns, images)):
        with suppress(SampleError):
            encoder(sample)
            return [sample, document]
    return [document]


def make_images(image_processor: Any) -> list[NDArray[np.uint8]]:
    """Return up to two images of noise, (height, width, 3), of sizes that the processor does not change."""
    side, size = image_processor.patch_size, dict(image_processor.size)
    grids = list(_GRIDS)
    if size.get("height"):
        grids.append((size["height"] // side, size["width"] // side))
    kept = [
        (rows * side, columns * side)
        for rows, columns in grids
        if image_processor.get_patch_grid(rows * side, columns * side) == (rows, columns)
    ]
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*each, 3), dtype=np.uint8) for each in kept[:2]]


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the PNG file of an image."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pad_left(inputs: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Return rows of token IDs as one batch, padded on the left."""
    length = max(row.shape[1] for row in inputs)
    ids = torch.full((len(inputs), length), pad_token_id, device=inputs[0].device)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(inputs):
        ids[number, length - row.shape[1] :] = row[0]
        mask[number, length - row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _ask(processor: Any, image: Image.Image) -> dict[str, Tensor]:
    """Return a processor's inputs for a question about an image, by its chat template if it has one."""
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": _QUESTIONS[0]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        text = f"{getattr(processor, 'image_token', '<image>')}{_QUESTIONS[0]}"
        inputs = processor(text=text, images=image, return_tensors="pt")
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def _message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def _image_ids(config: PreTrainedConfig, rows: int, columns: int) -> NDArray[np.int64]:
    """Return the tokens of an image, as the processor lays them out."""
    patch, start, row_end, end = config.vision_token_ids
    body = np.full((rows, columns + 1), patch, np.int64)
    body[:, -1] = row_end
    return np.array([start, *body.ravel()[:-1], end], np.int64)


def _text_ids(config: PreTrainedConfig) -> NDArray[np.int64]:
    """Return the sorted IDs of tokens without a meaning of their own to the model."""
    special: set[int] = set()
    for each in (config, config.get_text_config()):
        for name, value in each.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
                special |= set(value) if isinstance(value, list | tuple) else {value}
    size = min(config.get_text_config().vocab_size, _TEXT_IDS)
    return np.array([number for number in range(3, size) if number not in special], np.int64)
