"""Rows of benchmarks: from the hub, or from parquet, arrow, TSV or JSONL files in `DATA_ROOT/TASK`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePath
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from solo_vlm.evaluate.benchmarks.multiple_choice import SEEDBENCH_DIMENSIONS
from solo_vlm.evaluate.predictions import (
    Prediction,
    Row,
    check_unique,
    column_name,
    present,
    read_delimited,
    read_json_lines,
    without_images,
)
from solo_vlm.evaluate.scoring.options import (
    as_list,
    options_in_columns,
    reference_letter,
    with_option_texts,
)
from solo_vlm.evaluate.scoring.score import Benchmark
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image, read_data_url
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = ("parquet", "arrow", "tsv", "jsonl")  # the first that a folder has is read
_SPLITS = ("train", "validation", "val", "dev", "test", "testmini")
_CACHE_VERSION = 2  # increment when `_convert_files` yields different rows for the same file
_IMAGE_COLUMNS = ("image", "decoded_image")
_SEEDBENCH_OPTIONS = 4


def load_benchmark(benchmark: Benchmark, data_root: Path | None) -> Dataset:
    """Load a benchmark's split with the columns of the hub's dataset.

    Args:
        benchmark: Benchmark to load.
        data_root: Folder with one folder per task; None loads from the hub, through its cache.

    Raises:
        SoloError: The data is missing or unreadable; the message gives the download command.
    """
    from datasets import Dataset, load_dataset

    if data_root is None:
        try:
            return load_dataset(benchmark.hub_id, benchmark.hub_config, split=benchmark.split)
        except (OSError, ValueError) as error:
            raise SoloError(
                f"cannot load {benchmark.hub_id} from the hub ({error}). Without a network, run elsewhere: "
                f"{download_command(benchmark, Path('DATA_ROOT'))}, and pass --data-root"
            ) from error
    file_format, files = find_benchmark(benchmark, data_root)
    try:
        if file_format in ("parquet", "arrow"):
            data = load_dataset(file_format, data_files=[str(file) for file in files], split="train")
            columns = set(map(column_name, data.column_names))
            if {"a", "b"} <= columns and benchmark.name in _CONVERTERS:  # VLMEvalKit's columns
                kwargs = {"task": benchmark.name, "data": data, "version": _CACHE_VERSION}
                data = Dataset.from_generator(_convert_dataset, gen_kwargs=kwargs)
        else:
            # datasets caches rows by the arguments: size and time identify the content.
            stats = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
            kwargs = {"task": benchmark.name, "files": stats, "version": _CACHE_VERSION}
            data = Dataset.from_generator(_convert_files, gen_kwargs=kwargs)
    except Exception as error:  # datasets wraps failures in many kinds of exceptions
        raise SoloError(f"cannot read {files[0]}: {error.__cause__ or error}") from error
    return cast_images(data)


def find_benchmark(benchmark: Benchmark, data_root: Path) -> tuple[str, list[Path]]:
    """Return format and files of a benchmark's split below a data root, ignoring files of other splits.

    Raises:
        SoloError: There are none; the message gives the download command.
    """
    folder = data_root / benchmark.name
    for file_format in _FORMATS:
        found = sorted(folder.rglob(f"*.{file_format}"))
        files = [
            file for file in found if "/." not in f"/{file.relative_to(folder).as_posix()}"
        ]  # not hidden
        if chosen := _select_split(files, benchmark.split, benchmark.hub_config):
            return file_format, chosen
    table = ", or put VLMEvalKit's TSV there" if benchmark.name in _CONVERTERS else ""
    raise SoloError(
        f"{folder} has no data of {benchmark.title} ({', '.join(_FORMATS)}): "
        f"{download_command(benchmark, data_root)}{table}"
    )


def download_command(benchmark: Benchmark, data_root: Path) -> str:
    """Return the command that downloads a benchmark into a data root."""
    return (
        f"hf download {benchmark.hub_id} --repo-type dataset --include '{benchmark.hub_files}' "
        f"--local-dir {data_root / benchmark.name}"
    )


def files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split below a folder.

    Raises:
        SoloError: There are none.
    """
    if files := _select_split(sorted(folder.rglob("*.parquet")), split):
        return files
    raise SoloError(f"{folder} has no parquet files of the split {split}")


def _select_split(files: Sequence[Path], split: str, config: str | None = None) -> list[Path]:
    """Return the files named after the split, else those of no split; only of the configuration, if any."""
    candidates = [file for file in files if config in file.parts] or files
    splits = [file.stem.replace("_", "-").split("-")[0] for file in candidates]  # test-00000-of-00001: test
    named = [file for file, name in zip(candidates, splits, strict=True) if name == split]
    return named or [file for file, name in zip(candidates, splits, strict=True) if name not in _SPLITS]


def _convert_files(task: str, files: Sequence[tuple[str, int, int]], version: int) -> Iterator[Row]:
    for name, _, _ in files:
        path = Path(name)
        shared = _shared_images(path)
        for row in _raw_rows(path):
            plain = (
                {column_name(column): value for column, value in row.items()} if task in _CONVERTERS else row
            )
            if (reference := str(plain.get("image"))) in shared:
                plain["image"] = shared[reference]
            yield _convert(task, plain, path.parent)


