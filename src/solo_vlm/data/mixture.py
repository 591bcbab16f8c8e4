"""Mixture of sources: weights, packing, and the loader of a data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from solo_vlm.data.encode import Encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sources import SharedShards, Source, SourceFormat, open_source
from solo_vlm.data.sources.files import DEFAULT_LIMITS, Limits
from solo_vlm.data.streams import MixtureItem, VirtualStream, WeightBy
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import Settings

LOADER_SETTINGS = frozenset({"workers", "threads"})  # `DataSettings` that do not affect the data


class SourceSettings(Settings):
    """One source of a mixture.

    Attributes:
        path: File, folder, glob pattern or URL; `hf://datasets/OWNER/NAME` is a data set of the hub.
        weight: Relative share, see `DataSettings.weight_by`.
        format: Format of the rows, such as "llava"; "auto" recognizes it from the first ones.
        images: Folder that relative image paths refer to; default: the folder of the row's file.
        columns: Columns of the rows, by the names that the format reads: `{image: photo, text: title}`.
        filter: Rows to keep: a comparison of their columns, such as `relevance_min >= 3 and "en" in lang`.
        cache: Download each file of the hub into its cache (HF_HOME) when it is first read.
    """

    path: str
    weight: PositiveFloat = 1.0
    format: SourceFormat = "auto"
    images: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    filter: str | None = None
    cache: bool = False

    def open(self, limits: Limits = DEFAULT_LIMITS, at: Callable[[str], str] = str) -> Source:
        """Open the source.

        Args:
            limits: Limits for reading the files.
            at: Function that resolves a path.

        Raises:
            SoloError: The source is missing or unreadable, or its rows are not as the settings say.
        """
        images = None if self.images is None else at(self.images)
        return open_source(at(self.path), limits, self.format, images, self.columns, self.filter, self.cache)


class DataSettings(Settings):
    """Training data and packing; the defaults are the paper's (sequences of 32,768 tokens).

    Attributes:
        sources: Sources of .parquet, .jsonl, .tar or -text.idx files, with their weights.
        sequence_length: Tokens per packed sequence.
        weight_by: Unit of the weights: "tokens", "samples", or packed "sequences" of a single source each.
        epochs: Epochs over each source; endless if null.
        streams: Number of virtual streams; must be divisible by ranks x workers. Default: see
            `default_streams`.
        workers: Worker processes per rank; 0 reads in the training process.
        threads: Threads per worker process; they pack sequences of different streams in parallel.
        packing_buffer: Documents that a packer chooses from.
        vision_loss: Also supervise vision tokens: whether a patch, a new row or the end of the image follows.
            The paper's loss is on text alone.
        allow_outside_paths: Whether rows may name images outside their source's folder, by absolute paths,
            `..`, links or URLs other than http(s).
        max_row_bytes: Size of a JSON line, or of a sample in a tar, above which it is skipped.
        max_shard_bytes: Size of a decompressed file or a parquet row group, which is read as a whole, above
            which the run stops.
        max_skipped: Fraction of unusable samples above which the run stops and lists them.
        seed: Seed of the order.
    """

    sources: list[SourceSettings] = Field(min_length=1)
    sequence_length: PositiveInt = 32768
    weight_by: WeightBy = "tokens"
    epochs: PositiveInt | None = None
    streams: PositiveInt | None = None
    workers: int = Field(0, ge=0)
    threads: PositiveInt = 1
    packing_buffer: PositiveInt = 128
    vision_loss: bool = False
    allow_outside_paths: bool = False
    max_row_bytes: PositiveInt = Limits.max_row_bytes
    max_shard_bytes: PositiveInt = Limits.max_shard_bytes
    max_skipped: float = Field(0.01, ge=0, le=1)
    seed: int = 0


def default_streams(global_batch: int = 1) -> int:
    """Return the smallest number from 64 that any number of ranks with 1, 2 or 4 workers divides.

    The ranks divide the global batch. At the end of the data, the last sequence of a stream is half full on
    average: that is two steps at most, or 32 sequences.
    """
    unit = 4 * global_batch
    return unit * math.ceil(64 / unit)


class Mixture(Settings):
    """Training data and the model that reads it; a recipe file can be read as a mixture, too.

    Attributes:
        root: Folder that relative paths refer to.
        model: Folder or hub ID of a SOLO model, or of a plain LLM (text only).
        data: Sources and packing.
    """

    # A recipe's other settings are ignored.
    model_config = ConfigDict(extra="ignore", frozen=True)

    root: str = "."
    model: str
    data: DataSettings

    def at(self, path: str) -> Path:
        """Resolve a path relative to the root."""
        return Path(self.root) / path

    def model_source(self) -> str | Path:
        """Return the model's folder under the root, else its hub ID; `STAGE/model` is always a folder."""
        folder = self.at(self.model)
        return folder if folder.exists() or folder.name == "model" else self.model

    def source_names(self) -> tuple[str, ...]:
        """Return the source paths as written in the file."""
        return tuple(source.path for source in self.data.sources)

    def source_labels(self) -> tuple[str, ...]:
        """Return the source paths as written in the file, with repeated ones numbered."""
        names = self.source_names()
        seen = [names[:place].count(name) for place, name in enumerate(names)]
        return tuple(f"{name} ({n + 1})" if n else name for name, n in zip(names, seen, strict=True))

    def source_paths(self) -> tuple[str, ...]:
        """Return the resolved source paths."""
        return tuple(map(self.source_path, self.source_names()))

    def source_path(self, path: str) -> str:
        """Resolve a source's path relative to the root; return URLs unchanged."""
        return path if "://" in path else str(self.at(path))

    @property
    def limits(self) -> Limits:
        """Limits for reading the files."""
        return Limits(self.data.allow_outside_paths, self.data.max_row_bytes, self.data.max_shard_bytes)

    def open_sources(self) -> list[Source]:
        """Open all sources.

        Raises:
            SoloError: A source is missing, unreadable or empty.
        """
        sources = [source.open(self.limits, self.source_path) for source in self.data.sources]
        for source in sources:
            if not len(source):
                raise SoloError(f"{source.name} has no rows")
        return sources


