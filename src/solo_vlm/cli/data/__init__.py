"""`solo data`: data sets; one small file a verb."""

from __future__ import annotations

import typer

from solo_vlm.cli.data.convert import convert
from solo_vlm.cli.data.download import download
from solo_vlm.cli.data.list import list_data_sets
from solo_vlm.cli.data.stats import stats
from solo_vlm.cli.data.verify import verify
from solo_vlm.cli.data.view import view

app = typer.Typer(
    help="Data sets: what the paper used, how to get it into shape, and what is in it.", no_args_is_help=True
)

app.command("list")(list_data_sets)
for verb in (download, convert, stats, view, verify):
    app.command()(verb)
