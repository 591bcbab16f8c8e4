"""What a run will read, from a sample of its data; small data are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from solo_vlm.data.encode import Document, Encoder
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources import Source
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.data.survey.reading import ReadRow, RowReader
from solo_vlm.data.survey.sampling import Estimate, draw_rows, estimate_totals
from solo_vlm.data.survey.stats import estimate_instances
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

_ROWS = 1000  # drawn from each source for a first look, as many as by `solo data stats`
_MORE_ROWS = 8192  # drawn at most, where the first look is not exact enough; smaller sources are read whole
_MARGIN = 0.01  # of a source's tokens, with a probability of 95%, is exact enough
_SIMULATED = 50_000  # documents that are packed for the plan as the run will pack them, in a few seconds


@dataclass(frozen=True)
class DataEstimate:
    """What a run reads.

    Attributes:
        sequences: packed sequences in all passes over the data (`data.epochs`), or in one where that is not
            set.
        documents: in these sequences.
        fill: share of a sequence that is not padding.
        document_length: mean tokens of a document, sources weighted as the run reads them.
        vision_share: of vision tokens among all.
    """

    sequences: int
    documents: int
    fill: float
    document_length: float
    vision_share: float


def estimate_data(recipe: Recipe, encoder: Encoder) -> DataEstimate:
    """Look at some rows of each source, the same ones whenever it is called.

    Args:
        recipe: for the sources and how they are packed.
        encoder: of the model that shall read them.

    Raises:
        SoloError: a source is missing or unreadable, or no row that was looked at can be used.
    """
    looks = [_look(recipe, encoder, source) for source in recipe.mixture.open_sources()]
    if not sum(look.totals.tokens for look in looks):
        raise SoloError("nothing in the data can be used; see solo data verify")
    shares = _token_shares(recipe, looks)
    documents, vision = (
        sum(
            share * getattr(look.totals, name) / max(look.totals.tokens, 1)
            for share, look in zip(shares, looks, strict=True)
        )
        / sum(shares)
        for name in ("documents", "vision")
    )  # a token
    passes = recipe.data.epochs or 1
    total = passes * sum(look.totals.documents for look in looks)
    sequences = _sequences(recipe, encoder, looks, total)
    fill = passes * sum(look.totals.tokens for look in looks) / (sequences * recipe.data.sequence_length)
    return DataEstimate(sequences, round(total), min(fill, 1.0), 1 / documents, vision)


class _Totals(NamedTuple):
    """What a source holds."""

    samples: float
    documents: float
    tokens: float
    vision: float


class _Look(NamedTuple):
    """What was seen of a source.

    Attributes:
        source: that was looked at.
        totals: of all its rows, exact where all were read.
        rows: by unit, how many it has, and the lengths of the documents of those that were read, by row.
    """

    source: Source
    totals: _Totals
    rows: dict[int, tuple[int, list[list[int]]]]


def _look(recipe: Recipe, encoder: Encoder, source: Source) -> _Look:
    """Draw rows until their tokens are known well enough; read all rows of a small source."""
    reader = RowReader(source, encoder, recipe.data.sequence_length)
    seed = recipe.data.seed
    look, estimate = _draw(reader, _ROWS, seed)
    rows = len(source) * sum(count for count, _ in look.rows.values()) / len(look.rows)
    all_units = len(look.rows) == len(source)
    if rows and all_units and all(count == len(read) for count, read in look.rows.values()):
        return look
    if rows <= _MORE_ROWS:
        return _read_all(reader)
    margin = estimate.margins[2] / max(estimate.totals[2], 1)
    if margin > _MARGIN:
        wanted = min(math.ceil(_ROWS * (margin / _MARGIN) ** 2), _MORE_ROWS)
        look, _ = _draw(reader, wanted, seed)
    return look


def _draw(reader: RowReader, samples: int, seed: int) -> tuple[_Look, Estimate]:
    rows: dict[int, tuple[int, list[list[int]]]] = {}
    figures = []
    for unit, of_unit, chosen in draw_rows(reader.source, samples, np.random.default_rng(seed)):
        read = list(reader.read(unit, of_unit, chosen))
        rows[unit] = len(of_unit), [_lengths(row) for row in read]
        figures.append(
            (len(of_unit), np.array([_figures(row, reader.encoder) for row in read]).reshape(-1, 4))
        )
    estimate = estimate_totals(len(reader.source), figures)
    return _Look(reader.source, _Totals(*estimate.totals), rows), estimate


def _read_all(reader: RowReader) -> _Look:
    rows: dict[int, tuple[int, list[list[int]]]] = {}
    totals = np.zeros(4)
    for unit in range(len(reader.source)):
        of_unit = reader.source.read(unit)
        lengths = []
        for row in reader.read(unit, of_unit, range(len(of_unit))):
            lengths.append(_lengths(row))
            totals += _figures(row, reader.encoder)
        rows[unit] = len(of_unit), lengths
    if not any(count for count, _ in rows.values()):
        raise SoloError(f"{reader.source.name} has no rows")
    return _Look(reader.source, _Totals(*totals), rows)


def _lengths(row: ReadRow) -> list[int]:
    return [len(document) for document in row.documents]


def _figures(row: ReadRow, encoder: Encoder) -> tuple[float, ...]:
    vision = sum(int(np.isin(document.input_ids, encoder.vision_ids).sum()) for document in row.documents)
    return _Totals(row.error is None, len(row.documents), sum(_lengths(row)), vision)


def _token_shares(recipe: Recipe, looks: Sequence[_Look]) -> list[float]:
    """In what proportions the sources' tokens are read: all of them, or as the weights say."""
    if recipe.steps is None:
        return [look.totals.tokens for look in looks]
    weights = [source.weight for source in recipe.data.sources]
    if recipe.data.weigh != "samples":
        return weights
    return [
        weight * look.totals.tokens / max(look.totals.samples, 1)
        for weight, look in zip(weights, looks, strict=True)
    ]


