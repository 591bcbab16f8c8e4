"""Rows of saved predictions, out of the kinds of files in which people save them."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from solo_vlm.evaluate.predictions import column_name, present, without_images
from solo_vlm.utils.errors import SoloError

Row = dict[str, Any]


def read_table(path: Path) -> list[Row]:
    """Rows of a JSONL, JSON, CSV, TSV or XLSX file, or of MME's text files; see `without_images`.

    Rows of a table in which every cell is empty are no rows.

    JSON is a list of rows, or an object of rows by `pid` as MathVista writes it. A folder, or a file that
    ends in .txt, holds MME's lines of image, question, answer and response.

    Raises:
        SoloError: there is no such file, its kind is unknown, it cannot be read, or two of its columns have
            one name.
    """
    if not path.exists():
        raise SoloError(f"{path} does not exist")
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".jsonl": read_json_lines,
        ".json": _json,
        ".csv": lambda file: read_delimited(file, ","),
        ".tsv": lambda file: read_delimited(file, "\t"),
        ".xlsx": _xlsx,
        ".txt": _mme_text,
    }
    reader = _mme_folder if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise SoloError(
            f"{path}: predictions are read from {', '.join(readers)} or a folder of MME's .txt files"
        )
    try:
        rows = [without_images(row) for row in reader(path)]
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        csv.Error,
        BadZipFile,
    ) as error:
        raise SoloError(f"cannot read {path}: {error}") from error
    if not rows:
        raise SoloError(f"{path} has no rows")
    return rows


def read_delimited(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a CSV or TSV file, every cell as text."""
    csv.field_size_limit(sys.maxsize)  # VLMEvalKit keeps images in cells
    with path.open(newline="", encoding="utf-8-sig") as lines:
        # Strict: a quotation mark that nothing closes would swallow the rows behind it.
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        _check_names(reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the first line has names")
            if any(map(present, row.values())):
                yield row


def read_json_lines(path: Path) -> Iterator[Row]:
    """Rows of a file of JSON objects, one a line."""
    with path.open(encoding="utf-8-sig") as lines:
        yield from (_from_json(line) for line in lines if line.strip())


def _json(path: Path) -> list[Row]:
    rows = _from_json(path.read_text(encoding="utf-8-sig"))
    return [{"pid": pid, **row} for pid, row in rows.items()] if isinstance(rows, dict) else rows


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json would keep the last of two entries with one name."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"two entries of an object are called {twice!r}")
    return entries


def _xlsx(path: Path) -> Iterator[Row]:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise SoloError("XLSX files need openpyxl: pip install 'solo-vlm[eval]', or save as CSV") from error
    sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    cells = sheet.iter_rows(values_only=True)
    names = next(cells, ())
    _check_names([str(name) for name in names if present(name)])
    for number, row in enumerate(cells, start=2):
        if any(isinstance(cell, date | time) for cell in row):
            raise ValueError(f"row {number} has a date, as Excel makes of 3/5: format its cells as text")
        if any(map(present, row)):
            yield {
                str(name): cell
                for name, cell in zip(names, row, strict=False)
                if present(name) or present(cell)
            }


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(map(column_name, names)).items():
        if name and count > 1:
            raise ValueError(f"{count} columns are called {name}")


def _mme_folder(path: Path) -> list[Row]:
    return [row for file in sorted(path.glob("*.txt")) for row in _mme_text(file)]


def _mme_text(path: Path) -> Iterator[Row]:
    """One subtask of MME: the file's name is the subtask's."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 4:
            raise ValueError(
                f"line {number} of {path.name} is not image, question, answer, response with tabs"
            )
        image, question, answer = fields[:3]
        response = "\t".join(fields[3:])
        yield {
            "category": path.stem,
            "question_id": image,
            "question": question,
            "answer": answer,
            "response": response,
        }
