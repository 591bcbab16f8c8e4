"""Estimate of a run's data from a sample; small sources are read completely."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from solo_vlm.data.encode import Draft, Encoder
from solo_vlm.data.mixture import StreamFactory
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources import Source
from solo_vlm.data.streams import VirtualStream
from solo_vlm.data.survey.reading import DrawnRows, Estimate, ReadRow, RowReader, draw_rows, estimate_totals
from solo_vlm.data.survey.stats import estimate_instances
from solo_vlm.models.solo.processing_solo import num_vision_tokens
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

_ROWS = 1000  # rows of the first sample per source, as in `solo data stats`
_MAX_ROWS = 8192  # maximum rows if the first sample is too imprecise; smaller sources are read completely
_MARGIN = 0.01  # sufficient margin of error of a source's tokens, at 95% confidence
_MAX_SIMULATED = 50_000  # documents up to which the run's packing is simulated, in a few seconds


@dataclass(frozen=True)
class DataEstimate:
    """Estimate of a run's data.

    Attributes:
        sequences: Packed sequences in all epochs (`data.epochs`), or in one if that is not set.
        documents: Documents in these sequences.
        tokens: Tokens of one pass over all sources.
        fill: Share of non-padding tokens in a sequence.
        document_length: Mean tokens per document, with sources weighted as in the run.
        vision_share: Share of vision tokens.
    """

    sequences: int
    documents: int
    tokens: float
    fill: float
    document_length: float
    vision_share: float


def estimate_data(recipe: Recipe, encoder: Encoder, sources: Sequence[Source]) -> DataEstimate:
    """Estimate the data of a run from a deterministic sample of each source of its mixture."""
    samples = [_sample_source(recipe, encoder, source) for source in sources]
    if not sum(sample.totals.tokens for sample in samples):
        raise SoloError("no row of the data can be used: see solo data verify")
    shares = _token_shares(recipe, samples)
    documents_per_token, vision_per_token = (
        sum(
            share * getattr(sample.totals, name) / max(sample.totals.tokens, 1)
            for share, sample in zip(shares, samples, strict=True)
        )
        / sum(shares)
        for name in ("documents", "vision")
    )
    epochs = recipe.data.epochs or 1
    documents = epochs * sum(sample.totals.documents for sample in samples)
    sequences = _count_sequences(recipe, encoder, samples, documents)
    tokens = sum(sample.totals.tokens for sample in samples)
    fill = min(epochs * tokens / (sequences * recipe.data.sequence_length), 1.0)
    return DataEstimate(sequences, round(documents), tokens, fill, 1 / documents_per_token, vision_per_token)


class _Totals(NamedTuple):
    """Totals over all rows of a source."""

    samples: float
    documents: float
    tokens: float
    vision: float


class _SourceSample(NamedTuple):
    """Sampled rows of a source.

    Attributes:
        totals: Estimated totals; exact if all rows were read.
        rows: Per shard, its number of rows, and the document lengths of each row that was read.
    """

    source: Source
    totals: _Totals
    rows: dict[int, tuple[int, list[list[int]]]]


def _sample_source(recipe: Recipe, encoder: Encoder, source: Source) -> _SourceSample:
    """Read all rows of a small source, or draw rows until the number of tokens is precise enough."""
    reader = RowReader(source, encoder, recipe.data.sequence_length)

    def draw(num_rows: int) -> tuple[_SourceSample, Estimate]:
        return _read(reader, draw_rows(source, num_rows, np.random.default_rng(recipe.data.seed)))

    sample, estimate = draw(_ROWS)
    counts = [count for count, _ in sample.rows.values()]
    num_rows = len(source) * sum(counts) / len(counts)
    is_complete = all(count == len(read) for count, read in sample.rows.values())
    if num_rows and len(counts) == len(source) and is_complete:
        return sample
    if num_rows <= _MAX_ROWS:
        shards = ((shard, source.read(shard)) for shard in range(len(source)))
        sample, _ = _read(reader, (DrawnRows(shard, rows, list(range(len(rows)))) for shard, rows in shards))
        if not any(count for count, _ in sample.rows.values()):
            raise SoloError(f"{source.name} has no rows")
        return sample
    margin = estimate.margins[2] / max(estimate.totals[2], 1)
    if margin > _MARGIN:
        sample, _ = draw(min(math.ceil(_ROWS * (margin / _MARGIN) ** 2), _MAX_ROWS))
    return sample


def _read(reader: RowReader, drawn: Iterable[DrawnRows]) -> tuple[_SourceSample, Estimate]:
    """Read rows of some or all shards; totals are exact if these are all rows."""
    rows: dict[int, tuple[int, list[list[int]]]] = {}
    counts = []
    for shard, shard_rows, chosen in drawn:
        lengths, counted = [], np.empty((len(chosen), len(_Totals._fields)))
        for index, row in enumerate(reader.read(shard, shard_rows, chosen)):
            lengths.append([len(document) for document in row.documents])
            counted[index] = _count(row)
        rows[shard] = len(shard_rows), lengths
        counts.append((len(shard_rows), counted))
    estimate = estimate_totals(len(reader.source), counts)
    return _SourceSample(reader.source, _Totals(*estimate.totals), rows), estimate


def _count(row: ReadRow) -> _Totals:
    vision = sum(num_vision_tokens(document.image_grid_thw) for document in row.documents)
    return _Totals(row.error is None, len(row.documents), sum(map(len, row.documents)), vision)


def _token_shares(recipe: Recipe, samples: Sequence[_SourceSample]) -> list[float]:
    """Return the sources' relative shares of tokens: their sizes in full epochs, else their weights."""
    if recipe.steps is None:
        return [sample.totals.tokens for sample in samples]
    weights = [source.weight for source in recipe.data.sources]
    if recipe.data.weight_by != "samples":
        return weights
    return [
        weight * sample.totals.tokens / max(sample.totals.samples, 1)
        for weight, sample in zip(weights, samples, strict=True)
    ]