def _convert_dataset(task: str, data: Dataset, version: int) -> Iterator[Row]:
    for row in EncodedRows(data):
        yield _convert(task, {column_name(column): value for column, value in row.items()}, Path())


def _convert(task: str, row: Row, folder: Path) -> Row:
    converted = hub_row(task, row)
    for column in _IMAGE_COLUMNS:
        if column in converted and not (column == "image" and "decoded_image" in converted):
            converted[column] = _encoded_image(converted[column], folder)
    return converted


def _raw_rows(path: Path) -> Iterator[Row]:
    return read_delimited(path, "\t") if path.suffix == ".tsv" else read_json_lines(path)


def _shared_images(path: Path) -> dict[str, str]:
    """Return images by index: VLMEvalKit replaces a repeated image by the index of the row that has it."""
    wanted = {str(row["image"]) for row in _raw_rows(path) if str(row.get("image")).isdigit()}
    if not wanted:
        return {}
    return {str(row["index"]): row["image"] for row in _raw_rows(path) if str(row["index"]) in wanted}


def _encoded_image(value: Any, folder: Path) -> Any:
    """Return an image, or each of a list, as `{"bytes", "path"}`, from base64, a data URL, or a path."""
    if isinstance(value, list):
        return [_encoded_image(part, folder) for part in value]
    if not isinstance(value, str) or not value:
        return value or None
    if len(value) < 1024 and (folder / value).is_file():
        return {"bytes": (folder / value).read_bytes(), "path": value}
    try:
        is_url = value[:5].lower() == "data:"
        data = read_data_url(value, "image") if is_url else base64.b64decode(value, validate=True)
        return {"bytes": data, "path": None}
    except (binascii.Error, ImageError) as error:
        raise SoloError(f"{value[:80]!r} is neither an image in base64 nor a file in {folder}") from error


def cast_images(data: Dataset) -> Dataset:
    """Mark columns of `{"bytes", "path"}` as images, as the hub's files do."""
    from datasets import Image as ImageFeature

    features = data.features.copy()
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, dict) and set(inner) == {"bytes", "path"}:
            features[name] = ImageFeature() if inner is feature else type(feature)(ImageFeature())
    return data if features == data.features else data.cast(features)


# ------------------------------------------------------------------------------------ rows of a score


class EncodedRows(Sequence[Row]):
    """Rows of a dataset with images as `{"bytes", "path"}`, neither copied nor decoded.

    Casting the dataset's features to `decode=False` would write all of it to disk again. Options are lists of
    texts (see `with_option_texts`): a prompt would show None as the text of an option.
    """

    def __init__(self, data: Dataset) -> None:
        self.features = data.features
        self._data = data.with_format("arrow")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: Any) -> Any:
        return with_option_texts(self._data[row].to_pylist()[0])

    def without_images(self) -> EncodedRows:
        """Return the same rows without image columns."""
        return EncodedRows(self._data.remove_columns(self.image_columns))

    @property
    def image_columns(self) -> list[str]:
        """Columns with an image or a list of images."""
        from datasets import Image as ImageFeature

        return [
            name
            for name, feature in self.features.items()
            if isinstance(getattr(feature, "feature", feature), ImageFeature)
        ]


@dataclass(frozen=True)
class Rows:
    """Rows of a benchmark that are part of its score.

    Attributes:
        encoded: Rows of the dataset.
        columns: The same rows without images, as predictions store them.
        ids: IDs of the rows: MathVista's own, else the 1-based position in the split.
        filtered: Number of rows of the split that are not part of the score.
    """

    encoded: EncodedRows
    columns: Sequence[Mapping[str, Any]]
    ids: Sequence[str]
    filtered: int

    @classmethod
    def of(cls, benchmark: Benchmark, data: Dataset) -> Rows:
        """Select the rows of a dataset that are part of a benchmark's score.

        Raises:
            SoloError: There are none, or a question occurs twice.
        """
        columns = list(_columns(data))
        check_unique(columns, benchmark.name)
        kept = [number for number, row in enumerate(columns) if benchmark.is_scored(row)]
        if not kept:
            raise SoloError(f"{benchmark.name}: none of its {len(columns)} rows is part of the score")
        return cls(
            EncodedRows(data.select(kept)),
            [columns[number] for number in kept],
            [str(columns[number].get("pid", number + 1)) for number in kept],
            len(columns) - len(kept),
        )

    @classmethod
    def all_of(cls, data: Dataset) -> Rows:
        """Return all rows of a dataset."""
        encoded = EncodedRows(data)
        return cls(encoded, list(_columns(data)), [str(number + 1) for number in range(len(data))], 0)

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, row: int) -> list[Image.Image]:
        """Decode the images of a row.

        Raises:
            ImageError: An image cannot be read.
        """
        values = (decoded(value) for value in self.encoded[row].values())
        lists = (value if isinstance(value, list) else [value] for value in values)
        return [image for images in lists for image in images if isinstance(image, Image.Image)]


