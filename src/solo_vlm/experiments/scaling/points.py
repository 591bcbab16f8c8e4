"""Points that laws are fitted to: read from CSV, or from the table of a sweep."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.experiments.scaling.huber import Array
from solo_vlm.experiments.scaling.laws import FLOPS_PER_PARAMETER_AND_TOKEN
from solo_vlm.utils.errors import SoloError

_APART = {"d_text", "d_vision"}
_TRUE = ("true", "1", "yes")


@dataclass(frozen=True)
class Points:
    """Runs of different sizes and lengths.

    Attributes:
        n: (points,) parameters.
        d: (points,) tokens.
        loss: (points,) nats a token.
        d_text: (points,) text tokens, where the file tells them apart.
        d_vision: (points,) vision tokens, likewise.
        d_from_flops: whether d = flops / (6 n), for want of tokens in the file.
        names: of the runs.
    """

    n: Array
    d: Array
    loss: Array
    d_text: Array | None
    d_vision: Array | None
    d_from_flops: bool
    names: Sequence[str]

    @property
    def flops(self) -> Array:
        """(points,) C = 6 N D."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.n * self.d


@dataclass(frozen=True)
class Table:
    """The points of a file.

    Attributes:
        fitted: that laws are fitted to.
        holdout: that they have to predict (column `holdout`); none, if there are no such rows.
    """

    fitted: Points
    holdout: Points | None


def read_points(path: Path) -> Table:
    """Read `n`, `d` (or `flops`), `loss`, and where they are there `d_text`, `d_vision`, `run` and `holdout`.

    Args:
        path: CSV, or parquet; other columns are ignored.

    Raises:
        SoloError: the file cannot be read, lacks a column, or has a value that is not a positive number.
    """
    rows = _read(path)
    if not rows:
        raise SoloError(f"{path} has no rows")
    columns = rows[0].keys()
    if not {"n", "loss"} <= columns or not ("d" in columns or "flops" in columns or columns >= _APART):
        raise SoloError(
            f"{path} has the columns {', '.join(columns)}: expected n and loss, and d "
            "(or d_text and d_vision, or flops)"
        )
    held = [str(row.get("holdout", "")).strip().lower() in _TRUE for row in rows]
    numbered = list(enumerate(rows, start=1))
    holdout = [row for row, is_held in zip(numbered, held, strict=True) if is_held]
    fitted = [row for row, is_held in zip(numbered, held, strict=True) if not is_held]
    return Table(_points(path, fitted), _points(path, holdout) if holdout else None)


def _points(path: Path, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Points:
    def column(name: str, zero: bool = False) -> Array:
        return np.array([_number(path, row, name, values.get(name), zero) for row, values in rows])

    columns = rows[0][1].keys() if rows else set()
    n, text, vision = column("n"), None, None
    if columns >= _APART:
        text, vision = column("d_text"), column("d_vision", zero=True)
    if "d" in columns:
        d = column("d")
    elif text is not None and vision is not None:
        d = text + vision
    else:
        d = column("flops") / (FLOPS_PER_PARAMETER_AND_TOKEN * n)
    return Points(
        n=n,
        d=d,
        loss=column("loss"),
        d_text=text,
        d_vision=vision,
        d_from_flops="d" not in columns and text is None,
        names=[str(values.get("run", row)) for row, values in rows],
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(path).to_pylist())
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [_plain(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise SoloError(f"cannot read {path}: {error}") from error


def _plain(row: Mapping[str | Any, Any]) -> dict[str, Any]:
    return {name.strip(): value for name, value in row.items() if isinstance(name, str)}


def _number(path: Path, row: int, column: str, value: Any, zero: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number) and (number > 0 or (zero and number == 0)):
        return number
    raise SoloError(f"{path}, row {row}, column {column}: {value!r} is not a positive number")


__all__ = ["Points", "Table", "read_points"]
