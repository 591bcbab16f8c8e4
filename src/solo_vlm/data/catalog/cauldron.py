"""Rows of The Cauldron: `{"images": [image, ...], "texts": [{"user", "assistant", "source"}, ...]}`."""

from __future__ import annotations

from solo_vlm.data.catalog.entry import RawRow, SampleRow
from solo_vlm.data.catalog.raw_folder import RawFolder, StoredImage
from solo_vlm.data.catalog.rows import Turn, conversation, document, field, list_field, text
from solo_vlm.data.sample import SampleError


def chat(row: RawRow, folder: RawFolder) -> SampleRow:
    """All questions about the images of a row, as one conversation."""
    turns: list[Turn] = []
    for question, answer in _pairs(row):
        turns += [("user", [text(question)]), ("assistant", [text(answer)])]
    return conversation(turns, _images(row, folder))


def questions_and_answers(row: RawRow, folder: RawFolder) -> SampleRow:
    """The same as a document: each question above its answer."""
    pairs = [f"{text(question)['text']}\n{text(answer)['text']}" for question, answer in _pairs(row)]
    return document("\n\n".join(pairs), _images(row, folder))


def _pairs(row: RawRow) -> list[tuple[str, str]]:
    pairs = [(field(turn, "user"), field(turn, "assistant")) for turn in list_field(row, "texts")]
    if not pairs:
        raise SampleError("no-answer", "the row has no texts")
    return pairs


def _images(row: RawRow, folder: RawFolder) -> list[StoredImage]:
    images = [folder.image(image) for image in list_field(row, "images")]
    if not images:
        raise SampleError("image-missing", "the row has no images")
    return images
