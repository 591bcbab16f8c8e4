"""The rows of a benchmark; their images stay encoded until somebody looks at one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from solo_vlm.evaluate.benchmarks import Benchmark
from solo_vlm.evaluate.options import with_option_texts
from solo_vlm.evaluate.predictions import check_unique, without_images
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from datasets import Dataset


class EncodedRows(Sequence[dict[str, Any]]):
    """Rows of a data set with images as `{"bytes", "path"}`; nothing is copied and nothing decoded.

    Options are lists of texts, see `with_option_texts`: a prompt would show None as an option's text.
    (Casting a data set's features to `decode=False` would write all of it to the disk once more.)
    """

    def __init__(self, data: Dataset) -> None:
        self.features = data.features
        self._data = data.with_format("arrow")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: Any) -> Any:
        return with_option_texts(self._data[row].to_pylist()[0])

    def without_images(self) -> EncodedRows:
        """The same rows without columns of images."""
        return EncodedRows(self._data.remove_columns(self.image_columns))

    @property
    def image_columns(self) -> list[str]:
        """Columns that hold an image, or a list of them."""
        from datasets import Image as ImageFeature

        return [
            name
            for name, feature in self.features.items()
            if isinstance(getattr(feature, "feature", feature), ImageFeature)
        ]


@dataclass(frozen=True)
class Rows:
    """Rows of a benchmark that belong to its score.

    Attributes:
        encoded: the rows as they are in the data set.
        columns: the same rows as predictions have them, without images.
        ids: names of the rows: MathVista's own, else the place in the split, counted from 1.
        filtered: rows of the split that are not here, because they do not belong to the score.
    """

    encoded: EncodedRows
    columns: Sequence[Mapping[str, Any]]
    ids: Sequence[str]
    filtered: int

    @classmethod
    def of(cls, benchmark: Benchmark, data: Dataset) -> Rows:
        """The rows of a data set that belong to a benchmark's score.

        Raises:
            SoloError: none does, or one question is there twice.
        """
        columns = list(_columns(data))
        check_unique(columns, benchmark.name)
        kept = [number for number, row in enumerate(columns) if benchmark.belongs(row)]
        if not kept:
            raise SoloError(f"{benchmark.name}: none of its {len(columns)} rows belongs to the score")
        return cls(
            EncodedRows(data.select(kept)),
            [columns[number] for number in kept],
            [str(columns[number].get("pid", number + 1)) for number in kept],
            len(columns) - len(kept),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, row: int) -> list[Image.Image]:
        """The images of a row.

        Raises:
            ImageError: one cannot be read.
        """
        values = (decoded(value) for value in self.encoded[row].values())
        lists = (value if isinstance(value, list) else [value] for value in values)
        return [image for images in lists for image in images if isinstance(image, Image.Image)]


def decoded(value: Any) -> Any:
    """A cell of a row: an image or a list of images decoded, anything else as it is.

    Raises:
        ImageError: an image cannot be read.
    """
    if isinstance(value, list):
        return [decoded(part) for part in value]
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        source = value["bytes"] if value["bytes"] is not None else value["path"]
        if source is None:
            raise ImageError("the row's image is empty")
        return load_image(source)
    return value


def _columns(data: Dataset) -> Iterator[dict[str, Any]]:
    """The rows as predictions have them; no image is read for it."""
    encoded = EncodedRows(data)
    filled = {name: _filled(data, name) for name in encoded.image_columns}
    for number, row in enumerate(encoded.without_images()):
        yield without_images({**row, **{name: there[number] or None for name, there in filled.items()}})


def _filled(data: Dataset, name: str) -> NDArray[np.bool_]:
    """(rows,) whether each has an image in this column."""
    column = data.data.column(name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(pc.list_value_length(column), 0).to_numpy() > 0
    return pc.is_valid(column).to_numpy()
