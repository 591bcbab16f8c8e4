"""Statistics of a mixture, as in the paper's Table 1: packed sequences, images, text and vision tokens."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import Mixture, default_streams
from solo_vlm.data.packing import Packer, pack
from solo_vlm.data.survey.reading import (
    OnProgress,
    ReadRow,
    RowReader,
    ShardProgress,
    draw_rows,
    estimate_totals,
    shards_to_read,
)
from solo_vlm.data.survey.shuffle import shuffle_quality
from solo_vlm.models.solo.processing_solo import num_vision_tokens

COUNTS = ("samples", "images", "tokens", "text_tokens", "vision_tokens")

_FILTERED = "filtered"  # the reason for rows that a filter leaves out
_TRIAL_PACKS = 256  # packed sequences from which the fill is estimated


@dataclass(frozen=True)
class Stats:
    """Statistics of one epoch of a source, or of all sources.

    Attributes:
        instances: Number of packed sequences, with each source packed alone.
        totals: Totals by name, one for each of `COUNTS`; samples are the usable rows.
        margins: Half-widths of the 95% confidence intervals of estimated totals, by name.
        skipped: Number of unusable rows by reason.
        filtered: Number of rows that the source's filter leaves out.
        shuffle: Shards per packed sequence, relative to a perfect shuffle; see `shuffle_quality`.
    """

    instances: int
    totals: dict[str, int]
    margins: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    skipped: dict[str, int] = field(default_factory=dict)
    filtered: int = 0
    shuffle: float = 1.0

    def as_dict(self, sequence_length: int) -> dict[str, Any]:
        """Return plain values for JSON, with derived shares and intervals."""
        totals = self.totals
        intervals = {
            name: [max(totals[name] - margin, 0), totals[name] + margin]
            for name, margin in self.margins.items()
        }
        return {
            "instances": self.instances,
            **totals,
            "text_share": _ratio(totals["text_tokens"], totals["tokens"]),
            "vision_share": _ratio(totals["vision_tokens"], totals["tokens"]),
            "fill": _ratio(totals["tokens"], self.instances * sequence_length),
            "skipped": self.skipped,
            "filtered": self.filtered,
            "shuffle": self.shuffle,
            "interval_95": intervals,
        }


@dataclass(frozen=True)
class MixtureStats:
    """Statistics of the sources of a mixture, regardless of their weights.

    Attributes:
        sources: Statistics by path in the mixture.
        sequence_length: Tokens per packed sequence.
        rows_drawn: Rows sampled per source for an estimate; None if all were read.
    """

    sources: dict[str, Stats]
    sequence_length: int
    rows_drawn: int | None

    @property
    def total(self) -> Stats:
        """Totals over the sources."""
        sources = self.sources.values()
        return Stats(
            sum(source.instances for source in sources),
            {name: sum(source.totals[name] for source in sources) for name in COUNTS},
            {name: round(math.hypot(*(source.margins[name] for source in sources))) for name in COUNTS},
            dict(sum((Counter(source.skipped) for source in sources), Counter())),
            sum(source.filtered for source in sources),
            min((source.shuffle for source in sources), default=1.0),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a source's share is its share of all tokens."""
        total = self.total.as_dict(self.sequence_length)
        return {
            "exact": self.rows_drawn is None,
            "rows_drawn": self.rows_drawn,
            "sequence_length": self.sequence_length,
            "sources": [
                {
                    "source": path,
                    "share": _ratio(source.totals["tokens"], total["tokens"]),
                    **source.as_dict(self.sequence_length),
                }
                for path, source in self.sources.items()
            ],
            "total": total,
        }


def mixture_stats(
    mixture: Mixture,
    encoder: Encoder,
    samples: int | None = 1000,
    on_progress: OnProgress = lambda done, total: None,
) -> MixtureStats:
    """Count or estimate the content of a mixture.

    Args:
        mixture: Sources and packing settings.
        encoder: Encoder of the model.
        samples: Rows to sample per source for an estimate; None reads all rows.
        on_progress: Called with the completed and the total number of shards.

    Raises:
        SoloError: A source is missing.
    """
    sources = mixture.open_sources()
    counts = [len(s) if samples is None else shards_to_read(len(s), samples) for s in sources]
    on_shard = ShardProgress(sum(counts), on_progress)
    stats = {}
    for path, source in zip(mixture.source_labels(), sources, strict=True):
        reader = RowReader(source, encoder, mixture.data.sequence_length, on_shard)
        if samples is None:
            counted, rows = _count(reader, mixture.data.packing_buffer)
        else:
            generator = np.random.default_rng(mixture.data.seed)
            counted, rows = _estimate(reader, mixture.data.packing_buffer, samples, generator)
        together = round(counted.totals["samples"] / max(counted.instances, 1))
        streams = mixture.data.streams or default_streams()
        quality = shuffle_quality(source, rows, together, streams, len(sources), mixture.data.seed)
        stats[path] = replace(counted, shuffle=quality)
    return MixtureStats(stats, mixture.data.sequence_length, samples)