def _sequences(recipe: Recipe, encoder: Encoder, looks: Sequence[_Look], documents: float) -> int:
    """Packed sequences of all passes; few documents are packed as the run will do it."""
    data = recipe.data
    if documents <= _SIMULATED:
        items = [
            MixtureItem(_Lengths(look, data.seed), source.weight)
            for look, source in zip(looks, data.sources, strict=True)
        ]
        return sum(1 for index in range(data.streams) for _ in _PlannedStream(index, recipe, encoder, items))
    generator = np.random.default_rng(data.seed)
    full = sum(
        estimate_instances(
            round(look.totals.tokens * (data.epochs or 1)),
            [length for _, rows in look.rows.values() for lengths in rows for length in lengths],
            data.sequence_length,
            data.packing_buffer,
            generator,
        )
        for look in looks
    )
    # Each stream has a last sequence, half full on average, and where sequences are weighed, each of its
    # sources has one.
    return full + data.streams * (len(looks) if data.weigh == "sequences" else 1) // 2


class _Lengths:
    """A source whose rows are lengths of documents: those that were read, others drawn from them."""

    def __init__(self, look: _Look, seed: int) -> None:
        self.name = look.source.name
        self._units = len(look.source)
        self._rows = look.rows
        self._seed = seed
        self._pool = [lengths for _, rows in look.rows.values() for lengths in rows]
        self._counts = [count for count, _ in look.rows.values()]

    def __len__(self) -> int:
        return self._units

    def read(self, unit: int) -> Sequence[Any]:
        count, known = self._rows.get(unit, (None, []))
        if count == len(known):
            return known
        generator = np.random.default_rng((self._seed, unit))
        count = generator.choice(self._counts) if count is None else count
        return [self._pool[row] for row in generator.integers(len(self._pool), size=count)]

    def where(self, unit: int, row: int) -> str:
        return f"{self.name}, unit {unit}, row {row}"

    def fingerprint(self) -> str:
        return ""


class _PlannedStream(VirtualStream):
    """A stream of the run that packs lengths instead of documents."""

    def __init__(self, index: int, recipe: Recipe, encoder: Encoder, items: list[MixtureItem]) -> None:
        data = recipe.data
        super().__init__(
            index,
            data.streams,
            items,
            encoder,
            data.sequence_length,
            seed=data.seed,
            epochs=data.epochs or 1,
            weigh=data.weigh,
            buffer_size=data.packing_buffer,
            max_skipped=1,
        )

    def documents_of(self, row: Any) -> list[Document]:
        if not row:
            raise SampleError("planned", "a row like one that could not be used")
        patches, grids = np.empty((0, 0), np.uint8), np.empty((0, 3), np.int64)
        ids = [np.broadcast_to(np.int64(0), length) for length in row]
        return [Document(of_document, of_document, patches, grids) for of_document in ids]
