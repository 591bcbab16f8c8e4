"""One entry of the catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from solo_vlm.data.catalog.raw_folder import RawFolder

RawRow = dict[str, Any]
SampleRow = dict[str, Any]
Convert = Callable[[RawRow, RawFolder], SampleRow]


@dataclass(frozen=True)
class StageCount:
    """What the paper counts of a data set in one pre-training stage; an instance is a packed sequence."""

    stage: int
    instances: int
    images: int
    tokens: int
    text_tokens: int

    @property
    def vision_tokens(self) -> int:
        """The rest of the tokens."""
        return self.tokens - self.text_tokens


@dataclass(frozen=True)
class UrlList:
    """A raw form that only lists URLs: how its columns are called, for a downloader of images."""

    format: Literal["parquet", "tsv"]
    url_column: str
    caption_column: str


@dataclass(frozen=True)
class DataSet:
    """A data set of the paper.

    Attributes:
        name: what the command line calls it.
        title: what the paper calls it.
        source: hub id (`owner/name`, with the configuration or file behind a colon) or URL.
        licence: as its source states it; "(unchecked)" where that page was not at hand.
        raw_schema: a raw row, in words.
        schema_confirmed: whether the shape was seen in a dataset card, an official script or the
            release's own code.
        evidence: where it was seen; else what the shape is based on.
        files: patterns that find the raw files below a folder.
        convert: from a raw row to the row of a sample.
        stages: the paper's counts, for a pre-training set.
        group: the paper's group, for a fine-tuning set.
        samples: the paper's count, rounded as it prints it, for a fine-tuning set.
        url_list: set where the source lists URLs, so that images have to be downloaded first.
        note: what else a user should know.
    """

    name: str
    title: str
    source: str
    licence: str
    raw_schema: str
    schema_confirmed: bool
    evidence: str
    files: tuple[str, ...]
    convert: Convert
    stages: tuple[StageCount, ...] = ()
    group: str | None = None
    samples: int | None = None
    url_list: UrlList | None = None
    note: str = ""

    @property
    def use(self) -> str:
        """The stages or the group that the set belongs to."""
        if self.group is not None:
            return self.group
        return "stage " + ", ".join(str(count.stage) for count in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The entry as plain values, for JSON."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("convert", "stages")}
        stages = [{**asdict(count), "vision_tokens": count.vision_tokens} for count in self.stages]
        return {**facts, "use": self.use, "stages": stages}
