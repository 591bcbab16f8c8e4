"""`solo scaling fit`: scaling laws from points."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json
from solo_vlm.cli.scaling._laws import fit_and_draw, show_laws


def fit(
    points: Annotated[
        Path, typer.Argument(help="CSV or parquet with n, loss, and d (or flops); also d_text and d_vision.")
    ],
    budget: Annotated[list[float] | None, typer.Option(help="FLOPs to spend; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for fit.json and plots.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta, with 95% intervals and what is optimal for a budget."""
    budgets = budget or []
    analysis = fit_and_draw(points, out / "fit.json" if out else None, out, budgets)
    if json:
        print_json(analysis.as_dict(budgets))
        return
    show_laws(analysis, budgets)
    if out:
        STDOUT.print(f"written: {out}", highlight=False)
