"""The one encoder: a sample becomes ids, labels and uint8 patches, for every stage and for inference."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.image_values import ImageSource
from solo_vlm.data.sample import Sample, SampleError
from solo_vlm.data.sources.files import read_url, retried
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solo_vlm.models.solo.processing_solo import SoloProcessor

IGNORE_INDEX = -100

_FSSPEC_URL = re.compile(r"(?!(https?|file):)[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # others are load_image's

MAX_ASPECT_RATIO = 200  # as in Qwen2-VL: nothing can be recognized in what remains of such an image


@dataclass(frozen=True)
class Document:
    """An encoded sample, or a piece of a long text.

    Attributes:
        input_ids: (length,) int64.
        labels: (length,) int64; the id itself where it is supervised, else -100. Never at the first token.
        patches: (patches, 3072) uint8, one a `<vpatch>`.
        grids: (images, 3) int64: 1, rows, columns.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    patches: NDArray[np.uint8]
    grids: NDArray[np.int64]

    def __post_init__(self) -> None:
        # Here both numbers are at hand; on an accelerator, comparing them would mean to wait for it.
        if (places := int(self.grids.prod(axis=1).sum())) != len(self.patches):
            raise ValueError(f"{len(self.patches)} patches, but grids of {places}")

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(
    sample: Sample,
    processor: SoloProcessor,
    vision_loss: bool = False,
    tokenizing: AbstractContextManager[Any] | None = None,
) -> Document:
    """Encode one sample. Labels follow roles: what the assistant says, and the token that ends its turn.

    Args:
        sample: to encode.
        processor: of the model.
        vision_loss: supervise the tokens of images, too.
        tokenizing: entered while the tokenizer works: a lock, where threads share it.

    Raises:
        SampleError: an image is damaged or missing ("image"), or the chat cannot be rendered
            ("chat-template").
        OSError: disk or network failed while an image was read, five times.
    """
    from solo_vlm.models.solo.processing_solo import ChatTemplateError

    patches, grids = _encode_images(sample, processor)
    try:
        with tokenizing or nullcontext():
            chat = processor.encode_chat(sample.messages, grids)
    except ChatTemplateError as error:
        raise SampleError("chat-template", str(error)) from error
    if (places := np.count_nonzero(chat.input_ids == processor.image_token_id)) != len(patches):
        raise SampleError("image", f"{len(patches)} patches for {places} <vpatch> tokens")
    supervised = chat.supervised.copy()
    if vision_loss:
        supervised |= np.isin(chat.input_ids, processor.image_input_ids(2, 1))
    supervised[0] = False
    labels = np.where(supervised, chat.input_ids, IGNORE_INDEX)
    return Document(chat.input_ids, labels, patches, grids)


def _encode_images(sample: Sample, processor: SoloProcessor) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    encoded = [_encode_image(image, processor) for image in sample.images]
    patches = [patches for patches, _ in encoded] or [np.empty((0, _patch_dim(processor)), np.uint8)]
    grids = np.array([grid for _, grid in encoded], np.int64).reshape(-1, 3)
    # One image is the usual case: nothing to concatenate, so nothing to copy.
    return patches[0] if len(patches) == 1 else np.concatenate(patches), grids


@retried
def _encode_image(
    image: ImageSource, processor: SoloProcessor
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from solo_vlm.models.solo.image_loading_solo import ImageFetchError, ImageMissingError

    source = _fetch(image) if isinstance(image, str) and _FSSPEC_URL.match(image) else image
    try:
        return processor.image_processor.encode_image(source, MAX_ASPECT_RATIO)
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

    Only the first piece has an unsupervised first token by nature; the first token of every later piece
    loses its label, since what came before it is not there to predict it.

    Raises:
        SampleError: the document holds images and is too long ("too-long"): an image is never cut.
    """
    if len(document) <= length:
        yield document
        return
    if len(document.patches):
        raise SampleError("too-long", f"{len(document)} tokens with images, {length} are possible")
    for start in range(0, len(document), length):
        labels = document.labels[start : start + length].copy()
        labels[0] = IGNORE_INDEX
        yield Document(document.input_ids[start : start + length], labels, document.patches, document.grids)


def encode_text(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Encode a document without images by a plain tokenizer, to train an LLM: BOS, text, EOS.

    Raises:
        SampleError: the sample has images, or more than one turn ("not-text").
    """
    if sample.images or [message["role"] for message in sample.messages] != ["assistant"]:
        raise SampleError("not-text", "a plain LLM reads documents of one assistant turn, without images")
    text = "".join(part["text"] for part in sample.messages[0]["content"])
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    beginning = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    input_ids = np.array([beginning, *ids, tokenizer.eos_token_id], dtype=np.int64)
    labels = input_ids.copy()
    labels[0] = IGNORE_INDEX
    return Document(input_ids, labels, np.empty((0, 0), np.uint8), np.empty((0, 3), np.int64))


@dataclass(frozen=True)
class Encoder:
    """Encodes samples with a processor; or texts alone with a tokenizer, for an LLM. Threads may share it.

    Attributes:
        processor: the processor, or the tokenizer.
        vision_loss: see `encode`.
    """

    processor: Any
    vision_loss: bool = False
    # A fast tokenizer keeps the arguments of a call as its own state.
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __call__(self, sample: Sample) -> Document:
        """Encode a sample to learn from.

        Raises:
            SampleError: see `encode` and `encode_text`; or no token is supervised ("unsupervised").
        """
        if self.sees_images:
            document = encode(sample, self.processor, self.vision_loss, self._lock)
            if (document.labels == IGNORE_INDEX).all():
                raise SampleError("unsupervised", "the assistant says nothing, so nothing could be learned")
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
        """Width of a document's `patches`; 0 without images."""
        return _patch_dim(self.processor) if self.sees_images else 0

    @property
    def vision_ids(self) -> NDArray[np.int64]:
        """All ids that the layout of an image is made of."""
        layout = self.processor.image_input_ids(2, 1) if self.sees_images else ()
        return np.unique(np.asarray(layout, np.int64))


def load_encoder(path: str | Path) -> Encoder:
    """The encoder for a SOLO model, or for a plain LLM.

    Raises:
        SoloError: the folder is not readable as either, or its tokenizer has no EOS token.
    """
    from transformers import AutoTokenizer

    from solo_vlm.models.load import is_solo, load_processor

    if is_solo(path):
        return Encoder(load_processor(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise SoloError(
            f"cannot read a model's tokenizer from {path}: {str(error).splitlines()[0]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise SoloError(f"the tokenizer of {path} has no EOS token: set eos_token in tokenizer_config.json")
    return Encoder(tokenizer)
