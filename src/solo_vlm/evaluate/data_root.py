"""The data of benchmarks: from the hub, or from parquet, arrow, TSV or JSONL files in `DATA_ROOT/TASK`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solo_vlm.evaluate.benchmarks import Benchmark
from solo_vlm.evaluate.predictions import column_name
from solo_vlm.evaluate.rows import EncodedRows
from solo_vlm.evaluate.tables import read_delimited, read_json_lines
from solo_vlm.evaluate.vlmevalkit import hub_row
from solo_vlm.models.solo.image_loading_solo import ImageError, read_data_url
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = ("parquet", "arrow", "tsv", "jsonl")  # where a folder has several, the first of these counts
_SPLITS = ("train", "validation", "val", "dev", "test", "testmini")
_CONVERSION = 2  # raise it when `_rows` gives other rows for the same file: they are cached
_IMAGE_COLUMNS = ("image", "decoded_image")


def load_benchmark(benchmark: Benchmark, data_root: Path | None) -> Dataset:
    """The rows of a benchmark's split, with the columns of the hub's data set.

    Args:
        benchmark: whose data.
        data_root: folder with one folder for each task; None: the hub, through its cache.

    Raises:
        SoloError: the data are not there; the message says what to download and where to put it.
    """
    from datasets import Dataset, load_dataset

    if data_root is None:
        try:
            return load_dataset(benchmark.hub_id, benchmark.hub_config, split=benchmark.split)
        except (OSError, ValueError) as error:
            raise SoloError(
                f"cannot load {benchmark.hub_id} from the hub ({error}). Without a network: "
                f"{download_hint(benchmark, Path('DATA_ROOT'))}, elsewhere, and give --data-root"
            ) from error
    kind, files = find_benchmark(benchmark, data_root)
    try:
        if kind in ("parquet", "arrow"):
            data = load_dataset(kind, data_files=[str(file) for file in files], split="train")
            if {"a", "b"} <= set(map(column_name, data.column_names)):  # VLMEvalKit's columns
                kwargs = {"task": benchmark.name, "data": data, "conversion": _CONVERSION}
                data = Dataset.from_generator(_converted, gen_kwargs=kwargs)
        else:
            # Size and time stand for the content: datasets takes rows it has seen before from its cache.
            seen = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
            kwargs = {"task": benchmark.name, "files": seen, "conversion": _CONVERSION}
            data = Dataset.from_generator(_rows, gen_kwargs=kwargs)
    except Exception as error:  # datasets wraps what goes wrong in exceptions of many kinds
        raise SoloError(f"cannot read {files[0]}: {error.__cause__ or error}") from error
    return _with_images(data)


def find_benchmark(benchmark: Benchmark, data_root: Path) -> tuple[str, list[Path]]:
    """Kind ("parquet", "arrow", "tsv", "jsonl") and files of a benchmark's split below a data root.

    Files of other splits, by name, are left alone; of several kinds the first in this order counts.

    Raises:
        SoloError: there are none; the message says what to download and where to put it.
    """
    folder = data_root / benchmark.name
    for kind in _KINDS:
        files = sorted(file for file in folder.rglob(f"*.{kind}") if not _is_hidden(file, folder))
        if chosen := _of_split(benchmark, files):
            return kind, chosen
    raise SoloError(
        f"{folder} has no data of {benchmark.title} ({', '.join(_KINDS)}): "
        f"{download_hint(benchmark, data_root)}, or put VLMEvalKit's TSV there"
    )


def download_hint(benchmark: Benchmark, data_root: Path) -> str:
    """The command that downloads a benchmark to where it is looked for."""
    return (
        f"hf download {benchmark.hub_id} --repo-type dataset --include '{benchmark.hub_files}' "
        f"--local-dir {data_root / benchmark.name}"
    )


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _of_split(benchmark: Benchmark, files: Sequence[Path]) -> list[Path]:
    """Files named after the split, in its configuration's folder if there is one; else those of no split."""
    of_config = [file for file in files if benchmark.hub_config in file.parts] or files
    named = [file for file in of_config if _names(file) == benchmark.split]
    return named or [file for file in of_config if _names(file) not in _SPLITS]


def _names(file: Path) -> str:
    """What a file's name begins with: "test" of test-00000-of-00001.parquet."""
    return file.stem.replace("_", "-").split("-")[0]


def _rows(task: str, files: Sequence[tuple[str, int, int]], conversion: int) -> Iterator[dict[str, Any]]:
    for name, _, _ in files:
        path = Path(name)
        shared = _shared_images(path)
        for row in _raw_rows(path):
            plain = {column_name(column): value for column, value in row.items()}
            if (reference := str(plain.get("image"))) in shared:
                plain["image"] = shared[reference]
            yield _hub_row(task, plain, path.parent)


def _converted(task: str, data: Dataset, conversion: int) -> Iterator[dict[str, Any]]:
    for row in EncodedRows(data):
        yield _hub_row(task, {column_name(column): value for column, value in row.items()}, Path())


def _hub_row(task: str, row: dict[str, Any], folder: Path) -> dict[str, Any]:
    converted = hub_row(task, row)
    for column in _IMAGE_COLUMNS:
        if column in converted and not (column == "image" and "decoded_image" in converted):
            converted[column] = _image(converted[column], folder)
    return converted


def _raw_rows(path: Path) -> Iterator[dict[str, Any]]:
    return read_delimited(path, "\t") if path.suffix == ".tsv" else read_json_lines(path)


def _shared_images(path: Path) -> dict[str, str]:
    """Images by index, of rows to which others refer: VLMEvalKit puts that index in place of an image."""
    wanted = {str(row["image"]) for row in _raw_rows(path) if str(row.get("image")).isdigit()}
    if not wanted:
        return {}
    return {str(row["index"]): row["image"] for row in _raw_rows(path) if str(row["index"]) in wanted}


def _image(value: Any, folder: Path) -> Any:
    """An image, or each of a list, as `{"bytes", "path"}`: of base64, a data URL, or a path in a folder."""
    if isinstance(value, list):
        return [_image(part, folder) for part in value]
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


def _with_images(data: Dataset) -> Dataset:
    """Mark columns of `{"bytes", "path"}` as images, as the hub's files do."""
    from datasets import Image

    features = data.features.copy()
    for name in _IMAGE_COLUMNS:
        feature = features.get(name)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, dict) and set(inner) == {"bytes", "path"}:
            features[name] = Image() if inner is feature else type(feature)(Image())
    return data if features == data.features else data.cast(features)