@dataclass(frozen=True)
class StreamFactory:
    """Factory of a mixture's virtual streams, picklable for worker processes."""

    sources: Sequence[Source]
    settings: DataSettings
    encoder: Encoder
    stream_type: type[VirtualStream] = VirtualStream

    def __call__(self, index: int) -> VirtualStream:
        settings = self.settings
        weights = [source.weight for source in settings.sources]
        return self.stream_type(
            index,
            settings.streams or default_streams(),
            [MixtureItem(*item) for item in zip(self.sources, weights, strict=True)],
            self.encoder.draft,
            settings.sequence_length,
            seed=settings.seed,
            epochs=settings.epochs,
            weight_by=settings.weight_by,
            buffer_size=settings.packing_buffer,
            max_skipped=settings.max_skipped,
        )


def make_loader(
    mixture: Mixture, processor: Any, sources: list[Source], rank: int = 0, ranks: int = 1
) -> PackedLoader:
    """Create the loader of one data-parallel rank.

    Args:
        mixture: Sources and packing.
        processor: Processor of the model, or tokenizer of a plain LLM.
        sources: Opened sources of the mixture.
        rank: Data-parallel rank.
        ranks: Number of data-parallel ranks.
    """
    encoder = Encoder(processor, mixture.data.vision_loss)
    return PackedLoader(
        StreamFactory([SharedShards(source) for source in sources], mixture.data, encoder),
        mixture.data.streams or default_streams(),
        mixture.data.sequence_length,
        encoder.padding_id,
        rank=rank,
        ranks=ranks,
        workers=mixture.data.workers,
        threads=mixture.data.threads,
        sources=sources,
        patch_dim=encoder.patch_dim,
    )
