"""Convert the raw files of a data set to sample files, and report what became of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from solo_vlm.data.catalog.engines import Engine, run
from solo_vlm.data.catalog.pieces import plan
from solo_vlm.data.catalog.registry import get
from solo_vlm.data.catalog.report import Report
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file, remove_partial

REPORT_FILE = "report.json"


def convert(
    name: str,
    raw: Sequence[Path],
    out: Path,
    engine: Engine = "local",
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Convert a data set. What an earlier call completed is not done again.

    Args:
        name: of the data set, as in the catalog.
        raw: a folder with the raw files, or the files.
        out: folder for the sample files and the report.
        engine: see `engines.run`.
        workers: pieces at once.
        on_progress: called with the pieces done and their number.

    Returns:
        The report: samples, images, rejected rows by reason, and examples of these.

    Raises:
        SoloError: the name or the files are wrong, or not one row could be used.
    """
    data_set = get(name)
    raw, out = [path.absolute() for path in raw], out.absolute()
    remove_partial(out)
    pieces = plan(data_set, raw, out)
    total = Report()
    on_progress(0, len(pieces))
    for done, report in enumerate(run(pieces, engine, workers), start=1):
        total.add(report)
        on_progress(done, len(pieces))
    facts = {"data_set": name, "out": str(out), "files": len(pieces), **total.as_dict()}
    with new_file(out / REPORT_FILE) as partial:
        partial.write_text(json.dumps(facts, indent=2) + "\n")
    if not total.samples:
        first = next((examples[0] for examples in total.examples.values()), "there are no rows")
        raise SoloError(f"no row is one of {data_set.title}: {first}; expected {data_set.raw_schema}")
    return facts
