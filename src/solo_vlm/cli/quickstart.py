"""`solo quickstart`: the whole recipe at a small scale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, print_json, quiet_libraries


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for data, models, metrics and the report.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
    fraction: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the training steps to run, for a first look.")
    ] = 1.0,
    json: JsonOption = False,
) -> None:
    """Train a small vision-language model through all stages on embedded data, and evaluate it."""
    quiet_libraries()
    from solo_vlm.quickstart.report import results_table
    from solo_vlm.quickstart.run import run_quickstart

    metrics = run_quickstart(out, seed, fraction)
    if json:
        return print_json(metrics)
    STDOUT.print(results_table(metrics))
    STDOUT.print(f"report: {out / 'report.html'}")
    STDOUT.print(
        f"try it: solo generate --model {out / 'sft/model'} --image {out / 'examples/digit.png'} "
        '--prompt "Which digit is this?"'
    )
