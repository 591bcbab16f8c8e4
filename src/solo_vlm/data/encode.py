"""Encoding of samples as token IDs, labels and uint8 patches, the same for training and inference."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sample import Sample, SampleError
from solo_vlm.data.sources.files import read_url, retried
from solo_vlm.data.values import ImageSource
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
    from solo_vlm.models.solo.processing_solo import SoloProcessor

R = TypeVar("R")

IGNORE_INDEX = -100

_FSSPEC_URL = re.compile(r"(?!(https?|file):)[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # others: load_image


@dataclass(frozen=True)
class Document:
    """Encoded sample, or a piece of a long text.

    Attributes:
        input_ids: (length,) int64.
        labels: (length,) int64, the token ID where it is supervised, else -100. See `make_labels`.
        pixel_values: (num_patches, 3 * patch_size**2) uint8, one patch per `<vpatch>` token.
        image_grid_thw: (num_images, 3) int64: 1, rows, columns.

    Raises:
        ValueError: The number of patches differs from the grids'.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixel_values: NDArray[np.uint8]
    image_grid_thw: NDArray[np.int64]

    def __post_init__(self) -> None:
        # Checked here, because on an accelerator the comparison would synchronize.
        if (expected := int(self.image_grid_thw.prod(axis=1).sum())) != len(self.pixel_values):
            raise ValueError(f"{len(self.pixel_values)} patches, but grids of {expected}")

    def __len__(self) -> int:
        return len(self.input_ids)


