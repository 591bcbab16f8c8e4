"""Score saved predictions without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from solo_vlm.evaluate.benchmarks import Benchmark
from solo_vlm.evaluate.predictions import Prediction, check_unique, present, read_predictions
from solo_vlm.evaluate.score import Score
from solo_vlm.evaluate.tables import Row, read_table
from solo_vlm.utils.errors import SoloError

_RESPONSES = ("response", "prediction", "extraction")


def rescore(benchmark: Benchmark, path: Path) -> Score:
    """The score of predictions in a file, or in a folder of MME's text files.

    Raises:
        SoloError: the file cannot be read, or has no column that is needed.
    """
    return benchmark.score(load_predictions(path))


def load_predictions(path: Path) -> list[Prediction]:
    """Predictions of any file that `read_table` reads, or of the predictions file of a run.

    The response stands in `response`, else `prediction`, else (MathVista) `extraction`.

    Raises:
        SoloError: the file cannot be read, has none of these columns, or a question twice.
    """
    rows = read_table(path)
    if set(rows[0]) == {"id", "response", "row"}:
        return read_predictions(path)
    _check_columns(rows, path)
    check_unique(rows, str(path))
    return [
        Prediction(
            id=str(row["pid"] if present(row.get("pid")) else number),
            response=_response(row),
            row={name: value for name, value in row.items() if name not in ("response", "prediction")},
        )
        for number, row in enumerate(rows, start=1)
    ]


def _check_columns(rows: Sequence[Row], path: Path) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not set(_RESPONSES) & set(columns):
        raise SoloError(f"{path} has no column prediction or response; its columns are: {', '.join(columns)}")


def _response(row: Row) -> str | None:
    """The first that holds anything; an empty cell of a table is an empty answer."""
    cells = [row[column] for column in _RESPONSES if row.get(column) is not None]
    texts = [str(cell) for cell in cells if cell == cell]
    return next((text for text in texts if text), texts[0] if texts else None)
