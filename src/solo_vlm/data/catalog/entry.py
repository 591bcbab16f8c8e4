"""Catalog of data sets, of the paper and of the recipes: entries, read from YAML, by name and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from string import Template
from typing import Any, Literal

import yaml

from solo_vlm.data.catalog import converters
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.formats import converters as common
from solo_vlm.data.formats.rows import RawRow, SampleRow
from solo_vlm.utils.errors import SoloError, did_you_mean

_HEAD = "| name | use | count | source | raw row | shape seen in | license |\n|---|---|---|---|---|---|---|"
_RAW_SCHEMAS = {
    "llava": 'an array of {"id", "image": path, "conversations": [{"from": human or gpt, "value"}]}',
    "downloaded": "WebDataset tars of the downloader (key, jpg, txt, json)",
}


@dataclass(frozen=True)
class StageCount:
    """The paper's counts for a data set in one pre-training stage; an instance is a packed sequence."""

    stage: int
    instances: int
    images: int
    tokens: int
    text_tokens: int

    @property
    def vision_tokens(self) -> int:
        """Number of tokens that are not text."""
        return self.tokens - self.text_tokens


@dataclass(frozen=True)
class UrlList:
    """File format and column names of a published list of image URLs."""

    format: Literal["parquet", "tsv"]
    url_column: str
    caption_column: str


@dataclass(frozen=True)
class DataSet:
    """A data set of the paper, or one of the recipes `solo-open/`.

    Attributes:
        name: Name on the command line.
        title: Name in the paper, or of the data set itself.
        source: Hub ID (`owner/name`, followed by `:` and a configuration or file) or URL.
        license: License stated by the source; "(unchecked)" if that page was not available.
        raw_schema: Description of a raw row.
        evidence: Source of the raw format: where it was seen, or what it is based on.
        files: Patterns that match the raw files below a folder.
        converter: Function from a raw row to a sample row.
        class_list: File in the raw folder with the names of classes, which the converter takes.
        schema_confirmed: Whether the format was seen in a dataset card, an official script or the original
            SOLO code.
        stages: The paper's counts, for a pre-training set.
        group: The paper's group, for a fine-tuning set; or the stages of `solo-open/`.
        samples: The paper's rounded count, for a fine-tuning set.
        url_list: Columns of the list, if the source publishes URLs and images have to be downloaded first.
        note: Anything else that a user should know.
    """

    name: str
    title: str
    source: str
    license: str
    raw_schema: str
    evidence: str
    files: tuple[str, ...]
    converter: Callable[..., SampleRow]
    class_list: str | None = None
    schema_confirmed: bool = True
    stages: tuple[StageCount, ...] = ()
    group: str | None = None
    samples: int | None = None
    url_list: UrlList | None = None
    note: str = ""

    @property
    def use(self) -> str:
        """Pre-training stages or fine-tuning group of the data set."""
        if self.group is not None:
            return self.group
        return "stage " + ", ".join(str(count.stage) for count in self.stages)

    @property
    def size(self) -> str:
        """The paper's count: images, packed sequences of text, or samples."""
        if self.samples is not None:
            return f"{self.samples:,} samples"
        if not self.stages:
            return ""
        if any(count.images for count in self.stages):
            return f"{self.stages[0].images:,} images"
        return f"{sum(count.instances for count in self.stages):,} sequences"

    def convert(self, row: RawRow, folder: RawFolder) -> SampleRow:
        """Convert a raw row of the folder to a row of a sample file, with its images in it.

        Raises:
            SampleError: The row or an image is unusable.
        """
        options = {"names": folder.class_names(self.class_list)} if self.class_list else {}
        return folder.embed(self.converter(row, **options))

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as plain values, for JSON."""
        facts = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("converter", "class_list", "stages")
        }
        stages = [{**asdict(count), "vision_tokens": count.vision_tokens} for count in self.stages]
        return {**facts, "use": self.use, "stages": stages}


def _load(file: str) -> Iterator[DataSet]:
    """Yield the entries of a YAML file; `cauldron` in one stands for the fields common to all its parts."""
    for name, entry in yaml.safe_load(files(__package__).joinpath(file).read_text("utf-8")).items():
        if config := entry.pop("cauldron", None):
            terms = entry.get("license", "own terms, see its source (unchecked)")
            entry = {
                "source": f"HuggingFaceM4/the_cauldron:{config}",
                "raw_schema": 'parquet rows {"images": [image], "texts": [{"user", "assistant", "source"}]}',
                "evidence": "dataset card of The Cauldron",
                "files": ["*.parquet"],
                "convert": "cauldron_chat",
                **entry,
                "license": f"{entry['title']}: {terms}; Cauldron prompts: CC-BY-4.0",
            }
        entry["raw_schema"] = Template(entry["raw_schema"]).substitute(_RAW_SCHEMAS)
        entry["files"] = tuple(entry["files"])
        entry["stages"] = tuple(StageCount(*counts) for counts in entry.get("stages", ()))
        if "url_list" in entry:
            entry["url_list"] = UrlList(**entry["url_list"])
        fields = entry.pop("convert")
        fields = fields if isinstance(fields, dict) else {"name": fields}
        function = fields.pop("name")
        module = converters if hasattr(converters, function) else common
        entry["converter"] = partial(getattr(module, function), **fields)
        yield DataSet(name=name, **entry)


DATA_SETS = {
    entry.name: entry
    for file in ("pretraining.yaml", "finetuning.yaml", "open.yaml")
    for entry in _load(file)
}


def get(name: str) -> DataSet:
    """Return the data set with this name.

    Raises:
        SoloError: No data set has this name; the message suggests the closest one.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    hint = did_you_mean(name, DATA_SETS)
    raise SoloError(f"no data set {name} in the catalog{hint} (solo data list shows all)")


def markdown_table(data_sets: Iterable[DataSet]) -> str:
    """Return one table row per data set, followed by the notes."""
    data_sets = list(data_sets)
    rows = "\n".join(_table_row(data_set) for data_set in data_sets)
    notes = "\n".join(f"- **{data_set.name}**: {data_set.note}" for data_set in data_sets if data_set.note)
    return f"{_HEAD}\n{rows}\n\n{notes}\n"


def _table_row(data_set: DataSet) -> str:
    source = data_set.source
    cells = (
        f"`{data_set.name}`",
        data_set.use,
        data_set.size,
        f"<{source}>" if source.startswith("https://") else f"`{source}`",
        data_set.raw_schema.replace("<image>", "`<image>`"),
        data_set.evidence if data_set.schema_confirmed else f"**not confirmed:** {data_set.evidence}",
        data_set.license,
    )
    return f"| {' | '.join(cells)} |"
