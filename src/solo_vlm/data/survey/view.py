"""HTML page of samples as the model sees them: patches, and tokens with the supervised ones colored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from solo_vlm.data.encode import IGNORE_INDEX, Document, Encoder
from solo_vlm.data.mixture import Mixture
from solo_vlm.data.survey.reading import ReadRow, RowReader, draw_rows
from solo_vlm.models.inspect import draw_grid
from solo_vlm.models.solo.image_processing_solo import patches_to_image
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import image_url, render

_TOKENS_SHOWN = 3000  # per sample; the page of a whole book would open slowly


@dataclass(frozen=True)
class Token:
    """One token, or a run of equal tokens of an image."""

    text: str
    kind: str
    count: int = 1


def write_gallery(path: Path, mixture: Mixture, encoder: Encoder, samples: int, seed: int = 0) -> int:
    """Write samples of a mixture as one self-contained HTML file; return their number.

    Args:
        path: HTML file to write.
        mixture: Sources, each with an equal number of samples, or all that it has.
        encoder: Encoder of the model.
        samples: Number of samples to show.
        seed: Seed of the random choice.

    Raises:
        SoloError: A source is missing.
    """
    sources = mixture.open_sources()
    cards = []
    for number, (name, source) in enumerate(zip(mixture.source_names(), sources, strict=True)):
        share = samples // len(sources) + (number < samples % len(sources))
        reader = RowReader(source, encoder, mixture.data.sequence_length)
        generator = np.random.default_rng([seed, number])
        drawn = draw_rows(source, share, generator) if share else ()
        rows = [row for shard in drawn for row in reader.read(*shard)]
        cards += [_card(name, row, encoder) for row in rows if not row.is_filtered]
    html = render("solo_vlm.data.survey", "view.html.jinja", cards=cards, image_url=image_url)
    write_text(path, html)
    return len(cards)


def _card(source: str, row: ReadRow, encoder: Encoder) -> dict[str, Any]:
    """Return the page's content for a row; of a long text that is cut, the first piece."""
    facts = {"source": source, "where": row.where, "error": row.error, "pieces": len(row.documents)}
    if row.error is not None:
        return facts
    document = row.documents[0]
    vision = np.isin(document.input_ids, encoder.vision_ids)
    return {
        **facts,
        "tokens": len(document),
        "vision_tokens": int(vision.sum()),
        "supervised": int((document.labels != IGNORE_INDEX).sum()),
        "images": [
            (draw_grid(image, rows, columns), rows, columns, num_image_tokens(rows, columns))
            for image, rows, columns in seen_images(document)
        ],
        "shown": list(islice(shown_tokens(document, vision, encoder.tokenizer), _TOKENS_SHOWN)),
    }


def seen_images(document: Document) -> Iterator[tuple[Image.Image, int, int]]:
    """Yield each image, reassembled from its patches, with its rows and columns."""
    start = 0
    for _, rows, columns in document.image_grid_thw.tolist():
        patches = document.pixel_values[start : start + rows * columns]
        start += rows * columns
        yield patches_to_image(patches, rows, columns), rows, columns


def shown_tokens(document: Document, vision: NDArray[np.bool_], tokenizer: Any) -> Iterator[Token]:
    """Yield tokens as text, in order; equal adjacent tokens within an image form one run."""
    kinds = np.where(vision, "vision", np.where(document.labels != IGNORE_INDEX, "supervised", "context"))
    runs = groupby(enumerate(zip(document.input_ids.tolist(), kinds.tolist(), strict=True)), key=_run)
    for (_, token_id, kind), members in runs:
        yield Token(_text(token_id, tokenizer), kind, sum(1 for _ in members))


def _run(item: tuple[int, tuple[int, str]]) -> tuple[int, int, str]:
    place, (token_id, kind) = item
    return (-1 if kind == "vision" else place), token_id, kind


def _text(token_id: int, tokenizer: Any) -> str:
    """Return a token's text, or its name in the vocabulary if it is part of a character or begins a word."""
    name, text = tokenizer.convert_ids_to_tokens(token_id), tokenizer.decode([token_id])
    if "\ufffd" in text or not text:
        return name
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text
