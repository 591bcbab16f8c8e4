"""A mixture: sources with their shares, how they are packed, and the model that shall read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from solo_vlm.data.encode import Encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sources import Source, open_source
from solo_vlm.data.sources.units import SharedUnits
from solo_vlm.data.streams import MixtureItem, VirtualStream, Weigh
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import Settings

LOADER_SETTINGS = frozenset({"workers", "threads"})  # of `DataSettings`: who reads, not what is read


class SourceSettings(Settings):
    """One source of a mixture: where it is, and its share."""

    path: str
    weight: PositiveFloat = 1.0


class DataSettings(Settings):
    """What the model reads. Defaults: the paper's packing (sequences of 32,768 tokens).

    Attributes:
        sources: files, folders, glob patterns or URLs of .parquet, .jsonl, .tar or -text.idx files, with
            their weights.
        sequence_length: tokens in a packed sequence.
        weigh: whether weights are shares of "tokens", of "samples", or of packed "sequences", each of which
            then holds documents of one source alone.
        epochs: passes over each source; none: without end.
        streams: virtual streams; ranks and workers must divide them.
        workers: processes a rank that read ahead; 0 reads in the training process.
        threads: in each of those processes, that fill the sequences of different streams side by side.
        packing_buffer: documents that a packer chooses from.
        vision_loss: supervise the tokens that images are made of, too: whether another patch, a new row or
            the end of an image comes next. The paper's loss is on text alone.
        max_skipped: fraction of samples that may be unusable before the run stops and lists them.
        seed: of the order.
    """

    sources: list[SourceSettings] = Field(min_length=1)
    sequence_length: PositiveInt = 32768
    weigh: Weigh = "tokens"
    epochs: PositiveInt | None = None
    streams: PositiveInt = 64
    workers: int = Field(0, ge=0)
    threads: PositiveInt = 1
    packing_buffer: PositiveInt = 128
    vision_loss: bool = False
    max_skipped: float = Field(0.01, ge=0, le=1)
    seed: int = 0


class Mixture(Settings):
    """Data, and the model that they are for. A recipe is a mixture with a training run around it.

    Attributes:
        root: folder that relative paths count from.
        model: folder of the model: a SOLO model, or a plain LLM (which reads text alone).
        data: sources and packing.
    """

    # Whatever else a recipe says is for its run.
    model_config = ConfigDict(extra="ignore", frozen=True)

    root: str = "."
    model: str
    data: DataSettings

    def at(self, path: str) -> Path:
        """A path of the mixture, counted from its root; an absolute one stays."""
        return Path(self.root) / path

    def model_source(self) -> str | Path:
        """A folder under the root, or else a hub id, which the `STAGE/model` of a stage to come is not."""
        folder = self.at(self.model)
        return folder if folder.exists() or folder.name == "model" else self.model

    def source_names(self) -> tuple[str, ...]:
        """Sources as the file names them."""
        return tuple(source.path for source in self.data.sources)

    def source_labels(self) -> tuple[str, ...]:
        """Sources as the file names them, numbered where one is named again."""
        names = self.source_names()
        seen = [names[:place].count(name) for place, name in enumerate(names)]
        return tuple(f"{name} ({n + 1})" if n else name for name, n in zip(names, seen, strict=True))

    def source_paths(self) -> tuple[str, ...]:
        """Where the sources are; URLs stay as they are."""
        return tuple(map(self.source_path, self.source_names()))

    def source_path(self, path: str) -> str:
        """Where a source of that name is."""
        return path if "://" in path else str(self.at(path))

    def open_sources(self) -> list[Source]:
        """The sources, opened; a first look at whether they are there.

        Raises:
            SoloError: one is missing, not readable or empty.
        """
        sources = [open_source(path) for path in self.source_paths()]
        for source in sources:
            if not len(source):
                raise SoloError(f"{source.name} has no rows")
        return sources


@dataclass(frozen=True)
class StreamFactory:
    """Creates the virtual streams of a mixture; picklable for worker processes."""

    sources: Sequence[Source]
    settings: DataSettings
    encoder: Encoder

    def __call__(self, index: int) -> VirtualStream:
        settings = self.settings
        weights = [source.weight for source in settings.sources]
        return VirtualStream(
            index,
            settings.streams,
            [MixtureItem(*item) for item in zip(self.sources, weights, strict=True)],
            self.encoder,
            settings.sequence_length,
            seed=settings.seed,
            epochs=settings.epochs,
            weigh=settings.weigh,
            buffer_size=settings.packing_buffer,
            max_skipped=settings.max_skipped,
        )


def make_loader(
    mixture: Mixture, processor: Any, sources: list[Source], rank: int = 0, ranks: int = 1
) -> PackedLoader:
    """Create the loader of one data-parallel rank.

    Args:
        mixture: sources and packing.
        processor: processor of the model, or tokenizer of a plain LLM.
        sources: opened sources of the mixture.
        rank: data-parallel rank.
        ranks: number of data-parallel ranks.
    """
    encoder = Encoder(processor, mixture.data.vision_loss)
    tokenizer = encoder.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PackedLoader(
        StreamFactory([SharedUnits(source) for source in sources], mixture.data, encoder),
        mixture.data.streams,
        mixture.data.sequence_length,
        padding,
        rank=rank,
        ranks=ranks,
        workers=mixture.data.workers,
        threads=mixture.data.threads,
        sources=sources,
        patch_dim=encoder.patch_dim,
    )
