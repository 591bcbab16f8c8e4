"""`solo data list`: the catalog."""

from __future__ import annotations

from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json


def list_data_sets(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all facts.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the documentation.")
    ] = False,
) -> None:
    """List the data sets of the paper, with its counts."""
    from rich.table import Table

    from solo_vlm.data.catalog.registry import DATA_SETS
    from solo_vlm.data.catalog.table import markdown_table, size

    if json:
        print_json({"data_sets": [data_set.as_dict() for data_set in DATA_SETS.values()]})
        return
    if markdown:
        print(markdown_table(DATA_SETS.values()), end="")
        return
    table = Table(show_edge=False)
    for column in ("name", "use", "the paper's count", "raw shape"):
        table.add_column(column, no_wrap=column == "name")
    for data_set in DATA_SETS.values():
        shape = "confirmed" if data_set.schema_confirmed else "not confirmed"
        table.add_row(data_set.name, data_set.use, size(data_set), shape)
    STDOUT.print(table)
