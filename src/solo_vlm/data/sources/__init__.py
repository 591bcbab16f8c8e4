"""Where samples come from: files that can be read unit by unit, in any order, any number of times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from solo_vlm.data.sources.jsonl import JsonlSource
from solo_vlm.data.sources.parquet import ParquetSource
from solo_vlm.errors import SoloError


class Source(Protocol):
    """A data set on disk, as numbered units of rows (a parquet row group, a block of JSON lines)."""

    name: str

    def __len__(self) -> int:
        """Number of units."""

    def read(self, unit: int) -> Sequence[dict[str, Any]]:
        """All rows of a unit, in file order."""

    def where(self, unit: int, row: int) -> str:
        """Name file and row, for messages."""

    def fingerprint(self) -> str:
        """Changes when files are added, removed or rewritten."""


def open_source(path: str | Path) -> Source:
    """Open a file, a folder of files, or a glob pattern. The format follows from the file names.

    Raises:
        SoloError: nothing is there, or the files are of no known or of several formats.
    """
    files = _files(Path(path))
    kinds = {file.suffix for file in files}
    if not files:
        raise SoloError(f"no data files at {path}")
    if kinds == {".parquet"}:
        return ParquetSource(str(path), files)
    if kinds == {".jsonl"}:
        return JsonlSource(str(path), files)
    raise SoloError(f"{path}: expected .parquet or .jsonl files, found {', '.join(sorted(kinds))}")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".jsonl"))
    if path.is_file():
        return [path]
    return sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