def decoded(value: Any) -> Any:
    """Decode a cell with an image or a list of images; return any other cell unchanged.

    Raises:
        ImageError: An image cannot be read.
    """
    if isinstance(value, list):
        return [decoded(part) for part in value]
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        source = value["bytes"] if value["bytes"] is not None else value["path"]
        if source is None:
            raise ImageError("the row's image is empty")
        return load_image(source)
    return value


def _columns(data: Dataset) -> Iterator[Row]:
    """Yield the rows as predictions store them, without reading any image."""
    encoded = EncodedRows(data)
    filled = [_filled(data, name) for name in encoded.image_columns]
    has_image = {"images": np.any(filled, axis=0)} if filled else {}
    for number, row in enumerate(encoded.without_images()):
        yield without_images({**row, **{name: bool(there[number]) for name, there in has_image.items()}})


def _filled(data: Dataset, name: str) -> NDArray[np.bool_]:
    """Return a (rows,) mask of the rows with an image in this column."""
    column = data.data.column(name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(pc.list_value_length(column), 0).to_numpy() > 0
    return pc.is_valid(column).to_numpy()


# --------------------------------------------------------------------------------- VLMEvalKit's files


def hub_row(task: str, row: Mapping[str, Any]) -> Row:
    """Convert a row of VLMEvalKit's file (names normalized) to the hub's schema; keep others unchanged."""
    if task not in _CONVERTERS:
        return dict(row)
    rest = {name: value for name, value in row.items() if name not in set(ascii_lowercase)}
    return {**rest, **_CONVERTERS[task](row)}


def _mmstar(row: Mapping[str, Any]) -> Row:
    options = options_in_columns(row)
    if not options or "Options:" in row["question"]:
        return {}
    lettered = zip(ascii_uppercase, options, strict=False)
    text = ", ".join(f"{letter}: {option}" for letter, option in lettered)
    return {"question": f"{row['question']}\nOptions: {text}"}


def _mme(row: Mapping[str, Any]) -> Row:
    if "question_id" in row:
        return {}
    return {"question_id": f"{row['category']}/{PurePath(row['image_path']).name}"}


def _seedbench(row: Mapping[str, Any]) -> Row:
    if "choice_a" in row:
        return {}
    options = options_in_columns(row)
    if len(options) > _SEEDBENCH_OPTIONS:
        raise SoloError(
            f"row {_name(row)} has {len(options)} options; SEED-Bench has at most {_SEEDBENCH_OPTIONS}"
        )
    dimensions = {name: number for number, name in SEEDBENCH_DIMENSIONS.items()}
    dimension = dimensions.get(row["category"].lower())
    if dimension is None:
        raise SoloError(f"SEED-Bench has no dimension {row['category']}; it has {', '.join(dimensions)}")
    lettered = zip_longest(ascii_lowercase[:_SEEDBENCH_OPTIONS], options, fillvalue="")
    return {
        **{f"choice_{letter}": text for letter, text in lettered},
        "data_type": "image" if dimension <= 9 else "video",
        "question_type_id": dimension,
        "question_id": str(row["index"]),
        "image": [row["image"]],
    }


def _ai2d(row: Mapping[str, Any]) -> Row:
    options, index = _options_and_index(row)
    return {"options": options, "answer": str(index)}


def _scienceqa(row: Mapping[str, Any]) -> Row:
    options, index = _options_and_index(row)
    return {"choices": options, "answer": index, "hint": row.get("hint") or ""}


def _mathvista(row: Mapping[str, Any]) -> Row:
    if "metadata" in row:
        return {}
    precision, choices = row.get("precision"), row.get("choices")
    return {
        "pid": str(row.get("pid", row["index"])),
        "choices": as_list(choices) or None,
        "precision": float(precision) if present(precision) else None,
        "unit": row.get("unit") or None,
        "decoded_image": row["image"],
        "image": f"images/{row['index']}.jpg",
        "query": row.get("query") or row["question"],
        "metadata": {"task": row.get("task"), "skills": as_list(row.get("skills"))},
    }


def _options_and_index(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the options and the index of the correct one."""
    options = options_in_columns(row)
    if not options:
        raise SoloError(f"row {_name(row)} has no options; its columns are: {', '.join(row)}")
    letter = reference_letter(Prediction(_name(row), None, row), options, answers_are_indices=True)
    if letter is None:
        raise SoloError(
            f"row {_name(row)}: the answer {row.get('answer')!r} is none of its options {options}"
        )
    return options, ascii_uppercase.index(letter)


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("index", row.get("question", "?")))


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "mmstar": _mmstar,
    "mme": _mme,
    "seedbench": _seedbench,
    "ai2d": _ai2d,
    "ai2d_no_mask": _ai2d,
    "scienceqa": _scienceqa,
    "scienceqa_full": _scienceqa,
    "mathvista": _mathvista,
}