def _count_sequences(
    recipe: Recipe, encoder: Encoder, samples: Sequence[_SourceSample], documents: float
) -> int:
    """Count the packed sequences of all epochs, by simulating the packing if there are few documents."""
    data = recipe.mixture.data
    if documents <= _MAX_SIMULATED:
        sources = [_SimulatedSource(sample, data.seed) for sample in samples]
        settings = data.model_copy(update={"epochs": data.epochs or 1, "max_skipped": 1})
        make_stream = StreamFactory(sources, settings, encoder, _SimulatedStream)
        return sum(1 for index in range(recipe.streams) for _ in make_stream(index))
    generator = np.random.default_rng(data.seed)
    full = sum(
        estimate_instances(
            round(sample.totals.tokens * (data.epochs or 1)),
            [length for _, rows in sample.rows.values() for lengths in rows for length in lengths],
            data.sequence_length,
            data.packing_buffer,
            generator,
        )
        for sample in samples
    )
    # The last sequence of each stream (and source, if sequences are weighted) is half full on average.
    return full + recipe.streams * (len(samples) if data.weight_by == "sequences" else 1) // 2


class _SimulatedSource:
    """Source whose rows are document lengths, either read or resampled."""

    def __init__(self, sample: _SourceSample, seed: int) -> None:
        self.name = sample.source.name
        self._source = sample.source
        self._num_shards = len(sample.source)
        self._rows = sample.rows
        self._seed = seed
        self._pool = [lengths for _, rows in sample.rows.values() for lengths in rows]
        self._counts = [count for count, _ in sample.rows.values()]

    def __len__(self) -> int:
        return self._num_shards

    def read(self, shard: int) -> Sequence[Any]:
        count, known = self._rows.get(shard, (None, []))
        if count == len(known):
            return known
        generator = np.random.default_rng((self._seed, shard))
        count = generator.choice(self._counts) if count is None else count
        return [self._pool[row] for row in generator.integers(len(self._pool), size=count)]

    def memory(self, shard: int) -> int:
        return self._source.memory(shard)

    def where(self, shard: int, row: int) -> str:
        return f"{self.name}, shard {shard}, row {row}"

    def fingerprint(self) -> str:
        return ""


class _SimulatedStream(VirtualStream):
    """Virtual stream that packs lengths instead of documents."""

    def drafts_of(self, row: Any) -> list[Draft]:
        if not row:
            raise SampleError("planned", "stands for a row that could not be used")
        return [
            Draft(np.broadcast_to(np.int32(0), length), np.broadcast_to(np.True_, length)) for length in row
        ]
