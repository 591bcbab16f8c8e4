"""Verification of all data before a long run: every unusable row, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from solo_vlm.data.catalog.convert import Report
from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import Mixture
from solo_vlm.data.survey.reading import OnProgress, RowReader, ShardProgress
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import json_line


@dataclass(frozen=True)
class Verification:
    """Result of reading all data.

    Attributes:
        sources: Report of each source's rows, by its path in the mixture.
        filtered: Number of rows that each source's filter leaves out.
        max_skipped: Maximum fraction of unusable rows.
    """

    sources: dict[str, Report]
    filtered: dict[str, int]
    max_skipped: float

    @property
    def rows(self) -> int:
        return self.rejected + sum(report.samples for report in self.sources.values())

    @property
    def rejected(self) -> int:
        return sum(report.rejected.total() for report in self.sources.values())

    @property
    def passed(self) -> bool:
        return self.rejected <= self.max_skipped * self.rows

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "passed": self.passed,
            "rows": self.rows,
            "rejected": self.rejected,
            "max_skipped": self.max_skipped,
            "sources": [
                {"source": path, **report.as_dict(), "filtered": self.filtered[path]}
                for path, report in self.sources.items()
            ],
        }


def verify_mixture(
    mixture: Mixture,
    encoder: Encoder,
    report_file: Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Verification:
    """Read every row of every source once, as training would: schema, images, chat template, length.

    Args:
        mixture: Mixture of the sources.
        encoder: Encoder of the model.
        report_file: JSON Lines file to write, with one line per unusable row; appears when complete.
        on_progress: Called with the completed and the total number of shards.

    Raises:
        SoloError: A source is missing, or has no rows.
    """
    sources = mixture.open_sources()
    on_shard = ShardProgress(sum(map(len, sources)), on_progress)
    reports: dict[str, Report] = {}
    filtered: dict[str, int] = {}
    with _opened(report_file) as lines:
        for path, source in zip(mixture.source_labels(), sources, strict=True):
            reader = RowReader(source, encoder, mixture.data.sequence_length, on_shard)
            reports[path], filtered[path] = _verify(path, reader, lines)
            if not reports[path].samples + reports[path].rejected.total():
                left_out = " that its filter keeps" if filtered[path] else ""
                raise SoloError(f"{source.name} has no rows{left_out}")
    return Verification(reports, filtered, mixture.data.max_skipped)


@contextmanager
def _opened(file: Path | None) -> Iterator[BinaryIO | None]:
    if file is None:
        yield None
        return
    with new_file(file) as partial, partial.open("wb") as lines:
        yield lines


def _verify(path: str, reader: RowReader, lines: BinaryIO | None) -> tuple[Report, int]:
    """Return the report of a source, and the number of rows that its filter leaves out."""
    report, filtered = Report(), 0
    for row in reader.read_all():
        if row.is_filtered:
            filtered += 1
            continue
        if row.error is None:
            report.samples += 1
            report.images += row.images
            continue
        report.reject(row.where, row.error)
        if lines is not None:
            line = {"source": path, "where": row.where, "reason": row.error.reason, "error": str(row.error)}
            lines.write(json_line(line))
    return report, filtered
