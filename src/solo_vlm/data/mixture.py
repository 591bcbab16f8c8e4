"""A mixture: sources with their shares, how they are packed, and the model that shall read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from solo_vlm.data.sources import Source, open_source
from solo_vlm.data.streams import Weigh
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import Settings, find_settings, override, read_settings

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

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file. `base: other.yaml` inherits from a file beside it; overrides are `a.b=value`.

        A recipe of the package can be named without its folder, as in `quickstart/stage1`.

        Raises:
            SoloError: no such file, or a key or value that does not belong there.
        """
        kind = cls.__name__.lower()
        settings = read_settings(find_settings(path, kind), kind)
        return cls.parse(override(settings, overrides), origin=str(path))
