"""Conversion of raw files to shuffled sample files, in local processes or on a Ray cluster, with a report.

A piece is one raw file, or a share of the rows of a large one. It becomes one hidden parquet file, which
appears when it is complete and contains its own report, so that a later run can resume. Then the rows of all
pieces are shuffled into as many files, as a stream of training reads them: from 64 row groups at a time.
"""

from __future__ import annotations

import hashlib
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
from solo_vlm.data.row_order import RowOrder, deal
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources.files import find_files
from solo_vlm.data.sources.parquet import ParquetSource, read_note, write_samples
from solo_vlm.data.values import printable
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import lock_output_dir, remove, remove_partial, write_text

Executor = Literal["local", "ray"]

REPORT_FILE = "report.json"
_PIECES = ".pieces"
_SHUFFLE_BYTES = 2**28  # of rows from which a process draws
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
    seed: int = 0,
) -> dict[str, Any]:
    """Convert a data set; what an earlier call completed is kept.

    Args:
        name: Name of the data set in the catalog.
        raw: Folders of raw files, or the files.
        out: Folder for the sample files and the report.
        executor: `local` for this machine, or `ray` for the cluster at RAY_ADDRESS, all of whose machines
            need access to the raw files and `out`.
        workers: Maximum number of pieces in progress; default: one per CPU.
        on_progress: Called with the completed and the total number of pieces and files.
        seed: Seed of the shuffle.

    Returns:
        The report: number of samples and images, rejected rows by reason, and examples of these.

    Raises:
        SoloError: The name or the files are wrong, another conversion is writing to `out`, Ray is not
            installed, or no row could be used.
    """
    data_set = get(name)
    raw, out = [path.absolute() for path in raw], out.absolute()
    pieces = _plan(data_set, raw, out)
    total, steps = Report(), 2 * len(pieces)
    identity = hashlib.sha256(json.dumps([seed, *map(_source, pieces)]).encode()).hexdigest()[:16]
    files = [ShuffledFile(name, out, number, len(pieces), seed, identity) for number in range(len(pieces))]
    with lock_output_dir(out) or nullcontext():
        if (finished := _finished(out, files)) is not None:
            on_progress(steps, steps)
            return finished
        remove_partial(out)
        remove_partial(out / _PIECES)
        on_progress(0, steps)
        for done, report in enumerate(_run(pieces, executor, workers), start=1):
            total.add(report)
            on_progress(done, steps)
        if total.samples:
            for path in {*out.glob("[!.]*.parquet")} - {file.target for file in files}:
                path.unlink()
            for done, _ in enumerate(_run(files, executor, workers), start=1 + len(pieces)):
                on_progress(done, steps)
        facts = {
            "data_set": name,
            "out": str(out),
            "files": len(files),
            **total.as_dict(),
            "identity": identity,
        }
        write_text(out / REPORT_FILE, json.dumps(facts, indent=2) + "\n")
        if total.samples:
            remove(out / _PIECES)
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
        """Hidden sample file of the piece."""
        name = "--".join(self.file.relative_to(self.root).parts).removesuffix(".parquet")
        share = f".{self.share:04d}-of-{self.shares:04d}" if self.shares > 1 else ""
        return self.out / _PIECES / f"{name}{share}.parquet"

    def run(self) -> Report:
        """Convert the piece, unless an earlier run completed it."""
        return _done(self) or _convert(self)


@dataclass(frozen=True)
class ShuffledFile:
    """Sample file with an equal part of the rows of all pieces."""

    data_set: str
    out: Path
    number: int
    count: int
    seed: int
    identity: str

    @property
    def target(self) -> Path:
        """The file."""
        return self.out / f"{self.data_set}-{self.number:05d}-of-{self.count:05d}.parquet"

    @property
    def is_complete(self) -> bool:
        """Whether the file has been written from the same raw files with the same seed."""
        return (read_note(self.target) or {}).get("identity") == self.identity

    def run(self) -> Report:
        """Write the file, unless an earlier run completed it."""
        if not self.is_complete:
            write_samples(self.target, self._rows(), note=lambda: {"identity": self.identity})
        return Report()

    def _rows(self) -> Iterator[dict[str, Any]]:
        pieces = ParquetSource(self.data_set, find_files(str(self.out / _PIECES), [".parquet"]))
        share, _ = deal(len(pieces), self.number, self.count)
        order = RowOrder(pieces, share, str(self.seed), self.number, 1, _SHUFFLE_BYTES)
        while not order.exhausted:
            yield order.row(*order.next_key())


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
    if any(piece.file.parent == out for piece in pieces):
        raise SoloError(f"{out} holds the raw files: choose another folder")
    unexpected = sorted(set(out.glob("[!.]*.parquet")) - set(out.glob(f"{data_set.name}-*-of-*.parquet")))
    if unexpected:
        raise SoloError(f"{unexpected[0]} is from another conversion: choose another folder or remove it")
    return pieces


def _run_task(task: Piece | ShuffledFile) -> Report:
    """Convert a piece or write a shuffled file.

    Raises:
        SoloError: The disk or the network failed. Nothing of this task remains; others are kept.
    """
    try:
        return task.run()
    except OSError as error:
        file = task.file if isinstance(task, Piece) else task.target
        raise SoloError(f"{file}: {error}; run the same command again to resume") from error


def _finished(out: Path, files: Sequence[ShuffledFile]) -> dict[str, Any] | None:
    """Return the report of an earlier conversion of the same raw files."""
    report = out / REPORT_FILE
    facts: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    is_same = facts.get("identity") == files[0].identity and all(file.is_complete for file in files)
    return facts if is_same else None


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
    piece.target.parent.mkdir(exist_ok=True)
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


def _run(tasks: Sequence[Piece | ShuffledFile], executor: Executor, workers: int | None) -> Iterator[Report]:
    """Run all tasks in any order; yield the report of each on completion."""
    return _ray(tasks, workers) if executor == "ray" else _local(tasks, workers or os.cpu_count() or 1)


def _local(tasks: Sequence[Piece | ShuffledFile], workers: int) -> Iterator[Report]:
    if min(workers, len(tasks)) == 1:
        yield from map(_run_task, tasks)
        return
    # Arrow's threads can deadlock after a fork: spawn.
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_run_task, task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ray(tasks: Sequence[Piece | ShuffledFile], workers: int | None) -> Iterator[Report]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise SoloError("--engine ray needs Ray: pip install 'solo-vlm[ray]'") from error

    def run(row: dict[str, int]) -> dict[str, str]:
        try:
            return {"report": json.dumps(_run_task(tasks[row["task"]]).as_dict()), "error": ""}
        except SoloError as error:  # Ray would wrap a raised error in its own traceback
            return {"report": "", "error": str(error)}

    if not ray.is_initialized():
        ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else workers, log_to_driver=False)
    numbers = ray.data.from_items(
        [{"task": number} for number in range(len(tasks))], override_num_blocks=len(tasks)
    )
    for row in numbers.map(run, concurrency=workers).iter_rows():
        if row["error"]:
            raise SoloError(row["error"])
        yield Report.from_dict(json.loads(row["report"]))
