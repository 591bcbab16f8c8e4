"""First rows of a source as the model will read them, before there is a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from solo_vlm.data.encode import Document, Encoder, load_pixels
from solo_vlm.data.sample import FilteredRow, Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.data.sources.formatted import FormattedSource
from solo_vlm.data.survey.view import shown_tokens
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.utils.errors import SoloError

_MAX_ROWS = 10_000  # rows read in search of usable ones


@dataclass(frozen=True)
class TextPart:
    """Text of a turn."""

    role: str
    text: str
    supervised: bool
    type: Literal["text"] = "text"


@dataclass(frozen=True)
class ImagePart:
    """Image of a turn: its size in pixels, its patch grid, and the tokens of its layout."""

    role: str
    width: int
    height: int
    rows: int
    columns: int
    tokens: int
    type: Literal["image"] = "image"


@dataclass(frozen=True)
class Run:
    """Adjacent tokens of one kind: of an image ("vision"), "supervised" or "context" text."""

    kind: str
    text: str
    tokens: int


@dataclass(frozen=True)
class PreviewedRow:
    """Row with its parts in order, or the error for which it is skipped.

    Attributes:
        where: File and row.
        parts: Texts and images.
        runs: Tokens in order, if there is a model.
        reason: Name of the error.
        error: Message of the error.
    """

    where: str
    parts: list[TextPart | ImagePart] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Preview:
    """First rows of a source.

    Attributes:
        source: Path of the source.
        format: Format of its rows.
        columns: Columns of the first rows.
        unread: Those of them that are not read.
        rows: Rows that are used, and those skipped between them.
        filtered: Number of rows between them that the filter leaves out.
    """

    source: str
    format: str
    columns: list[str]
    unread: list[str]
    rows: list[PreviewedRow]
    filtered: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def preview(source: Source, encoder: Encoder | None = None, rows: int = 3) -> Preview:
    """Read the first usable rows of a source.

    Args:
        source: Source to read.
        encoder: Encoder of the model; default: images as a new model reads them, and no tokens.
        rows: Number of usable rows.

    Raises:
        SoloError: The source has no rows.
    """
    formatted = source if isinstance(source, FormattedSource) else None
    shown: list[PreviewedRow] = []
    filtered = 0
    for row in _read(source, encoder):
        if row is None:
            filtered += 1
        else:
            shown.append(row)
        if sum(row.reason is None for row in shown) == rows or len(shown) + filtered == _MAX_ROWS:
            break
    if not shown and not filtered:
        raise SoloError(f"{source.name} has no rows")
    if formatted is None:
        return Preview(source.name, "samples", [], [], shown, filtered)
    columns, row_format = formatted.columns(), formatted.row_format
    return Preview(source.name, row_format.name, columns, row_format.unread(columns), shown, filtered)


def _read(source: Source, encoder: Encoder | None) -> Iterator[PreviewedRow | None]:
    """Yield rows in order; None for one that the filter leaves out."""
    for shard in range(len(source)):
        rows = source.read(shard)
        for number in range(len(rows)):
            where = source.where(shard, number)
            try:
                yield _previewed(where, parse_sample(rows[number]), encoder)
            except FilteredRow:
                yield None
            except SampleError as error:
                yield PreviewedRow(where, reason=error.reason, error=str(error))


def _previewed(where: str, sample: Sample, encoder: Encoder | None) -> PreviewedRow:
    if encoder is not None and not encoder.sees_images:
        return PreviewedRow(where, list(_parts(sample, None)), _runs(encoder(sample), encoder))
    image_processor = encoder.processor.image_processor if encoder else SoloImageProcessor()
    parts = list(_parts(sample, image_processor))
    return PreviewedRow(where, parts, _runs(encoder(sample), encoder) if encoder else [])


def _parts(sample: Sample, image_processor: SoloImageProcessor | None) -> Iterator[TextPart | ImagePart]:
    images = iter(sample.images)
    for message in sample.messages:
        role = message["role"]
        for part in message["content"]:
            if part["type"] == "text":
                yield TextPart(role, part["text"], role == "assistant")
            elif image_processor is not None:
                height, width, _ = load_pixels(next(images), image_processor).shape
                rows, columns = image_processor.get_patch_grid(height, width)
                yield ImagePart(role, width, height, rows, columns, num_image_tokens(rows, columns))


def _runs(document: Document, encoder: Encoder) -> list[Run]:
    vision = np.isin(document.input_ids, encoder.vision_ids)
    tokens = shown_tokens(document, vision, encoder.tokenizer)
    kinds = ((kind, list(group)) for kind, group in groupby(tokens, lambda token: token.kind))
    return [
        Run(kind, "".join(token.text for token in members), sum(token.count for token in members))
        for kind, members in kinds
    ]
