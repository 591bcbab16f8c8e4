"""The catalog as a table, for the documentation."""

from __future__ import annotations

from collections.abc import Iterable

from solo_vlm.data.catalog.entry import DataSet

_HEAD = "| name | use | count | source | raw row | shape seen in | licence |\n|---|---|---|---|---|---|---|"


def markdown_table(data_sets: Iterable[DataSet]) -> str:
    """A row for each data set; notes follow the table."""
    data_sets = list(data_sets)
    rows = "\n".join(_row(data_set) for data_set in data_sets)
    notes = "\n".join(f"- **{data_set.name}**: {data_set.note}" for data_set in data_sets if data_set.note)
    return f"{_HEAD}\n{rows}\n\n{notes}\n"


def size(data_set: DataSet) -> str:
    """The paper's count: images, packed sequences of text, or samples."""
    if data_set.samples is not None:
        return f"{data_set.samples:,} samples"
    if not data_set.stages:
        return ""
    if any(count.images for count in data_set.stages):
        return f"{data_set.stages[0].images:,} images"
    return f"{sum(count.instances for count in data_set.stages):,} sequences"


def _row(data_set: DataSet) -> str:
    seen = data_set.evidence if data_set.schema_confirmed else f"**not confirmed:** {data_set.evidence}"
    cells = (
        f"`{data_set.name}`",
        data_set.use,
        size(data_set),
        _code_unless_link(data_set.source),
        data_set.raw_schema.replace("<image>", "`<image>`"),
        seen,
        data_set.licence,
    )
    return f"| {' | '.join(cells)} |"


def _code_unless_link(source: str) -> str:
    return f"<{source}>" if source.startswith("https://") else f"`{source}`"
