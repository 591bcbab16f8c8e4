"""What verbs that read a mixture take."""

from __future__ import annotations

from typing import Annotated

import typer

MixtureFile = Annotated[
    str, typer.Argument(metavar="MIXTURE", help="YAML file of a mixture or a recipe, or a recipe's name.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