class _Summary(NamedTuple):
    """Counts of a row, its document lengths, and the reason to leave it out."""

    counts: list[int]
    lengths: list[int]
    reason: str | None


def _summarize(row: ReadRow) -> _Summary:
    lengths = [len(document) for document in row.documents]
    vision = sum(num_vision_tokens(document.image_grid_thw) for document in row.documents)
    tokens = sum(lengths)
    counts = [int(row.error is None), row.images, tokens, tokens - vision, vision]
    reason = _FILTERED if row.is_filtered else row.error.reason if row.error else None
    return _Summary(counts, lengths, reason)


def _count(reader: RowReader, packing_buffer: int) -> tuple[Stats, dict[int, int]]:
    """Read every row, keeping only sums; also return the number of rows of each shard."""
    totals = np.zeros(len(COUNTS), np.int64)
    left_out: Counter[str] = Counter()
    packer: Packer[None] = Packer(reader.length, packing_buffer)
    instances = 0
    rows_of: dict[int, int] = {}
    for shard in range(len(reader.source)):
        rows = reader.source.read(shard)
        rows_of[shard] = len(rows)
        for row in reader.read(shard, rows, range(len(rows))):
            counts, lengths, reason = _summarize(row)
            totals += counts
            left_out.update([reason] if reason else [])
            instances += sum(packer.add(None, length) is not None for length in lengths)
    instances += sum(1 for _ in iter(packer.drain, None))
    filtered = left_out.pop(_FILTERED, 0)
    return Stats(instances, _named(totals), skipped=dict(left_out), filtered=filtered), rows_of


def _estimate(
    reader: RowReader, packing_buffer: int, samples: int, generator: np.random.Generator
) -> tuple[Stats, dict[int, int]]:
    """Read a sample of rows, and scale their counts; also return the number of rows of the shards drawn."""
    drawn: list[tuple[int, list[_Summary]]] = []
    rows_of: dict[int, int] = {}
    for shard, rows, chosen in draw_rows(reader.source, samples, generator):
        rows_of[shard] = len(rows)
        drawn.append((len(rows), [_summarize(row) for row in reader.read(shard, rows, chosen)]))
    summaries = [summary for _, rows in drawn for summary in rows]
    reasons = sorted({summary.reason for summary in summaries if summary.reason})
    # Each reason to leave a row out is one more column: 1 for the rows that it applies to.
    width = len(COUNTS) + len(reasons)
    counts = [[[*row.counts, *(row.reason == name for name in reasons)] for row in rows] for _, rows in drawn]
    estimate = estimate_totals(
        len(reader.source),
        [
            (count, np.array(of_shard, float).reshape(-1, width))
            for (count, _), of_shard in zip(drawn, counts, strict=True)
        ],
    )
    totals = _named(estimate.totals)
    lengths = [length for summary in summaries for length in summary.lengths]
    instances = estimate_instances(totals["tokens"], lengths, reader.length, packing_buffer, generator)
    left_out = dict(zip(reasons, map(round, estimate.totals[len(COUNTS) :]), strict=True))
    filtered = left_out.pop(_FILTERED, 0)
    return Stats(instances, totals, _named(estimate.margins), left_out, filtered), rows_of


def estimate_instances(
    tokens: int, lengths: list[int], capacity: int, packing_buffer: int, generator: np.random.Generator
) -> int:
    """Estimate the number of packed sequences by packing documents with resampled lengths.

    Args:
        tokens: Number of tokens of the source.
        lengths: Lengths of the sampled documents.
        capacity: Tokens per packed sequence.
        packing_buffer: Documents that the packer chooses from.
        generator: Random generator of the lengths.
    """
    if not lengths:
        return 0
    mean = sum(lengths) / len(lengths)
    documents = math.ceil(tokens / mean)
    enough = packing_buffer + math.ceil(_TRIAL_PACKS * capacity / mean)
    trial = generator.choice(lengths, min(documents, enough)).tolist()
    if documents <= enough:
        return len(pack(trial, capacity, packing_buffer))
    packer: Packer[int] = Packer(capacity, packing_buffer)
    # Count only sequences packed from a full buffer, as nearly all of a large source is.
    closed = [packed for length in trial if (packed := packer.add(length, length)) is not None]
    return math.ceil(tokens * len(closed) / sum(map(sum, closed)))


def _named(values: NDArray[Any]) -> dict[str, int]:
    return {name: round(float(value)) for name, value in zip(COUNTS, values, strict=False)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
