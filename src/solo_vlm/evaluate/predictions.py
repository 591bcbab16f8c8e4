"""What a model answered to the rows of a benchmark, and the file that holds it: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file

_IMAGE_COLUMNS = ("image", "images", "decoded_image")
_NAMES_OF_ROWS = ("pid", "index", "id")


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one row of a benchmark.

    Attributes:
        id: the row's name, unique within the task; two runs are compared by it.
        response: the model's text; None where the row failed, which counts as wrong and as a bad row.
        row: the benchmark's own columns in lower case, without images (see `without_images`).
    """

    id: str
    response: str | None
    row: Mapping[str, Any]

    def as_json(self) -> str:
        """The prediction as one line of a predictions file, without the line's end."""
        return json.dumps({"id": self.id, "response": self.response, "row": self.row}, ensure_ascii=False)

    def column(self, *names: str) -> Any:
        """The value of the first of these columns that the row has.

        Raises:
            SoloError: it has none of them; the message names the columns that there are.
        """
        for name in names:
            if name in self.row:
                return self.row[name]
        raise SoloError(
            f"row {self.id} has no column {' or '.join(names)}; its columns are: {', '.join(self.row)}"
        )


def present(value: Any) -> TypeGuard[Any]:
    """Whether a cell of a table holds something: neither nothing, nor NaN, nor blank text."""
    return value is not None and value == value and (not isinstance(value, str) or value.strip() != "")


def without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with names in lower case, its images replaced by `has_image`: whether there was one.

    A path or a name in place of an image stays, as `image`: MME and MathVista name their images.

    Raises:
        SoloError: two columns have one name but for case, and do not hold the same.
    """
    kept: dict[str, Any] = {}
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
    if isinstance(value, Mapping):  # as data sets store it: bytes, or a path
        return any(map(present, value.values()))
    return present(value) and bool(value)


def check_unique(rows: Iterable[Mapping[str, Any]], what: str) -> None:
    """Refuse rows of one question, by their `pid`, `index` or `id`; within a split, where they name one.

    Args:
        rows: with names in lower case, counted from 1 in the message.
        what: where the rows are from.

    Raises:
        SoloError: two rows have the same; the message names them.
    """
    seen: dict[tuple[str, str, str], int] = {}
    for number, row in enumerate(rows, start=1):
        for column in _NAMES_OF_ROWS:
            if not present(row.get(column)):
                continue
            name = str(row[column]).strip().removesuffix(".0")
            first = seen.setdefault((column, name, str(row.get("split"))), number)
            if first != number:
                same = f"rows {first} and {number} have the same {column}, {name}"
                raise SoloError(f"{what}: {same}: keep one row per question")


def column_name(name: str) -> str:
    """How a column is called here: in lower case, with underscores."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write a predictions file; it appears when it is complete."""
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(prediction.as_json() + "\n" for prediction in predictions)


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file.

    Raises:
        SoloError: it cannot be read, or a line is not a prediction.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = list(file)  # not splitlines: it also splits at characters that JSON leaves as they are
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
        raise TypeError("row is no object")
    if not (response is None or isinstance(response, str)):
        raise TypeError("response is no text")
    return Prediction(str(id), response, row)
