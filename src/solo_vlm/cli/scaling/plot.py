"""`solo scaling plot`: the law over its points, as pictures and as an interactive page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT
from solo_vlm.cli.scaling._laws import fit_and_draw


def plot(
    results: Annotated[
        Path, typer.Argument(help="Table of a sweep, or CSV, as `solo scaling fit` reads it.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")],
) -> None:
    """Draw law, optimal sizes and IsoFLOP profiles: PNG files, and one interactive HTML page."""
    fit_and_draw(results, None, out)
    STDOUT.print(f"written: {out}", highlight=False)
