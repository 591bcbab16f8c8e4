"""What a mixture holds, as in the paper's Table 1: packed sequences, images, text and vision tokens."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import Mixture
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
from solo_vlm.models.solo.processing_solo import num_vision_tokens

FIGURES = ("samples", "images", "tokens", "text_tokens", "vision_tokens")

_TRIAL_PACKS = 256  # packed sequences that an estimate of the fill is taken from


@dataclass(frozen=True)
class Stats:
    """What a source, or all of them, holds when each row is read once.

    Attributes:
        instances: Packed sequences, each source packed alone.
        figures: Totals by the names of `FIGURES`; samples are the rows that can be used.
        margins: By the same names, how far the truth may lie from an estimate, in 95 cases of 100.
        skipped: Rows that cannot be used, by reason.
    """

    instances: int
    figures: dict[str, int]
    margins: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0))
    skipped: dict[str, int] = field(default_factory=dict)

    def as_dict(self, sequence_length: int) -> dict[str, Any]:
        """Plain values, for JSON, with what follows from them."""
        figures = self.figures
        intervals = {
            name: [max(figures[name] - margin, 0), figures[name] + margin]
            for name, margin in self.margins.items()
        }
        return {
            "instances": self.instances,
            **figures,
            "text_share": _ratio(figures["text_tokens"], figures["tokens"]),
            "vision_share": _ratio(figures["vision_tokens"], figures["tokens"]),
            "fill": _ratio(figures["tokens"], self.instances * sequence_length),
            "skipped": self.skipped,
            "interval_95": intervals,
        }


@dataclass(frozen=True)
class MixtureStats:
    """The sources of a mixture, whatever their weights.

    Attributes:
        sources: By their paths in the mixture.
        sequence_length: Tokens of a packed sequence.
        rows_drawn: A source, for an estimate; None where everything was read.
    """

    sources: dict[str, Stats]
    sequence_length: int
    rows_drawn: int | None

    @property
    def total(self) -> Stats:
        """Sums over the sources."""
        sources = self.sources.values()
        return Stats(
            sum(source.instances for source in sources),
            {name: sum(source.figures[name] for source in sources) for name in FIGURES},
            {name: round(math.hypot(*(source.margins[name] for source in sources))) for name in FIGURES},
            dict(sum((Counter(source.skipped) for source in sources), Counter())),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a source's share is that of all tokens."""
        total = self.total.as_dict(self.sequence_length)
        return {
            "exact": self.rows_drawn is None,
            "rows_drawn": self.rows_drawn,
            "sequence_length": self.sequence_length,
            "sources": [
                {
                    "source": path,
                    "share": _ratio(source.figures["tokens"], total["tokens"]),
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
    """Count what a mixture holds.

    Args:
        mixture: The sources, and how they are packed.
        encoder: Of the model that shall read them.
        samples: Rows to draw from each source for an estimate; None reads everything.
        on_progress: Called with the shards read and their number.

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
            stats[path] = _count(reader, mixture.data.packing_buffer)
        else:
            generator = np.random.default_rng(mixture.data.seed)
            stats[path] = _estimate(reader, mixture.data.packing_buffer, samples, generator)
    return MixtureStats(stats, mixture.data.sequence_length, samples)


class _Summary(NamedTuple):
    """Counts of a row, its document lengths, and the reason to skip it."""

    figures: list[int]
    lengths: list[int]
    reason: str | None


def _summarize(row: ReadRow) -> _Summary:
    lengths = [len(document) for document in row.documents]
    vision = sum(num_vision_tokens(document.image_grid_thw) for document in row.documents)
    tokens = sum(lengths)
    figures = [int(row.error is None), row.images, tokens, tokens - vision, vision]
    return _Summary(figures, lengths, row.error.reason if row.error else None)


def _count(reader: RowReader, packing_buffer: int) -> Stats:
    """Read every row; only sums are kept."""
    totals = np.zeros(len(FIGURES), np.int64)
    skipped: Counter[str] = Counter()
    packer: Packer[None] = Packer(reader.length, packing_buffer)
    instances = 0
    for row in reader.read_all():
        figures, lengths, reason = _summarize(row)
        totals += figures
        skipped.update([reason] if reason else [])
        instances += sum(packer.add(None, length) is not None for length in lengths)
    instances += sum(1 for _ in iter(packer.drain, None))
    return Stats(instances, _named(totals), skipped=dict(skipped))


def _estimate(reader: RowReader, packing_buffer: int, samples: int, generator: np.random.Generator) -> Stats:
    """Read some rows, and scale what they hold."""
    drawn: list[tuple[int, list[_Summary]]] = []
    for shard, rows, chosen in draw_rows(reader.source, samples, generator):
        drawn.append((len(rows), [_summarize(row) for row in reader.read(shard, rows, chosen)]))
    summaries = [summary for _, rows in drawn for summary in rows]
    reasons = sorted({summary.reason for summary in summaries if summary.reason})
    # A reason to skip is one more figure of a row: 1 where it applies.
    width = len(FIGURES) + len(reasons)
    figures = [
        [[*row.figures, *(row.reason == name for name in reasons)] for row in rows] for _, rows in drawn
    ]
    estimate = estimate_totals(
        len(reader.source),
        [
            (count, np.array(of_shard, float).reshape(-1, width))
            for (count, _), of_shard in zip(drawn, figures, strict=True)
        ],
    )
    totals = _named(estimate.totals)
    lengths = [length for summary in summaries for length in summary.lengths]
    instances = estimate_instances(totals["tokens"], lengths, reader.length, packing_buffer, generator)
    skipped = dict(zip(reasons, map(round, estimate.totals[len(FIGURES) :]), strict=True))
    return Stats(instances, totals, _named(estimate.margins), skipped)


def estimate_instances(
    tokens: int, lengths: list[int], capacity: int, packing_buffer: int, generator: np.random.Generator
) -> int:
    """Packed sequences that so many tokens will fill, from a trial with lengths drawn again and again.

    Args:
        tokens: Of the source.
        lengths: Of the documents that were read.
        capacity: Tokens in a packed sequence.
        packing_buffer: Documents to choose from when packing.
        generator: Of the trial.
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
    # Only what is packed from a full buffer: that is how nearly all of a large source is packed.
    closed = [packed for length in trial if (packed := packer.add(length, length)) is not None]
    return math.ceil(tokens * len(closed) / sum(map(sum, closed)))


def _named(values: NDArray[Any]) -> dict[str, int]:
    return {name: round(float(value)) for name, value in zip(FIGURES, values, strict=False)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
