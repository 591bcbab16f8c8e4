"""Conversion of raw files to sample files, in local processes or on a Ray cluster, with a report.

A piece is one raw file, or a share of the rows of a large one. It becomes one parquet file, which appears
when it is complete and contains its own report, so that a later run can resume.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from solo_vlm.data.catalog.entry import DataSet, get
from solo_vlm.data.catalog.raw_files import is_splittable, read_rows
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources.parquet import read_note, write_samples
from solo_vlm.data.values import printable
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import lock_output_dir, remove_partial, write_text

Executor = Literal["local", "ray"]

REPORT_FILE = "report.json"
_MAX_EXAMPLES = 3
_SHARE_BYTES = 64 << 20


@dataclass
class Report:
    """Converted samples and rejected rows of a conversion.

    Attributes:
        samples: Number of samples.
        images: Number of images in the samples.
        rejected: Number of rejected rows by reason.
        examples: The first few rejected rows by reason, as "file, row: message".
    """

    samples: int = 0
    images: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, where: str, error: SampleError) -> None:
        """Count a rejected row, and keep it as an example if it is among the first with its reason."""
        self.rejected[error.reason] += 1
        self._remember(error.reason, [printable(f"{where}: {error}")])

    def add(self, other: Report) -> None:
        """Add the report of another piece."""
        self.samples += other.samples
        self.images += other.images
        self.rejected += other.rejected
        for reason, examples in other.examples.items():
            self._remember(reason, examples)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; the most common reason comes first."""
        rejected = dict(self.rejected.most_common())
        return {
            "samples": self.samples,
            "images": self.images,
            "rejected": rejected,
            "examples": {reason: self.examples[reason] for reason in rejected},
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Report:
        """Restore a report from `as_dict`."""
        return cls(facts["samples"], facts["images"], Counter(facts["rejected"]), facts["examples"])

    def _remember(self, reason: str, examples: list[str]) -> None:
        kept = self.examples.setdefault(reason, [])
        kept += examples[: _MAX_EXAMPLES - len(kept)]


def convert(
    name: str,
    raw: Sequence[Path],
    out: Path,
    executor: Executor = "local",
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Convert a data set; files completed by an earlier call are kept.

    Args:
        name: Name of the data set in the catalog.
        raw: Folders of raw files, or the files.
        out: Folder for the sample files and the report.
        executor: `local` for this machine, or `ray` for the cluster at RAY_ADDRESS, all of whose machines
            need access to the raw files and `out`.
        workers: Maximum number of pieces in progress; default: one per CPU.
        on_progress: Called with the completed and the total number of pieces.

    Returns:
        The report: number of samples and images, rejected rows by reason, and examples of these.

    Raises:
        SoloError: The name or the files are wrong, another conversion is writing to `out`, Ray is not
            installed, or no row could be used.
    """
    data_set = get(name)
    raw, out = [path.absolute() for path in raw], out.absolute()
    pieces = _plan(data_set, raw, out)
    total = Report()
    with lock_output_dir(out) or nullcontext():
        remove_partial(out)
        on_progress(0, len(pieces))
        for done, report in enumerate(_run(pieces, executor, workers), start=1):
            total.add(report)
            on_progress(done, len(pieces))
        facts = {"data_set": name, "out": str(out), "files": len(pieces), **total.as_dict()}
        write_text(out / REPORT_FILE, json.dumps(facts, indent=2) + "\n")
    if not total.samples:
        first = next((examples[0] for examples in total.examples.values()), "there are no rows")
        raise SoloError(f"no row of {data_set.title} found: {first}; expected {data_set.raw_schema}")
    return facts


@dataclass(frozen=True)
class Piece:
    """A raw file, or every `shares`-th row of it, starting with row `share`."""

    data_set: str
    file: Path
    root: Path
    out: Path
    share: int = 0
    shares: int = 1

    @property
    def target(self) -> Path:
        """Sample file of the piece."""
        name = "--".join(self.file.relative_to(self.root).parts).removesuffix(".parquet")
        share = f".{self.share:04d}-of-{self.shares:04d}" if self.shares > 1 else ""
        return self.out / f"{name}{share}.parquet"


def _plan(data_set: DataSet, raw: Sequence[Path], out: Path) -> list[Piece]:
    """Return all pieces of a conversion, in the same order on every machine.

    Raises:
        SoloError: There are no raw files, or `out` holds sample files of another conversion.
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
        raise SoloError("two raw files have the same name: give their common folder instead")
    if targets & {piece.file for piece in pieces}:
        raise SoloError(f"{out} holds the raw files: choose another folder")
    unexpected = sorted(set(out.glob("[!.]*.parquet")) - targets)
    if unexpected:
        raise SoloError(f"{unexpected[0]} is from another conversion: choose another folder or remove it")
    return pieces


def _convert_piece(piece: Piece) -> Report:
    """Convert a piece, unless an earlier run completed it.

    Raises:
        SoloError: The disk or the network failed. Nothing of this piece remains; others are kept.
    """
    try:
        return _done(piece) or _convert(piece)
    except OSError as error:
        raise SoloError(f"{piece.file}: {error}; run the same command again to resume") from error


def _files(data_set: DataSet, raw: Sequence[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (raw file, folder that the image paths of its rows are relative to)."""
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
    """Return the identity of a raw file, to detect that it was replaced."""
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


def _run(pieces: list[Piece], executor: Executor, workers: int | None) -> Iterator[Report]:
    """Convert all pieces in any order; yield the report of each on completion."""
    return _ray(pieces, workers) if executor == "ray" else _local(pieces, workers or os.cpu_count() or 1)


def _local(pieces: list[Piece], workers: int) -> Iterator[Report]:
    if min(workers, len(pieces)) == 1:
        yield from map(_convert_piece, pieces)
        return
    # Arrow's threads can deadlock after a fork: spawn.
    with ProcessPoolExecutor(min(workers, len(pieces)), mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_convert_piece, piece) for piece in pieces]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ray(pieces: list[Piece], workers: int | None) -> Iterator[Report]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise SoloError("--engine ray needs Ray: pip install 'solo-vlm[ray]'") from error

    def convert(row: dict[str, int]) -> dict[str, str]:
        try:
            return {"report": json.dumps(_convert_piece(pieces[row["piece"]]).as_dict()), "error": ""}
        except SoloError as error:  # Ray would wrap a raised error in its own traceback
            return {"report": "", "error": str(error)}

    if not ray.is_initialized():
        ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else workers, log_to_driver=False)
    numbers = ray.data.from_items(
        [{"piece": number} for number in range(len(pieces))], override_num_blocks=len(pieces)
    )
    for row in numbers.map(convert, concurrency=workers).iter_rows():
        if row["error"]:
            raise SoloError(row["error"])
        yield Report.from_dict(json.loads(row["report"]))
