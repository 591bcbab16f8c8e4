"""Who works on the pieces of a conversion: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Literal

from solo_vlm.data.catalog.pieces import Piece, convert_piece
from solo_vlm.data.catalog.report import Report
from solo_vlm.utils.errors import SoloError

Engine = Literal["local", "ray"]


def run(pieces: list[Piece], engine: Engine, workers: int | None) -> Iterator[Report]:
    """Convert all pieces, in any order; yield the report of each when it is complete.

    Args:
        pieces: what to do.
        engine: `local`, or `ray`: one machine, or the cluster that the variable RAY_ADDRESS names, whose
            machines must all see the raw and the new files.
        workers: pieces at once; default: as many as there are CPUs.

    Raises:
        SoloError: Ray is not installed.
    """
    return _ray(pieces, workers) if engine == "ray" else _local(pieces, workers or os.cpu_count() or 1)


def _local(pieces: list[Piece], workers: int) -> Iterator[Report]:
    if min(workers, len(pieces)) == 1:
        yield from map(convert_piece, pieces)
        return
    # A forked copy of Arrow's threads can lock up; a fresh process cannot.
    with ProcessPoolExecutor(min(workers, len(pieces)), mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(convert_piece, piece) for piece in pieces]):
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
            return {"report": json.dumps(convert_piece(pieces[row["piece"]]).as_dict()), "error": ""}
        except SoloError as error:  # raised, it would come back with Ray's own traceback around it
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