def make_labels(input_ids: NDArray[np.int64], supervised: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the labels of a document: token IDs where supervised, else -100.

    The first token never has a label, because in a packed sequence it would be predicted from the previous
    document.
    """
    labels = np.where(supervised, input_ids, IGNORE_INDEX)
    labels[:1] = IGNORE_INDEX
    return labels


def encode(
    sample: Sample,
    processor: SoloProcessor,
    vision_loss: bool = False,
    lock: AbstractContextManager[Any] | None = None,
) -> Document:
    """Encode one sample; the assistant's text and the tokens that end its turns are supervised.

    Args:
        sample: Sample to encode.
        processor: Processor of the model.
        vision_loss: Whether to supervise the tokens of images, too.
        lock: Held while the tokenizer runs, for threads that share it.

    Raises:
        SampleError: An image is damaged or missing ("image"), or the chat template rejects the chat
            ("chat-template").
        OSError: Reading an image failed five times because of the disk or the network.
    """
    from solo_vlm.models.solo.processing_solo import ChatTemplateError

    pixel_values, image_grid_thw = _encode_images(sample, processor)
    try:
        with lock or nullcontext():
            chat = processor.encode_chat(sample.messages, image_grid_thw)
    except ChatTemplateError as error:
        raise SampleError("chat-template", str(error)) from error
    if (expected := np.count_nonzero(chat.input_ids == processor.image_token_id)) != len(pixel_values):
        raise SampleError("image", f"{len(pixel_values)} patches for {expected} <vpatch> tokens")
    supervised = chat.supervised
    if vision_loss:
        supervised = supervised | np.isin(chat.input_ids, processor.image_input_ids(2, 1))
    return Document(chat.input_ids, make_labels(chat.input_ids, supervised), pixel_values, image_grid_thw)


def _encode_images(sample: Sample, processor: SoloProcessor) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = [_encode_image(image, processor) for image in sample.images]
    patches = [patches for patches, _ in images] or [np.empty((0, _patch_dim(processor)), np.uint8)]
    image_grid_thw = np.array([grid for _, grid in images], np.int64).reshape(-1, 3)
    # A single image, the usual case, is not copied.
    return patches[0] if len(patches) == 1 else np.concatenate(patches), image_grid_thw


def _encode_image(
    image: ImageSource, processor: SoloProcessor
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return _read_image(image, processor.image_processor.encode_image)


def load_pixels(image: ImageSource, image_processor: SoloImageProcessor) -> NDArray[np.uint8]:
    """Return the pixels of an image before it is resized, (height, width, 3).

    Raises:
        SampleError: The image is damaged or missing ("image").
        OSError: Reading it failed five times because of the disk or the network.
    """
    return _read_image(image, image_processor.load_pixels)


@retried
def _read_image(image: ImageSource, read: Callable[[ImageSource], R]) -> R:
    from solo_vlm.models.solo.image_loading_solo import ImageFetchError, ImageMissingError

    source = _fetch(image) if isinstance(image, str) and _FSSPEC_URL.match(image) else image
    try:
        return read(source)
    except ValueError as error:  # an ImageError, usually
        if isinstance(error, ImageFetchError) and not isinstance(error, ImageMissingError):
            raise OSError(errno.EIO, str(error)) from error
        raise SampleError("image", str(error)) from error


def _fetch(url: str) -> bytes:
    try:
        return read_url(url)
    except (FileNotFoundError, IsADirectoryError, ValueError, ImportError) as error:
        raise SampleError("image", f"{url}: {error}") from error


def _patch_dim(processor: SoloProcessor) -> int:
    return 3 * processor.image_processor.patch_size**2


def fit_to_length(document: Document, length: int) -> Iterator[Document]:
    """Yield the document, or a long text in pieces of at most `length` tokens.

    Raises:
        SampleError: The document is too long and has images, which are never cut ("too-long").
    """
    if len(document) <= length:
        yield document
        return
    if len(document.pixel_values):
        images, patches = len(document.image_grid_thw), len(document.pixel_values)
        raise SampleError(
            "too-long",
            f"{len(document)} tokens, {patches} of them patches of {images} images, exceed the {length} of a "
            "sequence; limit images by max_patches (solo init), or raise data.sequence_length",
        )
    for start in range(0, len(document), length):
        input_ids, labels = (ids[start : start + length] for ids in (document.input_ids, document.labels))
        labels = make_labels(input_ids, labels != IGNORE_INDEX)
        yield Document(input_ids, labels, document.pixel_values, document.image_grid_thw)


def encode_text(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Encode a text document as BOS, text, EOS, to train a plain LLM.

    Raises:
        SampleError: The sample has images, or more than one turn ("not-text").
    """
    if sample.images or [message["role"] for message in sample.messages] != ["assistant"]:
        raise SampleError("not-text", "a plain LLM reads documents of one assistant turn without images")
    text = "".join(part["text"] for part in sample.messages[0]["content"])
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    input_ids = np.array([bos, *ids, tokenizer.eos_token_id], dtype=np.int64)
    labels = make_labels(input_ids, np.ones(len(input_ids), bool))
    return Document(input_ids, labels, np.empty((0, 0), np.uint8), np.empty((0, 3), np.int64))


@dataclass(frozen=True)
class Encoder:
    """Encoder of samples for a SOLO model, or of texts for a plain LLM. Thread-safe.

    Attributes:
        processor: Processor of a SOLO model, or tokenizer of an LLM.
        vision_loss: See `encode`.
    """

    processor: Any
    vision_loss: bool = False
    # A fast tokenizer stores the arguments of a call in itself.
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __call__(self, sample: Sample) -> Document:
        """Encode a training sample.

        Raises:
            SampleError: No token is supervised ("unsupervised"), or as for `encode` and `encode_text`.
        """
        if self.sees_images:
            document = encode(sample, self.processor, self.vision_loss, self._lock)
            if (document.labels == IGNORE_INDEX).all():
                raise SampleError("unsupervised", "the assistant's turns are empty, so no token has a label")
            return document
        with self._lock:
            return encode_text(sample, self.processor)

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.processor, self.vision_loss)

    @property
    def sees_images(self) -> bool:
        return hasattr(self.processor, "image_processor")

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer if self.sees_images else self.processor

    @property
    def patch_dim(self) -> int:
        """Width of a document's `pixel_values`; 0 for a plain LLM."""
        return _patch_dim(self.processor) if self.sees_images else 0

    @property
    def vision_ids(self) -> NDArray[np.int64]:
        """IDs of all tokens in an image's layout."""
        layout = self.processor.image_input_ids(2, 1) if self.sees_images else ()
        return np.unique(np.asarray(layout, np.int64))


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder of a SOLO model, or of a plain LLM.

    Raises:
        SoloError: The folder contains neither, or its tokenizer has no EOS token.
    """
    from solo_vlm.models.load import is_solo, load_processor, load_tokenizer

    if is_solo(path):
        return Encoder(load_processor(path))
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise SoloError(f"the tokenizer of {path} has no EOS token: set eos_token in tokenizer_config.json")
    return Encoder(tokenizer)
