"""Pieces of a conversion: what there is to do, and the work on one of them.

A piece is one raw file, or a share of the rows of a large one. It becomes one parquet file, which appears
when it is complete and holds its own report: that is all a second run needs to go on where a first stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.data.catalog.entry import DataSet
from solo_vlm.data.catalog.raw_files import is_splittable, read_rows
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.catalog.registry import get
from solo_vlm.data.catalog.report import Report
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources.parquet import read_note, write_samples
from solo_vlm.utils.errors import SoloError

_SHARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """A raw file, or every `shares`-th row of it from number `share` on."""

    data_set: str
    file: Path
    root: Path
    out: Path
    share: int = 0
    shares: int = 1

    @property
    def target(self) -> Path:
        """The file that the piece becomes."""
        name = "--".join(self.file.relative_to(self.root).parts).removesuffix(".parquet")
        share = f".{self.share:04d}-of-{self.shares:04d}" if self.shares > 1 else ""
        return self.out / f"{name}{share}.parquet"


def plan(data_set: DataSet, raw: Sequence[Path], out: Path) -> list[Piece]:
    """All pieces of a conversion, in an order that does not depend on the machine.

    Raises:
        SoloError: there are no raw files, or `out` holds sample files of something else.
    """
    pieces = [
        Piece(data_set.name, file, root, out, share, shares)
        for file, root in _files(data_set, raw, out)
        for shares in [_shares(file)]
        for share in range(shares)
    ]
    if not pieces:
        then = f", then solo data download {data_set.name}" if data_set.url_list else ""
        raise SoloError(
            f"no {' or '.join(data_set.files)} in {', '.join(map(str, raw))}: get {data_set.title} from "
            f"{data_set.source}{then}"
        )
    targets = {piece.target for piece in pieces}
    if len(targets) < len(pieces):
        raise SoloError("two of the raw files have one name: give their common folder instead")
    if targets & {piece.file for piece in pieces}:
        raise SoloError(f"{out} holds the raw files: choose another folder")
    strangers = sorted(set(out.glob("*.parquet")) - targets)
    if strangers:
        raise SoloError(f"{strangers[0]} is not of this conversion: choose another folder or remove it")
    return pieces


def convert_piece(piece: Piece) -> Report:
    """Convert a piece, unless that was done before.

    Raises:
        SoloError: a disk or a network fails. Nothing is left of the piece; others stay.
    """
    try:
        return _done(piece) or _convert(piece)
    except OSError as error:
        raise SoloError(f"{piece.file}: {error}; the same command goes on from here") from error


def _files(data_set: DataSet, raw: Sequence[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """(raw file, the folder that its rows' image paths count from)."""
    for path in raw:
        if path.is_file():
            yield path, path.parent
        elif path.is_dir():
            found = {file for pattern in data_set.files for file in path.rglob(pattern) if file.is_file()}
            yield from ((file, path) for file in sorted(found) if not file.is_relative_to(out))
        else:
            raise SoloError(f"{path} does not exist")


def _shares(file: Path) -> int:
    return -(-file.stat().st_size // _SHARE_BYTES) or 1 if is_splittable(file) else 1


def _done(piece: Piece) -> Report | None:
    note = read_note(piece.target)
    if note is None or note.get("source") != _source(piece):
        return None
    return Report.from_dict(note["report"])


def _convert(piece: Piece) -> Report:
    report = Report()
    write_samples(
        piece.target,
        _samples(piece, report),
        note=lambda: {"source": _source(piece), "report": report.as_dict()},
    )
    return report


def _source(piece: Piece) -> dict[str, Any]:
    """Tells an unchanged raw file from one that was fetched again."""
    return {"data_set": piece.data_set, "file": piece.file.name, "bytes": piece.file.stat().st_size}


def _samples(piece: Piece, report: Report) -> Iterator[dict[str, Any]]:
    data_set, folder = get(piece.data_set), RawFolder(piece.root)
    for number, row in _share(piece):
        try:
            if isinstance(row, SampleError):
                raise row
            sample = data_set.convert(row, folder)
            parse_sample(sample)
        except SampleError as error:
            report.reject(f"{piece.file}, row {number}", error)
            continue
        report.samples += 1
        report.images += len(sample["images"])
        yield sample


def _share(piece: Piece) -> Iterable[tuple[int, Any]]:
    rows = enumerate(read_rows(piece.file))
    return (numbered for numbered in rows if numbered[0] % piece.shares == piece.share)
