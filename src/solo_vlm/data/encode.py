"""Encoding of samples as token IDs, labels and uint8 patches, the same for training and inference."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sample import Sample, SampleError
from solo_vlm.data.sources.files import read_url
from solo_vlm.data.sources.retries import retried
from solo_vlm.data.values import ImageSource
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
    from solo_vlm.models.solo.processing_solo import SoloProcessor

R = TypeVar("R")

IGNORE_INDEX = -100

_FSSPEC_URL = re.compile(r"(?!(https?|file):)[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # others: load_image
_REMOTE_URL = re.compile(r"https?://|data:", re.IGNORECASE)


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


@dataclass(frozen=True)
class Draft:
    """Encoded sample, or a piece of a long text, whose images are still compressed: small while it waits.

    Attributes:
        input_ids: (length,) int32, with the tokens of every image.
        supervised: (length,) bool.
        image_grid_thw: (num_images, 3) int64, from the images' headers.
        images: Encoded images, or their local paths, each with its name for messages if it has one.
        image_processor: Image processor of the model; None for a plain LLM.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    image_grid_thw: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))
    images: Sequence[tuple[ImageSource, str | None]] = ()
    image_processor: SoloImageProcessor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def decode(self) -> Document:
        """Decode the images.

        Raises:
            SampleError: An image is damaged, or of another size than its header states ("image").
            OSError: Reading an image failed five times because of the disk or the network.
        """
        input_ids = self.input_ids.astype(np.int64)
        labels = make_labels(input_ids, self.supervised)
        return Document(input_ids, labels, self._patches(), self.image_grid_thw)

    def _patches(self) -> NDArray[np.uint8]:
        if self.image_processor is None:
            return np.empty((0, 0), np.uint8)
        encode_image = self.image_processor.encode_image
        patches = [np.empty((0, _patch_dim(self.image_processor)), np.uint8)]
        for (image, name), stated in zip(self.images, self.image_grid_thw, strict=True):
            of_image, grid = _read_image(image, partial(encode_image, name=name))
            if (grid != stated).any():
                sizes = " but ".join(f"{rows} x {columns}" for _, rows, columns in (grid, stated))
                raise SampleError("image", f"{name or 'image'}: {sizes} patches by its header")
            patches.append(of_image)
        # A single image, the usual case, is not copied.
        return patches[1] if len(patches) == 2 else np.concatenate(patches)


def encode(sample: Sample, processor: SoloProcessor, vision_loss: bool = False) -> Document:
    """Encode one sample; the assistant's text and the tokens that end its turns are supervised.

    Args:
        sample: Sample to encode.
        processor: Processor of the model.
        vision_loss: Whether to supervise the tokens of images, too.

    Raises:
        SampleError: An image is damaged or missing ("image"), or the chat template rejects the chat
            ("chat-template").
        OSError: Reading an image failed five times because of the disk or the network.
    """
    return draft(sample, processor, vision_loss).decode()


def draft(
    sample: Sample,
    processor: SoloProcessor,
    vision_loss: bool = False,
    lock: AbstractContextManager[Any] | None = None,
) -> Draft:
    """Encode one sample like `encode`, but leave its images compressed; remote ones are fetched.

    Args:
        sample, processor, vision_loss: See `encode`.
        lock: Held while the tokenizer runs, for threads that share it.

    Raises:
        SampleError, OSError: See `encode`; damaged pixels are found by decoding alone.
    """
    from solo_vlm.models.solo.processing_solo import ChatTemplateError

    image_processor = processor.image_processor
    images = [_fetched(image) for image in sample.images]
    grids = [_read_image(image, partial(image_processor.read_grid, name=name)) for image, name in images]
    image_grid_thw = np.array(grids, np.int64).reshape(-1, 3)
    try:
        with lock or nullcontext():
            chat = processor.encode_chat(sample.messages, image_grid_thw)
    except ChatTemplateError as error:
        raise SampleError("chat-template", str(error)) from error
    patches = int(image_grid_thw.prod(axis=1).sum())
    if (expected := np.count_nonzero(chat.input_ids == processor.image_token_id)) != patches:
        raise SampleError("image", f"{patches} patches for {expected} <vpatch> tokens")
    supervised = chat.supervised
    if vision_loss:
        supervised = supervised | np.isin(chat.input_ids, processor.image_input_ids(2, 1))
    return Draft(chat.input_ids.astype(np.int32), supervised, image_grid_thw, images, image_processor)


