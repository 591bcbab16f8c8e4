"""Predictions of a model and their files: a run's JSONL, tables of other tools, MME's text files."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, time
from pathlib import Path
from typing import Any, TypeGuard
from zipfile import BadZipFile

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file

Row = dict[str, Any]

ROW_VALUES = "lmms_eval"
"""Column of predictions with lmms-eval's metrics of the row, for its own tasks."""

_IMAGE_COLUMNS = ("image", "images", "decoded_image")
_ID_COLUMNS = ("pid", "index", "id")
_RESPONSE_COLUMNS = ("response", "prediction", "extraction")
_ERRORS = (AttributeError, BadZipFile, KeyError, OSError, RecursionError, TypeError, ValueError, csv.Error)


@dataclass(frozen=True)
class Prediction:
    """Response of a model to one row of a benchmark.

    Attributes:
        id: ID of the row, unique within the task; runs are compared by it.
        response: Generated text; None if the row failed, which counts as wrong and as a bad row.
        row: Columns of the benchmark in lower case, without images (see `without_images`).
    """

    id: str
    response: str | None
    row: Mapping[str, Any]

    def column(self, *names: str) -> Any:
        """Return the value of the first of these columns that the row has.

        Raises:
            SoloError: The row has none of them.
        """
        for name in names:
            if name in self.row:
                return self.row[name]
        raise SoloError(
            f"row {self.id} has no column {' or '.join(names)}; its columns are: {', '.join(self.row)}"
        )


def present(value: Any) -> TypeGuard[Any]:
    """Return whether a cell of a table has a value: not None, NaN or blank text."""
    return value is not None and value == value and (not isinstance(value, str) or value.strip() != "")


