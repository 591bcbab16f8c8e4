"""`solo scaling`: how cost and quality grow with size; one small file a verb."""

from __future__ import annotations

import typer

from solo_vlm.cli.scaling.fit import fit
from solo_vlm.cli.scaling.flops import flops
from solo_vlm.cli.scaling.plot import plot
from solo_vlm.cli.scaling.sweep import sweep

app = typer.Typer(help="How cost and quality grow with size.", no_args_is_help=True)

for verb in (flops, sweep, fit, plot):
    app.command()(verb)
