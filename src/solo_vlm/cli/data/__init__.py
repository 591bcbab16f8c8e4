"""`solo data`: data sets; one small file a verb."""

from __future__ import annotations

import typer

from solo_vlm.cli.data.convert import convert
from solo_vlm.cli.data.download import download
from solo_vlm.cli.data.list import list_data_sets

app = typer.Typer(help="Data sets: what the paper used, and how to get it into shape.", no_args_is_help=True)

app.command("list")(list_data_sets)
app.command()(download)
app.command()(convert)
