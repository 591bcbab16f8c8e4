"""`solo data convert`: from raw files to sample files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from solo_vlm.cli._common import STDOUT, print_json, progress_bar


class _Engine(StrEnum):
    local = "local"
    ray = "ray"


def convert(
    name: Annotated[str, typer.Argument(help="A name of solo data list.")],
    raw: Annotated[list[Path], typer.Option(help="Folder of raw files, or a file; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder for the sample files and report.json.")],
    engine: Annotated[
        _Engine, typer.Option(help="Processes of this machine, or Ray (one machine or a cluster).")
    ] = _Engine.local,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Files at once; default: one for each CPU.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a data set's raw files to sample files. Run it again to go on where it stopped."""
    from solo_vlm.data.catalog.convert import convert as run

    with progress_bar(name) as on_progress:
        report = run(name, raw, out, engine.value, workers, on_progress)
    print_json(report) if json else _show(report)


def _show(report: dict[str, Any]) -> None:
    STDOUT.print(
        f"{report['out']}: {report['samples']:,} samples with {report['images']:,} images", highlight=False
    )
    for reason, count in report["rejected"].items():
        example = report["examples"][reason][0]
        STDOUT.print(f"  {count:,} rejected: {example}", highlight=False, markup=False, soft_wrap=True)