def column_name(name: str) -> str:
    """Return a column's name in lower case with underscores."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def without_images(row: Mapping[str, Any]) -> Row:
    """Return the row with normalized column names, and `has_image` in place of its images.

    A path or a name in the image column is kept as `image`: MME and MathVista name their images.

    Raises:
        SoloError: Two columns have the same normalized name and different values.
    """
    kept: Row = {}
    has_image = None
    for name, value in row.items():
        plain = column_name(name)
        if plain not in _IMAGE_COLUMNS:
            if plain in kept and kept[plain] != value:
                raise SoloError(f"two columns are called {plain}: rename one")
            kept[plain] = value
            continue
        has_image = bool(has_image or _holds_image(value))
        if isinstance(value, str) and len(value) < 256:  # longer: an image in base64
            kept[plain] = value
    return kept if has_image is None else {**kept, "has_image": has_image}


def _holds_image(value: Any) -> bool:
    if isinstance(value, Mapping):  # bytes or a path, as datasets stores images
        return any(map(present, value.values()))
    return present(value) and bool(value)


def check_unique(rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Check that no two rows of a split and a category have the same `pid`, `index` or `id`.

    Raises:
        SoloError: Two rows, which have normalized column names, have the same ID.
    """
    seen: dict[tuple[str, str, str], int] = {}
    for number, row in enumerate(rows, start=1):
        for column in _ID_COLUMNS:
            if not present(row.get(column)):
                continue
            name = str(row[column]).strip().removesuffix(".0")
            part = f"{row.get('split')}, {row.get('category')}"  # POPE counts within each
            first = seen.setdefault((column, name, part), number)
            if first != number:
                same = f"rows {first} and {number} have the same {column}, {name}"
                raise SoloError(f"{where}: {same}: keep one row per question")


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write the predictions file of a run; it appears when complete."""
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
        # Data of any task may have dates.
        lines.writelines(
            json.dumps(asdict(each), ensure_ascii=False, default=str) + "\n" for each in predictions
        )


def read_predictions(path: Path) -> list[Prediction]:
    """Read the predictions file of a run.

    Raises:
        SoloError: The file cannot be read, or a line is not a prediction.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = list(file)  # splitlines would also split at characters that JSON does not escape
    except (OSError, UnicodeDecodeError) as error:
        raise SoloError(f"cannot read predictions {path}: {error}") from error
    predictions = []
    for number, line in enumerate(lines, start=1):
        try:
            predictions.append(_prediction(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise SoloError(
                f"{path}, line {number} is not a prediction (id, response, row): {error}"
            ) from error
    return predictions


def _prediction(id: Any, response: Any, row: Any) -> Prediction:
    if not isinstance(row, Mapping):
        raise TypeError("row is not an object")
    if not (response is None or isinstance(response, str)):
        raise TypeError("response is not a text")
    return Prediction(str(id), response, row)


def load_predictions(path: Path) -> list[Prediction]:
    """Load predictions from the file of a run, or from any file that `read_table` reads.

    The response is the column `response`, else `prediction`, else (MathVista) `extraction`.

    Raises:
        SoloError: The file cannot be read, has none of these columns, or has a question twice.
    """
    rows = read_table(path)
    if set(rows[0]) == {"id", "response", "row"}:
        return read_predictions(path)
    columns = dict.fromkeys(name for row in rows for name in row)
    if not set(_RESPONSE_COLUMNS) & set(columns):
        raise SoloError(f"{path} has no column prediction or response; its columns are: {', '.join(columns)}")
    check_unique(rows, str(path))
    return [
        Prediction(
            id=str(row["pid"] if present(row.get("pid")) else number),
            response=_response(row),
            row={name: value for name, value in row.items() if name not in ("response", "prediction")},
        )
        for number, row in enumerate(rows, start=1)
    ]


def _response(row: Row) -> str | None:
    """Return the first non-empty response; an empty cell of a table is an empty response."""
    cells = [row[column] for column in _RESPONSE_COLUMNS if row.get(column) is not None]
    texts = [str(cell) for cell in cells if cell == cell]
    return next((text for text in texts if text), texts[0] if texts else None)


def read_table(path: Path) -> list[Row]:
    """Read the non-empty rows of a JSONL, JSON, CSV, TSV or XLSX file, or of MME's text files.

    JSON is a list of rows, or an object of rows by `pid` as MathVista writes it. A folder, or a .txt file,
    holds MME's lines of image, question, answer and response. Images are dropped, see `without_images`.

    Raises:
        SoloError: The file is missing, of an unknown type, unreadable or empty, or two columns share a name.
    """
    if not path.exists():
        raise SoloError(f"{path} does not exist")
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".jsonl": read_json_lines,
        ".json": _read_json,
        ".csv": lambda file: read_delimited(file, ","),
        ".tsv": lambda file: read_delimited(file, "\t"),
        ".xlsx": _read_xlsx,
        ".txt": _read_mme_text,
    }
    reader = _read_mme_text if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise SoloError(
            f"{path}: predictions are read from {', '.join(readers)} or a folder of MME's .txt files"
        )
    try:
        rows = [without_images(row) for row in reader(path)]
    except _ERRORS as error:
        raise SoloError(f"cannot read {path}: {error}") from error
    if not rows:
        raise SoloError(f"{path} has no rows")
    return rows


def read_delimited(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file, every cell as text."""
    csv.field_size_limit(sys.maxsize)  # VLMEvalKit stores images in cells
    with path.open(newline="", encoding="utf-8-sig") as lines:
        # Strict: an unclosed quotation mark would swallow the following rows.
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        _check_columns(reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            if any(map(present, row.values())):
                yield row


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line."""
    with path.open(encoding="utf-8-sig") as lines:
        yield from (_parse_json(line) for line in lines if line.strip())


def _read_json(path: Path) -> list[Row]:
    rows = _parse_json(path.read_text(encoding="utf-8-sig"))
    return [{"pid": pid, **row} for pid, row in rows.items()] if isinstance(rows, dict) else rows


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_entries)


def _unique_entries(pairs: list[tuple[str, Any]]) -> Row:
    """Reject duplicate keys of an object; json would keep the last."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"two entries of an object are called {twice!r}")
    return entries


def _read_xlsx(path: Path) -> Iterator[Row]:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise SoloError("XLSX files need openpyxl: pip install 'solo-vlm[eval]', or save as CSV") from error
    sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    cells = sheet.iter_rows(values_only=True)
    names = next(cells, ())
    _check_columns([str(name) for name in names if present(name)])
    for number, row in enumerate(cells, start=2):
        if any(isinstance(cell, date | time) for cell in row):
            raise ValueError(
                f"row {number} has a date, to which Excel converts text like 3/5: format its cells as text"
            )
        if any(map(present, row)):
            yield {
                str(name): cell
                for name, cell in zip(names, row, strict=False)
                if present(name) or present(cell)
            }


def _check_columns(names: Sequence[str]) -> None:
    for name, count in Counter(map(column_name, names)).items():
        if name and count > 1:
            raise ValueError(f"{count} columns are called {name}")


def _read_mme_text(path: Path) -> Iterator[Row]:
    """Yield the rows of one subtask of MME, named by the file, or of a folder of such files."""
    columns = ("question_id", "question", "answer", "response")
    for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            fields = line.split("\t", 3)
            if line.strip() and len(fields) < 4:
                raise ValueError(
                    f"line {number} of {file.name} is not image, question, answer, response with tabs"
                )
            if line.strip():
                yield {"category": file.stem, **dict(zip(columns, fields, strict=True))}