def _fetched(image: ImageSource) -> tuple[ImageSource, str | None]:
    """Return the image, or the content of its URL with its name."""
    from solo_vlm.models.solo.image_loading_solo import read_bytes

    if isinstance(image, str) and _FSSPEC_URL.match(image):
        return _fetch(image), image
    if isinstance(image, str) and _REMOTE_URL.match(image):
        return _read_image(image, read_bytes)
    return image, None


def load_pixels(image: ImageSource, image_processor: SoloImageProcessor) -> NDArray[np.uint8]:
    """Return the pixels of an image before it is resized, (height, width, 3).

    Raises:
        SampleError: The image is damaged or missing ("image").
        OSError: Reading it failed five times because of the disk or the network.
    """
    source, name = _fetched(image)
    return _read_image(source, partial(image_processor.load_pixels, name=name))


@retried
def _read_image(image: ImageSource, read: Callable[[ImageSource], R]) -> R:
    from solo_vlm.models.solo.image_loading_solo import ImageFetchError, ImageMissingError

    try:
        return read(image)
    except ValueError as error:  # an ImageError, usually
        if isinstance(error, ImageFetchError) and not isinstance(error, ImageMissingError):
            raise OSError(errno.EIO, str(error)) from error
        raise SampleError("image", str(error)) from error


@retried
def _fetch(url: str) -> bytes:
    try:
        return read_url(url)
    except (FileNotFoundError, IsADirectoryError, ValueError, ImportError) as error:
        raise SampleError("image", f"{url}: {error}") from error


def _patch_dim(image_processor: SoloImageProcessor) -> int:
    return 3 * image_processor.patch_size**2


def fit_to_length(draft: Draft, length: int) -> Iterator[Draft]:
    """Yield the draft, or a long text in pieces of at most `length` tokens.

    Raises:
        SampleError: The document is too long and has images, which are never cut ("too-long").
    """
    if len(draft) <= length:
        yield draft
        return
    if images := len(draft.image_grid_thw):
        patches = draft.image_grid_thw.prod(axis=1).sum()
        raise SampleError(
            "too-long",
            f"{len(draft)} tokens, {patches} of them patches of {images} images, exceed the {length} of a "
            "sequence; limit images by max_patches (solo init), or raise data.sequence_length",
        )
    for start in range(0, len(draft), length):
        piece = slice(start, start + length)
        yield replace(draft, input_ids=draft.input_ids[piece], supervised=draft.supervised[piece])


def draft_text(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Draft:
    """Encode a text document as BOS, text, EOS, to train a plain LLM.

    Raises:
        SampleError: The sample has images, or more than one turn ("not-text").
    """
    if sample.images or [message["role"] for message in sample.messages] != ["assistant"]:
        raise SampleError("not-text", "a plain LLM reads documents of one assistant turn without images")
    text = "".join(part["text"] for part in sample.messages[0]["content"])
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    input_ids = np.array([bos, *ids, tokenizer.eos_token_id], dtype=np.int32)
    return Draft(input_ids, np.ones(len(input_ids), bool))


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
            SampleError: No token is supervised ("unsupervised"), or as for `encode` and `draft_text`.
        """
        return self.draft(sample).decode()

    def draft(self, sample: Sample) -> Draft:
        """Encode a training sample, and leave its images compressed; errors are those of a call."""
        if self.sees_images:
            drafted = draft(sample, self.processor, self.vision_loss, self._lock)
            if not drafted.supervised[1:].any():
                raise SampleError("unsupervised", "the assistant's turns are empty, so no token has a label")
            return drafted
        with self._lock:
            return draft_text(sample, self.processor)

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.processor, self.vision_loss)

    @property
    def sees_images(self) -> bool:
        return hasattr(self.processor, "image_processor")

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer if self.sees_images else self.processor

    @property
    def padding_id(self) -> int:
        """Token that fills packed rows: EOS, which training knows.

        The embedding of a padding token may be zero, as Gemma's. At the start of a document, where a token
        sees itself alone, each norm would multiply its gradient by a thousand.
        """
        return int(self.tokenizer.eos_token_id)

    @property
    def patch_dim(self) -> int:
        """Width of a document's `pixel_values`; 0 for a plain LLM."""
        return _patch_dim(self.processor.image_processor) if self.sees_images else 0

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
