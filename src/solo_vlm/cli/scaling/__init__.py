"""`solo scaling`: how cost and quality grow with size; one small file a verb."""

from __future__ import annotations

import typer

from solo_vlm.cli.scaling.flops import flops

app = typer.Typer(help="How cost and quality grow with size.", no_args_is_help=True)


@app.callback()
def _scaling() -> None:
    """A single command would otherwise take the place of its group."""


app.command()(flops)
